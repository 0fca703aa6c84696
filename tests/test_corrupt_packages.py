"""Spoiled packages are refused by a typed error or load bit by bit; nothing of them runs, hangs or eats the memory."""

import shutil

import pytest
from slow.fuzz_packages import GROWTH, LOADED, cases, fit_record, run_all, try_case, weights_in, write_bases
from support.mutations import mutations
from support.spoiling import CANARY, Mutation

from hub_tools import errors, verify_package

pytestmark = pytest.mark.xdist_group("corrupt packages")  # what they share takes half a minute to make


EVERY = 10  # of the cases: they take turns at the record too, since 10 and 3 have no common factor


@pytest.fixture(scope="module")
def outcomes():
    return run_all(every=EVERY)


def test_every_spoiled_package_is_refused_or_loads_bit_by_bit(outcomes):
    assert [outcome for outcome in outcomes if not outcome.good] == []


def test_there_are_enough_cases_of_every_kind_and_both_ends_occur(outcomes):
    assert len(outcomes) == len(cases()[::EVERY]) >= 300
    assert {outcome.kind for outcome in outcomes} == {mutation.kind for mutation in mutations()}
    found = {outcome.outcome for outcome in outcomes}
    expected = {
        errors.ChangedFileError,
        errors.CodeReferenceError,
        errors.CorruptFileError,
        errors.LoadError,
        errors.MissingFileError,
        errors.NonFiniteWeightsError,
        errors.PickleError,
        errors.UnsafeFileError,
        errors.UntrustedCodeError,
        errors.WeightsMismatchError,
    }
    assert {LOADED, *(error.__name__ for error in expected)} <= found


def test_no_spoiled_package_eats_the_memory(outcomes):
    assert max(outcome.grown for outcome in outcomes) < GROWTH / 4


def test_the_hunt_sees_defects(tmp_path):
    """A package that ran something, or that loads other weights, is told apart from a sound one."""
    write_bases(tmp_path)
    original = weights_in(tmp_path / "base-one")
    sound = Mutation("none", "none", lambda folder: None)
    assert try_case(tmp_path, sound, "kept", original) == (LOADED, True)
    ran = Mutation("none", "ran", lambda folder: (folder.parent / CANARY).touch())
    assert try_case(tmp_path, ran, "kept", original) == ("code of the package ran", False)
    other = {**original, "v_head.summary.bias": b"\0" * 3}
    assert not try_case(tmp_path, sound, "kept", other)[1]


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("modeling_gpt2_value.py appended", errors.UntrustedCodeError),
        ("custom_generate/generate.py beside", errors.ForeignFileError),
        ("adapter_config.json beside", errors.ForeignFileError),
        ("pytorch_model.bin beside", errors.PickleError),
        ("another model's", errors.VerificationError),
        ("transformers_weights", errors.CorruptFileError),
    ],
)
def test_what_verify_refuses(name, error, tmp_path):
    """The same mutations, in front of `verify_package`, whose fresh interpreter does run a package's code."""
    write_bases(tmp_path)
    folder = shutil.move(tmp_path / "base-one", tmp_path / "package")
    next(mutation for mutation in mutations() if mutation.name == name).edit(folder)
    fit_record(folder)
    with pytest.raises(error):
        verify_package(folder)
    assert not (tmp_path / CANARY).exists()
