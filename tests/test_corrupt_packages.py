"""Spoiled packages are refused by a typed error or load bit by bit; nothing of them runs, hangs or eats the memory."""

import importlib
import runpy

import pytest
from slow.fuzz_packages import HUNT, cases, try_case, write_bases
from slow.fuzz_runner import GROWTH, LOADED, Watch, run_all
from support.mutations import mutations
from support.spoiling import CANARY, WEIGHTS, Mutation

EVERY = 71  # of the cases


def test_every_spoiled_package_is_refused_or_loads_bit_by_bit():
    outcomes = run_all(HUNT, every=EVERY, processes=1)  # other tests run at the same time
    assert [outcome for outcome in outcomes if not outcome.good] == []
    assert max(outcome.grown for outcome in outcomes) < GROWTH / 4
    assert len(outcomes) >= len(cases()) / EVERY >= 70
    assert {outcome.kind for outcome in outcomes} == {mutation.kind for mutation in mutations()}
    expected = {LOADED, "ChangedFileError", "PackageError"}
    assert expected <= {outcome.outcome for outcome in outcomes}


def test_the_hunt_sees_defects(tmp_path):
    """A package that ran something, or that loads other weights, is told apart from a sound one."""
    write_bases(tmp_path)
    watch = Watch()
    sound = Mutation("none", "none", lambda folder: None)
    assert try_case(tmp_path, sound, "kept", watch) == (LOADED, True)
    ran = Mutation("none", "ran", lambda folder: (folder.parent / CANARY).touch())
    assert try_case(tmp_path, ran, "kept", watch) == ("code of the package ran", False)
    other = Mutation("none", "other", lambda folder: (tmp_path / "base-one" / WEIGHTS).write_bytes(bytes(8)))
    assert not try_case(tmp_path, other, "kept", watch)[1]


def test_the_hunt_sees_what_is_opened_outside_and_what_is_run(tmp_path):
    watch = Watch()
    (tmp_path / "outside").write_text("a secret")
    (tmp_path / "code.py").write_text("x = 1")
    with watch.over(tmp_path):
        (tmp_path / "code.py").read_text()
    assert watch.seen == []
    with watch.over(tmp_path):
        (tmp_path / "outside").read_text()
        runpy.run_path(str(tmp_path / "code.py"))
        with pytest.raises(ImportError):
            importlib.import_module("armed.payload")
    assert [seen.split()[0] for seen in watch.seen] == ["opened", "ran", "imported", "read"]
