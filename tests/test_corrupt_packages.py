"""Spoiled packages are refused by a typed error or load bit by bit; nothing of them runs, hangs or eats the memory."""

import importlib
import runpy
import shutil

import pytest
from slow.fuzz_packages import HUNT, cases, fit_record, try_case, write_bases
from slow.fuzz_runner import GROWTH, LOADED, Watch, run_all, weights_in
from support.mutations import mutations
from support.spoiling import CANARY, Mutation

from hub_tools import errors, verify_package

EVERY = 31  # of the cases: they take turns at the record too, since 31 and 3 have no common factor


@pytest.fixture(scope="module")
def outcomes():
    return run_all(HUNT, every=EVERY, processes=1)  # other tests run at the same time


def test_every_spoiled_package_is_refused_or_loads_bit_by_bit(outcomes):
    assert [outcome for outcome in outcomes if not outcome.good] == []


def test_there_are_enough_cases_of_every_kind_and_both_ends_occur(outcomes):
    assert len(outcomes) == len(cases()[::EVERY]) >= 70
    assert {outcome.kind for outcome in outcomes} == {mutation.kind for mutation in mutations()}
    found = {outcome.outcome for outcome in outcomes}
    expected = {errors.ChangedFileError, errors.PackageError, errors.UnsavableModelError, errors.UntrustedCodeError}
    assert {LOADED, *(error.__name__ for error in expected)} <= found


def test_no_spoiled_package_eats_the_memory(outcomes):
    assert max(outcome.grown for outcome in outcomes) < GROWTH / 4


def test_the_hunt_sees_defects(tmp_path):
    """A package that ran something, or that loads other weights, is told apart from a sound one."""
    write_bases(tmp_path)
    original = weights_in(tmp_path / "base-one")
    watch = Watch()
    sound = Mutation("none", "none", lambda folder: None)
    assert try_case(tmp_path, sound, "kept", original, watch) == (LOADED, True)
    ran = Mutation("none", "ran", lambda folder: (folder.parent / CANARY).touch())
    assert try_case(tmp_path, ran, "kept", original, watch) == ("code of the package ran", False)
    other = {**original, "v_head.summary.bias": b"\0" * 3}
    assert not try_case(tmp_path, sound, "kept", other, watch)[1]


def test_the_hunt_sees_what_is_opened_outside_and_what_is_run(tmp_path):
    watch = Watch()
    (tmp_path / "outside").write_text("a secret")
    (tmp_path / "code.py").write_text("x = 1")
    with watch.over(tmp_path):
        (tmp_path / "code.py").read_text()
    assert watch.seen == []
    with watch.over(tmp_path):
        (tmp_path / "outside").read_text()
    assert watch.seen[0].startswith("opened")
    with watch.over(tmp_path):
        runpy.run_path(str(tmp_path / "code.py"))
    assert watch.seen[0].startswith("ran")
    with watch.over(tmp_path), pytest.raises(ImportError):
        importlib.import_module("armed.payload")
    assert watch.seen[0].startswith("imported")


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("modeling_gpt2_value.py appended", errors.UntrustedCodeError),
        ("custom_generate/generate.py beside", errors.PackageError),
        ("adapter_config.json beside", errors.PackageError),
        ("pytorch_model.bin beside", errors.PackageError),
        ("another model's", errors.VerificationError),
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
