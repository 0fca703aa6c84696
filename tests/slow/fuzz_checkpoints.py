"""Spoil checkpoints, adapters and packages in thousands of ways, before convert and export.

    python tests/slow/fuzz_checkpoints.py                 # the table: what reads it and kind of mutation x outcome

Each case ends in a typed error or in the right numbers. Anything else is a defect: another exception, other numbers,
more memory or time than a case may take, a file outside that was opened, or code of the case's that was run. See
`fuzz_runner` for the options, and for what is watched.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[up]) for up in (1, 2)]  # tests/ and the checkout

from support.mutations import mutations
from support.mutations_of_checkpoints import of_adapters, of_checkpoints, of_pickles, of_shards
from support.spoiling import CANARY, Mutation

from slow import fuzz_packages
from slow.fuzz_runner import LOADED, Attempt, Case, Hunt, Watch, main, weights_in

PICKLES = 300  # each takes a process


def cases() -> list[Case]:
    """Every mutation with what reads what it spoils: convert (of a whole model, of shards, of an adapter, of a pickle),
    or export."""
    return [
        *((mutation, "convert") for mutation in of_checkpoints()),
        *((mutation, "sharded") for mutation in of_shards()),
        *((mutation, "adapter") for mutation in of_adapters()),
        *((mutation, "pickle") for mutation in of_pickles(PICKLES)),
        *((mutation, "export") for mutation in mutations()),
    ]


def write_bases(home: Path) -> None:
    """The packages of `fuzz_packages`, and checkpoints of the same model."""
    import torch
    from safetensors.torch import load_file, save_file

    from hub_tools import export_policy

    fuzz_packages.write_bases(home)
    export_policy(home / "base-one", home / "base-convert")
    state = load_file(home / "base-one" / "model.safetensors")
    save_file(state, home / "base-convert" / "model.safetensors", metadata={"format": "pt"})
    for name in ("pickle", "plain"):
        shutil.copytree(home / "base-convert", home / f"base-{name}")
        for path in (home / f"base-{name}").glob("*tok*"):
            path.unlink()
    (home / "base-pickle" / "model.safetensors").unlink()
    torch.save(state, home / "base-pickle" / "pytorch_model.bin")

    shutil.copytree(home / "base-plain", home / "base-sharded")
    (home / "base-sharded" / "model.safetensors").unlink()
    for path in (home / "base-shards").glob("model*"):
        shutil.copy(path, home / "base-sharded")

    adapter = home / "base-adapter"
    adapter.mkdir()
    module = "base_model.model.transformer.h.0.attn.c_attn"
    lora = {f"{module}.lora_A.weight": torch.ones(4, 16), f"{module}.lora_B.weight": torch.ones(48, 4)}
    save_file(lora, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    head = {name: tensor for name, tensor in state.items() if name.startswith("v_head.")}
    save_file(head, adapter / "value_head.safetensors", metadata={"format": "pt"})
    settings = {"peft_type": "LORA", "lora_alpha": 8, "base_model_name_or_path": str(home / "base-plain")}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))


def prepare(home: Path) -> Attempt:
    import hub_tools.convert.convert
    import hub_tools.convert.export
    import hub_tools.package.save  # noqa: F401  # importing is no part of a case's time

    watch = Watch()

    def attempt(mutation: Mutation, reader: str) -> tuple[str, bool]:
        return try_case(home, mutation, reader, watch)

    return attempt


def try_case(home: Path, mutation: Mutation, reader: str, watch: Watch) -> tuple[str, bool]:
    """Spoil and read; the outcome, and whether it is one of the two that are allowed."""
    from hub_tools.errors import GPT2ValueHubError

    base = f"base-{mutation.base}" if reader == "export" else f"base-{reader}"
    if reader == "convert" and mutation.kind in ("config", "header"):
        base = "base-plain"  # a tokenizer costs each case a process
    with tempfile.TemporaryDirectory(dir=home) as parent:
        folder = Path(parent, "source")
        shutil.copytree(home / base, folder)
        mutation.edit(folder)
        try:
            with watch.over(Path(parent)):
                outcome = READERS.get(reader, convert)(home, folder, Path(parent, "out"), reader)
        except GPT2ValueHubError as error:
            outcome = type(error).__name__
            if any(not char.isprintable() and char != "\n" for char in str(error)):
                outcome = f"{outcome} with characters that a terminal would obey"
        except BaseException as error:  # the Rust libraries' panics are no Exceptions
            outcome = f"{type(error).__name__}: {str(error)[:200]}"
        if watch.seen:
            return watch.seen[0], False
        if (Path(parent) / CANARY).exists():
            return "code of the case ran", False
        return outcome, outcome == LOADED or (outcome.endswith("Error") and outcome.isidentifier())


def convert(home: Path, folder: Path, out: Path, reader: str) -> str:
    """A checkpoint's weights, in a package; an adapter's where its settings can change them."""
    from hub_tools import convert_checkpoint

    convert_checkpoint(folder, out)
    ours, theirs = weights_in(out), weights_in(home / "base-plain" if reader in ("adapter", "pickle") else folder)
    changed = {name for name in ours | theirs if ours.get(name) != theirs.get(name)}
    may_change = {"transformer.h.0.attn.c_attn.weight"} if reader == "adapter" else set()
    return LOADED if changed <= may_change else "other weights than those in the file"


def export(home: Path, folder: Path, out: Path, reader: str) -> str:
    from hub_tools import export_policy

    export_policy(folder, out)
    body = {name: data for name, data in weights_in(folder).items() if not name.startswith("v_head.")}
    return LOADED if weights_in(out) == body else "other weights than the package's"


READERS: dict[str, Callable[[Path, Path, Path, str], str]] = {"export": export}


HUNT = Hunt(__file__, cases, write_bases, prepare)

if __name__ == "__main__":
    main(HUNT)
