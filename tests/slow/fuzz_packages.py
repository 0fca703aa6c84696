"""Spoil packages in hundreds of ways; each must be refused by a typed error, or load bit by bit. Print the outcomes.

    python tests/slow/fuzz_packages.py            # the table: kind of mutation x outcome

Each mutation is tried with the package's record as it was, and again with a record that was made to fit the spoiled
files, and again without one: the record's hashes would otherwise shield everything behind them. See `fuzz_runner` for
the options, and for what is watched.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import sys
import tempfile
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[up]) for up in (1, 2)]  # tests/ and the checkout

from support.mutations import mutations
from support.spoiling import CANARY, RECORD, Mutation

from hub_tools import layout
from slow.fuzz_runner import LOADED, Attempt, Case, Hunt, Watch, bytes_of, main, weights_in

RECORDS = ("kept", "fitted", "removed")


def cases() -> list[Case]:
    """Every mutation with every state of the record; a record that is itself spoiled stays so."""
    return [
        (mutation, record)
        for mutation in mutations()
        for record in RECORDS
        if record == "kept" or RECORD not in mutation.name
    ]


def prepare(home: Path) -> Attempt:
    import hub_tools.package.load  # noqa: F401  # importing is no part of a case's time

    watch = Watch()
    return lambda mutation, record: try_case(home, mutation, record, watch)


def try_case(home: Path, mutation: Mutation, record: str, watch: Watch) -> tuple[str, bool]:
    """Spoil, inspect, load; the outcome, and whether it is one of the two that are allowed."""
    from hub_tools import inspect_package, load_package
    from hub_tools.errors import GPT2ValueHubError

    imported = remote_modules()
    with tempfile.TemporaryDirectory(dir=home) as parent:
        folder = Path(parent, "package")
        shutil.copytree(home / f"base-{mutation.base}", folder)
        mutation.edit(folder)
        if record == "fitted":
            fit_record(folder)
        elif record == "removed":
            (folder / RECORD).unlink()
        for function in (inspect_package, load_package):
            outcome = LOADED
            try:
                with watch.over(Path(parent)):
                    found = function(folder)
                if function is load_package:
                    outcome = difference(found, folder, home / f"base-{mutation.base}" if record == "kept" else folder)
            except GPT2ValueHubError as error:
                outcome = type(error).__name__
            except BaseException as error:  # the Rust libraries' panics are no Exceptions
                return f"{function.__name__}: {type(error).__name__}: {str(error)[:200]}", False
            if watch.seen:
                return f"{function.__name__}: {watch.seen[0]}", False
        if (Path(parent) / CANARY).exists() or remote_modules() != imported:
            return "code of the package ran", False
        return outcome, outcome.endswith("Error") or outcome == LOADED


def remote_modules() -> set[str]:
    """The modules that were imported from packages."""
    return {name for name in sys.modules if name.startswith(("transformers_modules", "gpt2_value_code"))}


def difference(loaded: Any, folder: Path, saved: Path) -> str:
    """LOADED if the model has, bit by bit, the weights that are in the files, which are the saved ones."""
    state = loaded.model.state_dict()
    if loaded.model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    if not bytes_of(state) == weights_in(folder) == weights_in(saved):
        return "loaded weights that are not those in the files, or that were saved"
    if not all(weight.isfinite().all() for weight in state.values()):
        return "loaded weights that are not finite"
    return LOADED


def fit_record(folder: Path) -> None:
    """Make the record's hashes those of the files that are there, as somebody would who means harm."""
    path = folder / RECORD
    with contextlib.suppress(ValueError, AttributeError, TypeError):  # where it is the record itself that is spoiled
        record = json.loads(path.read_text())
        regular = [name for name in os.listdir(folder) if stat.S_ISREG((folder / name).lstat().st_mode)]
        kept = {layout.CARD, RECORD}
        record["sha256"] = {
            name: layout.sha256_of(folder / name)
            for name in sorted(regular)
            if layout.written_by_save(name) and name not in kept and (folder / name).stat().st_size < 1 << 30
        }
        path.write_text(json.dumps(record))


def write_bases(home: Path) -> None:
    """The sound packages: base-one (one weight file, a tokenizer) and base-shards."""
    from conftest import make_tiny_model
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from hub_tools import save_package

    model = make_tiny_model(n_layer=1, n_embd=16, n_head=2, vocab_size=24, n_positions=16)
    letters = {letter: number for number, letter in enumerate(["<|endoftext|>", *"abcdefghijklmnopqrstuvw"])}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[], unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", unk_token="<|endoftext|>")
    save_package(model, home / "base-one", fast)
    save_package(model, home / "base-shards", max_shard_size=6_000)


HUNT = Hunt(__file__, cases, write_bases, prepare)

if __name__ == "__main__":
    main(HUNT)
