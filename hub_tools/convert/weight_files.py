"""Read other people's weight files without running anything that is in them.

Imports the standard library, torch, safetensors, `reading`, `layout` and `errors`. safetensors files hold
numbers; pickles are read by `torch.load(weights_only=True)`, which knows tensors and plain containers and
refuses all else (https://docs.pytorch.org/docs/stable/notes/serialization.html#weights-only).
"""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..errors import AmbiguousSourceError, CorruptFileError, UnsafePickleError
from ..files import file_in, read_json
from ..layout import WEIGHTS, WEIGHTS_INDEX

PICKLED_WEIGHTS = "pytorch_model.bin"

# What transformers writes for a whole model: one file, or an index that names the shards.
MODEL_WEIGHTS = (WEIGHTS, WEIGHTS_INDEX, PICKLED_WEIGHTS, "pytorch_model.bin.index.json")

# Where a value head lies when it is not among the model's weights: TRL's name for it beside an adapter, then
# LLaMA-Factory's.
HEAD_WEIGHTS = (PICKLED_WEIGHTS, "value_head.safetensors", "value_head.bin")

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")

FETCH_AGAIN = "fetch the file again; if it stays so, ask whoever made it"


def only_one(folder: Path, names: tuple[str, ...]) -> Path | None:
    """The one file of `names` that lies in `folder`, None where there is none.

    Raises:
        AmbiguousSourceError: there are several, and nothing says which of them was saved last.
    """
    found = [folder / name for name in names if (folder / name).is_file()]
    if len(found) > 1:
        raise AmbiguousSourceError(
            f"{folder} holds {' and '.join(path.name for path in found)}, and they may differ",
            expected="one of them",
            next_step="move the others away, or pass the file of a whole model itself as the source",
        )
    return found[0] if found else None


def read_state_dict(file: Path) -> dict[str, torch.Tensor]:
    """The tensors, on the CPU, in a `.safetensors` file, in a pickle, or in the shards of an `.index.json`.

    Args:
        file: an existing file. Every name but `*.safetensors` and `*.json` is read as a pickle. The tensors
            may be views of the file: read them before it is written to.

    Raises:
        UnsafePickleError: the pickle asks for more than tensors and plain containers. Nothing of it ran.
        CorruptFileError: the file is damaged, or holds something else than a state dict.
        MissingFileError, UnsafeFileError: an index names a shard that is not there, or that is not beside it.
    """
    if file.suffix == ".json":
        return _read_shards(file)
    state = _read_safetensors(file) if file.suffix == ".safetensors" else _read_pickle(file)
    for key, tensor in state.items():
        _check_entry(file, key, tensor)
    return state


def _read_shards(index: Path) -> dict[str, torch.Tensor]:
    weight_map = read_json(index.parent, index.name).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptFileError(f"{index} has no weight_map", next_step=FETCH_AGAIN)
    state: dict[str, torch.Tensor] = {}
    for name in sorted({str(name) for name in weight_map.values()}):
        # An index is somebody else's file: it may point at its neighbours and nowhere else.
        shard = file_in(index.parent, name)
        if shard.suffix == ".json":
            raise CorruptFileError(f"{index} names {name} as a weight file", next_step=FETCH_AGAIN)
        tensors = read_state_dict(shard)
        odd = sorted({key for key, where in weight_map.items() if where == name} ^ set(tensors))
        if odd:
            raise CorruptFileError(
                f"{index} and {name} disagree about which weights {name} holds: {listed(odd)}",
                next_step="fetch both again, from the same commit",
            )
        state.update(tensors)
    return state


def _read_safetensors(file: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as err:
        raise CorruptFileError(f"{file} cannot be read as safetensors: {err}", next_step=FETCH_AGAIN) from err


def _read_pickle(file: Path) -> dict[str, torch.Tensor]:
    is_zip = zipfile.is_zipfile(file)
    try:
        if is_zip:
            _refuse_compressed(file)
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as err:
        raise UnsafePickleError(
            f"{file} is a pickle that asks for more than tensors: {_gist(err)}. Nothing of it was run",
            expected="a state dict of plain tensors",
            next_step="if you know its maker, load it in the library that wrote it, save model.state_dict() "
            "as safetensors, and convert that",
        ) from err
    except (
        # torch's reader raises all of these on damaged files, depending on where the damage lies.
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        zipfile.BadZipFile,
    ) as err:
        raise CorruptFileError(f"{file} cannot be read as a checkpoint: {_gist(err)}", next_step=FETCH_AGAIN) from err
    if not isinstance(state, dict):
        raise CorruptFileError(
            f"{file} holds a {type(state).__name__}",
            expected="a state dict",
            next_step="save model.state_dict() in the library that wrote the file, and convert that",
        )
    return dict(state)


def _refuse_compressed(file: Path) -> None:
    """torch.save never compresses: an archive smaller than its content was made to fill the memory."""
    with zipfile.ZipFile(file) as archive:
        packed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise CorruptFileError(
            f"{file} holds compressed records: {listed(packed)}",
            expected="the uncompressed archive that torch.save writes",
            next_step=FETCH_AGAIN,
        )


def _check_entry(file: Path, key: object, tensor: object) -> None:
    plain = isinstance(tensor, torch.Tensor) and type(tensor) in (torch.Tensor, torch.nn.Parameter)
    if not isinstance(key, str) or not isinstance(tensor, torch.Tensor) or not plain:
        raise CorruptFileError(
            f"{file} holds {key!r}: {type(tensor).__name__}",
            expected="names with plain tensors",
            next_step="where the state dict lies inside (under 'state_dict', 'model', ...), save that part "
            "alone and convert it",
        )
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        raise CorruptFileError(
            f"{file} holds {key} as a sparse, quantised or empty tensor",
            expected="dense numbers",
            next_step="save the model dense, in the library that wrote it, and convert that",
        )


def listed(names: list[str], most: int = 8) -> str:
    """`names` as a sentence lists them, the rest counted."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def _gist(err: BaseException) -> str:
    """The sentence of an error that says what was wrong; torch's own run to a page of advice."""
    _, _, cause = str(err).partition("WeightsUnpickler error: ")
    lines = (cause or str(err)).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(err).__name__
