"""The one reader of strangers' weights, and the one way to make a model from a config and tensors.

safetensors' own reader checks a header against the file; here are the bounds on what it is given, and what the config
calls for. Nothing is unpickled: a pickle is first turned into safetensors, by a process with limits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import layout, limits
from ..errors import AGAIN, PackageError, as_ours
from ..files import open_in, read_json
from .config import DTYPE, checked_shards, expected_shapes

if TYPE_CHECKING:
    import torch

    from configuration_gpt2_value import GPT2ValueConfig
    from modeling_gpt2_value import GPT2ValueModel

NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # safetensors' name of a type -> torch's


@dataclass(frozen=True)
class Tensor:
    """One entry of a safetensors header."""

    dtype: str  # torch's name of it, where a package may have it: float32
    shape: tuple[int, ...]


def read_header(folder: Path, name: str) -> dict[str, Tensor]:
    """Read which tensors a safetensors file holds; the numbers are not read. Needs no torch.

    Raises:
        PackageError: see `files.open_in`; or the header is truncated, oversized or not valid, or does not describe the
            file's bytes.
    """
    from safetensors import safe_open

    def corrupt(found: str) -> PackageError:
        return PackageError(
            f"{name}: {found}",
            expected="a safetensors file of tensors, and not a git-lfs pointer to one",
            next_step=f"in a git checkout: git lfs pull; else {AGAIN}",
        )

    with open_in(folder, name) as opened:
        length = int.from_bytes(opened.read(8), "little")
    if length > limits.HEADER_BYTES:
        raise corrupt(f"its header claims {length:,} bytes, and may have {limits.HEADER_BYTES:,}")
    with as_ours(corrupt), safe_open(folder / name, framework="numpy") as file:  # numpy: torch is not imported
        slices = {tensor: file.get_slice(tensor) for tensor in file.keys()}  # noqa: SIM118  # it is no dict
        return {
            tensor: Tensor(NAMES.get(each.get_dtype(), each.get_dtype()), tuple(each.get_shape()))
            for tensor, each in slices.items()
        }


def read_headers(folder: Path, name: str) -> dict[str, dict[str, Tensor]]:
    """Read which tensors each file holds: file -> tensor -> type and shape.

    Args:
        folder: where the files are.
        name: a safetensors file, or an index of such files (`*.index.json`).

    Raises:
        PackageError: see `read_header`; or the index and its files disagree.
    """
    if not name.endswith(".json"):
        return {name: read_header(folder, name)}
    weight_map = checked_shards(read_json(folder, name, limit=limits.INDEX_BYTES))
    shards = {shard: read_header(folder, shard) for shard in sorted(set(weight_map.values()))}
    held = sorted((tensor, shard) for shard, tensors in shards.items() for tensor in tensors)
    if held != sorted(weight_map.items()):
        raise PackageError(
            f"{name} and the shards disagree about which tensors are where",
            expected="every tensor in the shard that the index names, and nowhere else",
        )
    return shards


def read_weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """Read tensors, on the CPU: of a safetensors file, or of all files that an index names (`*.index.json`).

    Args:
        folder: a private copy (see `stage`), whose files were bounded when they were copied. The tensors are views of
            these files, which may be removed and must not be written to.
        name: the file.

    Raises:
        PackageError: see `read_headers`.
    """
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = {}
    with as_ours(lambda gist: PackageError(f"{name} cannot be read: {gist}", expected="a safetensors file")):
        for file in read_headers(folder, name):
            found |= load_file(folder / file)
    return found


def package_weights(folder: Path, names: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    """Return which tensors each weight file of a package holds: file -> tensor -> type and shape.

    Raises:
        PackageError: no weights, or only a pickle; or what `read_headers` raises.
    """
    for name in (layout.WEIGHTS, layout.WEIGHTS_INDEX):  # in transformers' order
        if name in names:
            return read_headers(folder, name)
    pickles = [name for name in names if layout.kind_of(name) == "pickle"]
    raise PackageError(
        f"{layout.WEIGHTS} is not in {folder}; pickles, which were not opened: {pickles[:5]}",
        expected=f"{layout.WEIGHTS}, or shards and {layout.WEIGHTS_INDEX}",
        next_step=f"gpt2-value convert FOLDER OUT reads pickles without running them; where there are none, {AGAIN}",
    )


def check_tensors(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Tensor | None:
    """Compare a package's tensors with what its config calls for; return the head's weight, or None if there is none.

    Its shape is `[1, n_embd]` where the head gives one value per token. It is `()` where the config says no projection:
    the value is then the hidden state, and the head has no weights.

    Raises:
        PackageError: tensors that are missing or unknown, or of another shape or type.
    """
    expected, head = expected_shapes(config), f"{layout.HEAD_PREFIX}summary.weight"
    has_head = head not in expected or any(name.startswith(layout.HEAD_PREFIX) for name in tensors)
    if not has_head:  # which is reported, and not refused
        expected = {name: shape for name, shape in expected.items() if not name.startswith(layout.HEAD_PREFIX)}
    found = {name: tensor.shape if tensor.dtype in DTYPE else tensor.dtype for name, tensor in tensors.items()}
    if wrong := sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name)):
        raise PackageError(
            f"{len(wrong)} tensors differ from what config.json calls for: {wrong[:5]}; the first is "
            f"{found.get(wrong[0], 'missing')}",
            expected=f"{expected.get(wrong[0], 'no such tensor')}, in one of {sorted(DTYPE)}",
        )
    return tensors.get(head, Tensor("", ())) if has_head else None


def build_model(config: GPT2ValueConfig, tensors: Mapping[str, torch.Tensor]) -> GPT2ValueModel:
    """Return a model of this installed version's class that holds exactly these tensors, in eval mode.

    The tensors become its parameters: they are not copied, and keep their dtypes and device. No random number is drawn.

    Args:
        config: of the model.
        tensors: every tensor of the model's state dict; `lm_head.weight` may be left out where it is tied.

    Raises:
        PackageError: a configuration that the model cannot have, or tensors that are missing, unknown, or of another
            shape.
    """
    import torch

    from modeling_gpt2_value import GPT2ValueModel

    with as_ours(
        lambda gist: PackageError(
            f"these weights and this config are not one model: {gist}",
            expected="the tensors that config.json calls for",
        )
    ):
        with torch.device("meta"):
            model = GPT2ValueModel(config)
        state = dict(tensors)
        device = state["transformer.wte.weight"].device
        if model.config.tie_word_embeddings:
            state["lm_head.weight"] = state["transformer.wte.weight"]
        model.load_state_dict(state, assign=True)
        model.tie_weights()
        for name, buffer in list(model.named_buffers()):  # causal masks, which transformers 4 and 5.0 keep beside them
            owner, _, attribute = name.rpartition(".")
            mask = torch.ones(buffer.shape, dtype=torch.bool, device=device).tril() if buffer.dim() else None
            value = torch.tensor(-1e4, device=device) if mask is None else mask
            setattr(model.get_submodule(owner), attribute, value)
    return model.eval()


def not_finite(weights: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the names of the tensors that hold NaN or infinity."""
    return [name for name, tensor in weights.items() if not tensor.isfinite().all()]
