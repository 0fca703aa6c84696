"""Write the tensors of files of `torch.save` as safetensors, in a process with limited memory and time.

    python unpickle.py FILES -- PLACES OF PACKAGES

Run as a script, by `pickles.py`, on copies: the safetensors replace the file, under its name. The last line
on stderr says what it refuses. `torch.load(weights_only=True)` builds tensors and plain containers, and calls nothing
else, whatever a pickle asks for. Imports the standard library, torch and safetensors.
"""

from __future__ import annotations

import os
import pickle
import re
import sys
import zipfile

TENSORS_PER_FILE = 2  # a tied lm_head is stored once; a larger factor is an attack on the memory


def unpickle(source: str) -> str:
    """Rewrite `source` as safetensors, or return what is wrong with it. Whatever torch raises ends the process."""
    import torch
    from safetensors.torch import save_file

    if zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as archive:
            damaged = archive.testzip()  # torch reads past checksums
        if damaged is not None:
            return f"bytes that are not as they were written: the checksum of {damaged[:120]!r} is another"
    try:
        state = torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's message is long advice on how to run it anyway, with the finding in the middle
        found = re.search(r"WeightsUnpickler error: (.{1,200}?)(?:\. | \n|\n|$)", str(error))
        gist = found[1] if found else "no state dict"
        return f"a pickle that asks for more than tensors and plain containers ({gist}). Nothing of it was run"
    if not isinstance(state, dict):
        return f"a {type(state).__name__} and no state dict"
    for name, tensor in state.items():
        plain = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not isinstance(name, str) or not plain:
            return f"{str(name)[:120]!r}: a {type(tensor).__name__} that is no plain tensor"
    held, size = sum(tensor.nbytes for tensor in state.values()), os.path.getsize(source)
    if held > TENSORS_PER_FILE * size:
        return f"tensors of {held:,} bytes in a file of {size:,}: each tensor has to lie in the file for itself"
    save_file({name: tensor.detach().contiguous().clone() for name, tensor in state.items()}, source)
    return ""


if __name__ == "__main__":
    files, places = sys.argv[1 : sys.argv.index("--")], sys.argv[sys.argv.index("--") + 1 :]
    sys.path += places  # where torch is, for an interpreter that is isolated
    for file in files:
        if refusal := unpickle(file):
            sys.exit(f"{os.path.basename(file)} holds {refusal}")
