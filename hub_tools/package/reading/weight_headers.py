"""Read the headers of a package's weights: which files hold which tensors, and whether the config calls for them.

Imports only the standard library and of hub_tools `errors`, `files`, `layout`, `limits`, `allowed_fields` and
`config_json`. The numbers of the weights are not read, and pickles are not opened.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ... import layout, limits
from ...errors import PackageError
from ...files import AGAIN, Tensor, read_json, read_safetensors_header
from . import allowed_fields
from .config_json import check_memory, expected_shapes

FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # safetensors' name -> torch's


@dataclass(frozen=True)
class Head:
    """The value head's projection: `[1, n_embd]` gives one value per token.

    The shape is `()` if the config says no projection. The value is then the hidden state, and the head has no weights.
    """

    shape: tuple[int, ...]
    dtype: str

    def describe(self) -> str:
        return f"{list(self.shape)} {self.dtype}" if self.shape else "no projection: the value is the hidden state"


def read_weights(folder: Path, names: Sequence[str], pickles: tuple[str, ...]) -> dict[str, dict[str, Tensor]]:
    """Return the weight files that a loader reads, and the tensors that each holds."""
    if layout.WEIGHTS in names and layout.WEIGHTS_INDEX in names:
        raise PackageError(
            f"both {layout.WEIGHTS} and {layout.WEIGHTS_INDEX} are there, which may be two different models",
            expected="one of them",
            next_step="remove the stale one, or write the package again with hub_tools.save_package",
        )
    if layout.WEIGHTS in names:
        return {layout.WEIGHTS: read_safetensors_header(folder, layout.WEIGHTS)}
    if layout.WEIGHTS_INDEX not in names:
        if pickles:
            raise PackageError(
                f"the only weights are pickles, which were not opened: {', '.join(map(repr, pickles))}",
                expected=f"{layout.WEIGHTS}",
                next_step="gpt2-value create --base FOLDER OUT reads them with weights_only=True",
            )
        raise PackageError(
            f"{layout.WEIGHTS} is not in {folder}",
            expected=f"{layout.WEIGHTS}, or shards and {layout.WEIGHTS_INDEX}",
            next_step=AGAIN,
        )
    index = read_json(folder, layout.WEIGHTS_INDEX, limit=limits.INDEX_BYTES)
    weight_map = allowed_fields.reduce(layout.WEIGHTS_INDEX, index)["weight_map"]
    shards = {name: read_safetensors_header(folder, name) for name in sorted(set(weight_map.values()))}
    held = {tensor: shard for shard, tensors in shards.items() for tensor in tensors}
    if held != weight_map or sum(map(len, shards.values())) != len(held):
        wrong = sorted(set(held.items()) ^ set(weight_map.items())) or [("a tensor", "two shards")]
        raise PackageError(
            f"{layout.WEIGHTS_INDEX} and the shards disagree about {wrong[0][0]!r} ({wrong[0][1]})",
            expected="every tensor in the shard that the index names, and nowhere else",
            next_step=AGAIN,
        )
    return shards


def check_tensors(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Head | None:
    """Compare the tensors with what `config.json` calls for; return the head, or None if there is none."""
    # Bounds the loop over layers in `expected_shapes`: each layer has more than one tensor.
    if config["n_layer"] > len(tensors):
        raise PackageError(
            f"config.json says {config['n_layer']:,} layers; the weights are {len(tensors):,} tensors",
            expected="12 tensors or more for each layer",
            next_step=AGAIN,
        )
    check_memory(config)
    expected = expected_shapes(config)
    head_names = {name for name in expected if name.startswith(layout.HEAD_PREFIX)}
    unknown = sorted(set(tensors) - set(expected))
    missing = sorted(set(expected) - set(tensors))
    if head_names and not any(name.startswith(layout.HEAD_PREFIX) for name in tensors):
        missing = [name for name in missing if name not in head_names]  # no head at all is reported, not refused
    if unknown or missing:
        what = f"unknown tensors: {unknown[:5]}" if unknown else f"missing tensors: {missing[:5]}"
        raise PackageError(
            f"{what} ({len(unknown)} unknown, {len(missing)} missing)",
            expected="exactly the tensors that config.json calls for",
            next_step=AGAIN,
        )
    for name, tensor in tensors.items():
        if tensor.shape != expected[name] or tensor.dtype not in FLOATS:
            raise PackageError(
                f"tensor {name!r} is {tensor.dtype} of shape {list(tensor.shape)}",
                expected=f"shape {list(expected[name])}, in one of {sorted(FLOATS)}",
                next_step=AGAIN,
            )
    if not head_names:
        return Head((), "")
    head = tensors.get(layout.HEAD_PREFIX + "summary.weight")
    return Head(head.shape, FLOATS[head.dtype]) if head is not None else None
