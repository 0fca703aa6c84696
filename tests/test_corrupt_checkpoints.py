"""A sample of `make fuzz`: spoiled checkpoints and adapters are refused by a typed error, or give the right numbers."""

from slow.fuzz_checkpoints import HUNT, READERS, convert, try_case, write_bases
from slow.fuzz_runner import GROWTH, LOADED, Watch, run_all
from support.spoiling import CANARY, Mutation

EVERY = 101  # of the cases, a prime: each reader and each kind of mutation takes its turns
ALL = {"convert", "sharded", "adapter", "pickle", *READERS}


def test_every_spoiled_checkpoint_is_refused_or_gives_the_right_numbers():
    outcomes = run_all(HUNT, every=EVERY, processes=1)  # other tests run at the same time
    assert [outcome for outcome in outcomes if not outcome.good] == []
    assert len(outcomes) >= 60
    assert {outcome.record for outcome in outcomes} == ALL
    assert {LOADED, "PackageError"} <= {outcome.outcome for outcome in outcomes}
    assert max(outcome.grown for outcome in outcomes) < GROWTH / 4


def test_the_hunt_sees_other_errors_and_code_that_ran(tmp_path, monkeypatch):
    write_bases(tmp_path)
    watch = Watch()
    sound = Mutation("none", "none", lambda folder: None)
    for reader in ALL:
        assert try_case(tmp_path, sound, reader, watch) == (LOADED, True), reader
    ran = Mutation("none", "ran", lambda folder: (folder.parent / CANARY).touch())
    assert try_case(tmp_path, ran, "convert", watch) == ("code of the case ran", False)

    def convert_and_fail(*args):
        convert(*args)
        raise KeyError("untyped")

    monkeypatch.setitem(READERS, "export", convert_and_fail)
    mutation = Mutation("none", "none", lambda folder: None, base="convert")
    assert try_case(tmp_path, mutation, "export", watch) == ("KeyError: 'untyped'", False)
