"""The fields of a package's `config.json`: which values are allowed, and which tensors they call for.

Imports only the standard library, `errors`, `layout`, `limits` and `files`. The fields are those of GPT2Config:
https://huggingface.co/docs/transformers/model_doc/gpt2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ... import layout, limits
from ...errors import NotAPackageError, PackageError
from ...files import AGAIN

# In transformers 4, each layer has a causal mask of n_positions ** 2 bytes. This is the limit for all layers together
# (12 layers of 13,377 positions), because weights of a few kB can call for masks that fill the memory.
MASKS_LIMIT = limits.MASK_BYTES
# With these fields, transformers would not simply load these weights into this model.
REFUSED = (
    "quantization_config",  # other kernels, other weights
    "compression_config",
    "custom_pipelines",  # more code
    "attn_implementation",  # may name a kernel on the Hub, which is machine code
    "_attn_implementation",
    "_attn_implementation_internal",
    "experts_implementation",
    "_experts_implementation",
    "_experts_implementation_internal",
    "transformers_weights",  # the name of another file to load the weights from
    "fusion_config",  # another graph
    "distributed_config",
)


def check_config(config: dict[str, Any]) -> None:
    """Refuse a `config.json` that is unsafe to load from.

    Refused are the config of another kind of model, values that cannot be right, and fields that make a loader read
    other files or run other code.

    Raises:
        NotAPackageError, PackageError.
    """
    if config.get("model_type") != layout.MODEL_TYPE:
        raise NotAPackageError(
            f"config.json says model_type {str(config.get('model_type'))[:80]!r}",
            expected=repr(layout.MODEL_TYPE),
            next_step="make a package of a GPT-2 checkpoint: gpt2-value create --base FOLDER OUT",
        )
    auto_map = config.get("auto_map")
    if auto_map != layout.AUTO_MAP:
        raise PackageError(
            f"config.json has auto_map {str(auto_map)[:300]}",
            expected=f"{layout.AUTO_MAP}: the classes in the package itself",
            next_step="GPT2ValueModel.from_pretrained(FOLDER) loads it and runs none of its code; save that",
        )

    check_sizes(config)


def check_sizes(config: dict[str, Any]) -> None:
    """Refuse sizes that cannot be right, and fields by which a loader would read or run something else.

    Raises:
        PackageError.
    """

    def expect(name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise PackageError(
                f"config.json: {name!r} is {str(config.get(name))[:80]}", expected=expected, next_step=AGAIN
            )

    for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
        value = config.get(name)
        expect(name, type(value) is int and 0 < value < 1 << 31, "a positive whole number")
    expect("n_embd", config["n_embd"] % config["n_head"] == 0, f"a multiple of n_head = {config['n_head']}")
    inner = config.get("n_inner")
    expect(
        "n_inner",
        inner is None or (type(inner) is int and 0 < inner < 1 << 31),
        "a positive whole number, or null",
    )
    for name in ("tie_word_embeddings", "add_cross_attention", "summary_use_proj", "summary_proj_to_labels"):
        expect(name, type(config.get(name, True)) is bool, "true or false")
    # other names of the same fields, under which transformers would read them unchecked
    for alias in ("hidden_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers"):
        expect(alias, alias not in config, "GPT-2's own names: n_embd, n_positions, n_head, n_layer")
    # a large number would fill the memory, because transformers makes a name for each label
    expect("num_labels", type(config.get("num_labels", 1)) is int and config.get("num_labels", 1) == 1, "1")
    for name in REFUSED:
        expect(name, name not in config, "no such field in a value-head package")
    expect("pruned_heads", not config.get("pruned_heads"), "none: the weights have the shapes that the fields say")


def check_memory(config: Mapping[str, Any]) -> None:
    """Refuse a config from which a loader would allocate far more memory than the weights need.

    Raises:
        PackageError.
    """
    layers, most = config["n_layer"], math.isqrt(MASKS_LIMIT // config["n_layer"])
    if config["n_positions"] > most:
        raise PackageError(
            f"config.json: 'n_positions' is {config['n_positions']:,}",
            expected=f"at most {most:,} with {layers:,} layers: transformers 4 keeps a mask of its square in each",
            next_step=AGAIN,
        )


def tied(config: Mapping[str, Any]) -> bool:
    return bool(config.get("tie_word_embeddings", True))


def expected_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor that the fields of `config.json` call for.

    GPT-2 stores its matrices as `[in, out]` (transformers' Conv1D); the head is `[out, in]` (torch's Linear).
    """
    vocab, positions, n = config["vocab_size"], config["n_positions"], config["n_embd"]
    inner = config.get("n_inner") or 4 * n

    def conv(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (inputs, outputs), f"{name}.bias": (outputs,)}

    def norm(name: str) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (n,), f"{name}.bias": (n,)}

    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (vocab, n),
        "transformer.wpe.weight": (positions, n),
    }
    for i in range(config["n_layer"]):
        layer = f"transformer.h.{i}"
        shapes |= norm(f"{layer}.ln_1") | norm(f"{layer}.ln_2")
        shapes |= conv(f"{layer}.attn.c_attn", n, 3 * n) | conv(f"{layer}.attn.c_proj", n, n)
        shapes |= conv(f"{layer}.mlp.c_fc", n, inner) | conv(f"{layer}.mlp.c_proj", inner, n)
        if config.get("add_cross_attention", False):
            shapes |= norm(f"{layer}.ln_cross_attn") | conv(f"{layer}.crossattention.c_attn", n, 2 * n)
            shapes |= conv(f"{layer}.crossattention.q_attn", n, n) | conv(f"{layer}.crossattention.c_proj", n, n)
    shapes |= norm("transformer.ln_f")
    if not tied(config):
        shapes["lm_head.weight"] = (vocab, n)
    if config.get("summary_use_proj", True):
        outputs = 1 if config.get("summary_proj_to_labels", True) else n
        shapes |= {"v_head.summary.weight": (outputs, n), "v_head.summary.bias": (outputs,)}
    return shapes


def count_numbers(config: Mapping[str, Any]) -> int:
    """Return how many numbers all tensors of a package have together.

    One layer is counted and multiplied, so that a huge `n_layer` costs no time.
    """
    without, with_one = (
        sum(math.prod(shape) for shape in expected_shapes({**config, "n_layer": layers}).values()) for layers in (0, 1)
    )
    return without + config["n_layer"] * (with_one - without)
