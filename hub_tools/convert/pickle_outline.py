"""Find the tensors in a file that `torch.save` wrote, without torch and without running what the pickle asks for.

Run as a script, in a process of its own with limited memory and time (see `limited_process`). It reads the file from
its stdin and prints one JSON object: `{"tensors": {name: [dtype, shape, offset]}}`, where `offset` is the byte at which
the tensor's numbers begin, or `{"refused": KIND, "found": ...}`. It imports only the standard library, so it starts in
a few hundredths of a second.

It reads both formats of torch: the zip archive (since 1.6), and the older stream of pickles. Instead of functions of
torch, the unpickler calls the stand-ins in `GLOBALS`, which only record their arguments. It refuses any other name. The
list is shorter than that of `torch.load(weights_only=True)`. Format: `torch/serialization.py`, `_save` and
`_legacy_save`.
"""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from typing import Any, BinaryIO

PICKLE_LIMIT = 16 << 20  # bytes of the pickle that names the tensors; GPT-2 XL's has 100 kB
MOST_TENSORS, LONGEST_NAME, MOST_DIMENSIONS, LARGEST = 100_000, 512, 8, 1 << 48

# Storage class -> (dtype as torch names it, bytes for each number)
STORAGES = {
    "FloatStorage": ("float32", 4),
    "HalfStorage": ("float16", 2),
    "BFloat16Storage": ("bfloat16", 2),
    "DoubleStorage": ("float64", 8),
    "LongStorage": ("int64", 8),
    "IntStorage": ("int32", 4),
    "ShortStorage": ("int16", 2),
    "CharStorage": ("int8", 1),
    "ByteStorage": ("uint8", 1),
    "BoolStorage": ("bool", 1),
}
# The first two objects in a file of torch before 1.6; see `torch/serialization.py`.
OLD_MAGIC, OLD_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001


# What the standard library's unpickler and zip reader raise for random bytes.
NOISE = (
    pickle.PickleError,
    zipfile.BadZipFile,
    struct.error,
    ArithmeticError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


class Refused(Exception):
    """`kind` is "unsafe" (the pickle asks for more than tensors), "corrupt" or "nested" (not a state dict)."""

    def __init__(self, kind: str, found: str) -> None:
        super().__init__(found)
        self.kind, self.found = kind, found


class StateDict(OrderedDict[Any, Any]):
    """An OrderedDict; torch gives it an attribute `_metadata`, of no use here."""

    def __setstate__(self, state: object) -> None:
        pass


class Storage:
    """What a persistent id says: `numel` numbers of type `dtype` under the name `key`."""

    __slots__ = ("dtype", "item", "key", "numel")

    def __init__(self, dtype: str, item: int, key: str, numel: int) -> None:
        self.dtype, self.item, self.key, self.numel = dtype, item, key, numel


class Tensor:
    __slots__ = ("shape", "start", "storage")

    def __init__(self, storage: Storage, start: int, shape: tuple[int, ...]) -> None:
        self.storage, self.start, self.shape = storage, start, shape


def tensor_v2(
    storage: object, start: object, shape: object, strides: object, grad: object, hooks: object, metadata: object = None
) -> Tensor:
    """Stands in for `torch._utils._rebuild_tensor_v2`, whose last three arguments do not change the numbers."""
    if type(grad) is not bool or not all(value is None or isinstance(value, dict) for value in (hooks, metadata)):
        raise Refused("corrupt", "a tensor with other arguments than torch writes")
    return tensor(storage, start, shape, strides)


def tensor(storage: object, start: object, shape: object, strides: object) -> Tensor:
    """Stands in for `torch._utils._rebuild_tensor`."""
    if not isinstance(storage, Storage) or not isinstance(start, int) or not whole(start):
        raise Refused("corrupt", "a tensor without numbers")
    if not isinstance(shape, tuple) or len(shape) > MOST_DIMENSIONS or not all(map(whole, shape)):
        raise Refused("corrupt", f"a tensor of shape {shape!r:.80}")
    if not isinstance(strides, tuple) or len(strides) != len(shape):
        raise Refused("corrupt", f"a tensor of shape {list(shape)} with strides {strides!r:.80}")
    step = 1
    for length, stride in zip(reversed(shape), reversed(strides), strict=True):
        if length > 1 and stride != step:
            raise Refused("corrupt", f"a tensor of shape {list(shape)} with strides {strides!r:.80}: not contiguous")
        step *= length
    if start + step > storage.numel:  # step is the number of elements now
        raise Refused("corrupt", f"a tensor of shape {list(shape)} that reaches beyond its {storage.numel} numbers")
    return Tensor(storage, start, shape)


def parameter(data: object, grad: object, hooks: object) -> object:
    """Stands in for `torch._utils._rebuild_parameter`."""
    if type(grad) is not bool or not (hooks is None or isinstance(hooks, dict)):
        raise Refused("corrupt", "a parameter with other arguments than torch writes")
    return data


def whole(number: object) -> bool:
    return type(number) is int and 0 <= number < LARGEST


GLOBALS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): StateDict,
    ("torch._utils", "_rebuild_tensor"): tensor,  # before torch 0.4
    ("torch._utils", "_rebuild_tensor_v2"): tensor_v2,
    ("torch._utils", "_rebuild_parameter"): parameter,
    **{("torch", name): name for name in STORAGES},
}


class Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in GLOBALS:
            raise Refused("unsafe", f"{module}.{name}"[:200])
        return GLOBALS[module, name]

    def persistent_load(self, pid: object) -> Storage:
        if isinstance(pid, tuple) and len(pid) in (5, 6) and pid[0] == "storage":
            _, storage_class, key, _, numel, *view = pid
            named = isinstance(storage_class, str) and storage_class in STORAGES and isinstance(key, str)
            if named and whole(numel) and view in ([], [None]):
                return Storage(*STORAGES[storage_class], key, numel)
        raise Refused("corrupt", f"a storage {pid!r:.120}")


def outline(file: BinaryIO) -> dict[str, list[Any]]:
    """The tensors of an open file: name -> dtype, shape, and the byte at which its numbers begin."""
    size = os.fstat(file.fileno()).st_size
    magic = file.read(4)
    file.seek(0)
    state, starts = read_archive(file, size) if magic == b"PK\x03\x04" else read_stream(file, size)
    if not isinstance(state, dict):
        raise Refused("nested", f"a {kind_of(state)}")
    if len(state) > MOST_TENSORS:
        raise Refused("corrupt", f"{len(state)} tensors")
    found = {}
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor) or len(name) > LONGEST_NAME:
            raise Refused("nested", f"{name!r:.120}: {kind_of(value)}")
        storage = value.storage
        start = starts.get(storage.key)
        if start is None or start[1] != storage.numel * storage.item:
            raise Refused("corrupt", f"{name!r} without its numbers, or with another count of them")
        found[name] = [storage.dtype, value.shape, start[0] + value.start * storage.item]
    return found


def kind_of(value: object) -> str:
    return "OrderedDict" if isinstance(value, StateDict) else type(value).__name__


def read_archive(file: BinaryIO, size: int) -> tuple[object, dict[str, tuple[int, int]]]:
    """The pickle in a zip archive, and for each storage its first byte in the file and its length."""
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        # torch.save never compresses: an archive smaller than its content was made to fill the memory
        packed = [
            n for n, e in entries.items() if e.compress_type != zipfile.ZIP_STORED or e.compress_size != e.file_size
        ]
        if packed:
            raise Refused("corrupt", f"compressed records: {', '.join(packed[:8])!r:.200}")
        if len(entries) != len(archive.infolist()):
            raise Refused("corrupt", "two records of one name")
        roots = [name.removesuffix("/data.pkl") for name in entries if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise Refused("corrupt", "a zip archive that torch.save did not write" if not roots else "two pickles")
        root = roots[0]
        pickled = entries[f"{root}/data.pkl"]
        if pickled.file_size > PICKLE_LIMIT:
            raise Refused("corrupt", f"a pickle of {pickled.file_size:,} bytes")
        order = entries.get(f"{root}/byteorder")
        if order is not None and (order.file_size > 6 or archive.read(order) != b"little"):
            raise Refused("corrupt", "numbers that are not in little-endian order")
        with archive.open(pickled) as stream:
            state = Unpickler(stream).load()
    starts = {}
    for name, entry in entries.items():
        if name.startswith(f"{root}/data/"):
            file.seek(entry.header_offset)
            header = file.read(30)
            if len(header) < 30 or header[:4] != b"PK\x03\x04":
                raise Refused("corrupt", f"the record {name!r:.120} without its header")
            start = entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
            if start + entry.file_size > size:
                raise Refused("corrupt", f"the record {name!r:.120}, which ends beyond the file")
            starts[name.removeprefix(f"{root}/data/")] = (start, entry.file_size)
    return state, starts


def read_stream(file: BinaryIO, size: int) -> tuple[object, dict[str, tuple[int, int]]]:
    """As `read_archive`, for the older format: five pickles in a row, then each storage's count and numbers."""
    first = Unpickler(file).load()
    if first != OLD_MAGIC or type(first) is not int:
        raise Refused("nested", f"a {kind_of(first)}")
    if Unpickler(file).load() != OLD_PROTOCOL:
        raise Refused("corrupt", "another version of torch's format")
    system = Unpickler(file).load()
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise Refused("corrupt", "numbers that are not in little-endian order")
    seen: dict[str, Storage] = {}

    class Noting(Unpickler):
        def persistent_load(self, pid: object) -> Storage:
            storage = super().persistent_load(pid)
            return seen.setdefault(storage.key, storage)

    state, keys = Noting(file).load(), Unpickler(file).load()
    if not isinstance(keys, list):
        raise Refused("corrupt", "no list of its storages")
    starts: dict[str, tuple[int, int]] = {}
    for key in keys:
        if not isinstance(key, str) or key not in seen or key in starts:
            raise Refused("corrupt", f"an unknown storage {key!r:.80}")
        count = file.read(8)
        length = seen[key].numel * seen[key].item
        if len(count) < 8 or struct.unpack("<q", count)[0] != seen[key].numel or file.tell() + length > size:
            raise Refused("corrupt", f"the storage {key!r:.80}, which is not whole")
        starts[key] = (file.tell(), length)
        file.seek(length, os.SEEK_CUR)
    return state, starts


def main() -> None:
    try:
        with open(0, "rb") as file:
            answer: dict[str, Any] = {"tensors": outline(file)}
    except Refused as refusal:
        answer = {"refused": refusal.kind, "found": refusal.found}
    except NOISE as error:
        answer = {"refused": "corrupt", "found": f"{type(error).__name__}: {error}"[:300]}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
