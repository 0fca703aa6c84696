"""Spoiled packages are refused by a typed error or load bit by bit; nothing of them runs, hangs or eats the memory."""

import pytest
from fuzz_packages import GROWTH, LOADED, cases, run_all, write_bases
from mutations import CANARY, Mutation, mutations

from hub_tools import errors, verify_package

EVERY = 7  # of the cases: they take turns at the record too, since 7 and 3 have no common factor


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


def test_the_hunt_sees_defects(tmp_path, monkeypatch):
    """A package whose code runs when it is looked at, and one that hangs, are told apart from sound ones."""
    import fuzz_packages

    write_bases(tmp_path)
    original = fuzz_packages.weights_in(tmp_path / "base-one")
    sound = Mutation("none", "none", lambda folder: None)
    assert fuzz_packages.try_case(tmp_path, sound, "kept", original) == (LOADED, True)
    ran = Mutation("none", "ran", lambda folder: (folder.parent / CANARY).touch())
    assert fuzz_packages.try_case(tmp_path, ran, "kept", original) == ("code of the package ran", False)
    other = {**original, "v_head.summary.bias": b"\0" * 3}
    assert not fuzz_packages.try_case(tmp_path, sound, "kept", other)[1]


def verified(name):
    return next(mutation for mutation in mutations() if mutation.name == name)


@pytest.mark.parametrize(
    ("name", "record", "error"),
    [
        ("modeling_gpt2_value.py appended", "fitted", errors.UntrustedCodeError),
        ("custom_generate/generate.py beside", "fitted", errors.ForeignFileError),
        ("adapter_config.json beside", "fitted", errors.ForeignFileError),
        ("pytorch_model.bin beside", "fitted", errors.PickleError),
        ("nan in transformer.wte.weight", "fitted", errors.NonFiniteWeightsError),
        ("another model's", "fitted", errors.VerificationError),
        ("transformers_weights", "fitted", errors.CorruptFileError),
    ],
)
def test_what_verify_refuses(name, record, error, tmp_path):
    """The same mutations, in front of `verify_package`, whose fresh interpreter does run a package's code."""
    import shutil

    from fuzz_packages import fit_record

    write_bases(tmp_path)
    folder = shutil.move(tmp_path / "base-one", tmp_path / "package")
    verified(name).edit(folder)
    fit_record(folder)
    with pytest.raises(error):
        verify_package(folder)
    assert not (tmp_path / CANARY).exists()
