"""Measure what a model computes on the probe. Run as a script, load a package in a fresh interpreter and measure it.

Imports only the standard library, and torch and transformers inside the functions. `verify.py` runs this file by its
path in an isolated interpreter, which can import neither a checkout nor an installed copy of this project.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from typing import Any


def measure(model: Any, token_ids: list[int], logit_ids: list[int]) -> dict[str, Any]:
    """Return `logits`, `logsumexp` and `values` for a `Record`, from one forward pass.

    The model must be in float32, in eval mode and on the CPU.
    """
    import torch

    with torch.no_grad():
        output = model(input_ids=torch.tensor([token_ids]), use_cache=False, return_dict=True)
    logits, values = output.logits[0].float(), output.value[0].float()  # (T, vocab), (T) or (T, n_embd)
    return {
        "logits": logits[:, logit_ids].tolist(),
        "logsumexp": torch.logsumexp(logits, dim=-1).tolist(),
        "values": values.reshape(len(token_ids), -1)[:, :64].tolist(),
    }


def load_and_measure(job: dict[str, Any]) -> dict[str, Any]:
    """Load `job["folder"]` by the one line that a user types, and measure it."""
    gc.disable()  # garbage collection would take an eighth of the time of the imports
    import torch
    import transformers

    gc.enable()
    started = time.perf_counter()
    model, info = transformers.AutoModel.from_pretrained(
        job["folder"],
        trust_remote_code=True,
        local_files_only=True,
        use_safetensors=True,
        dtype=torch.float32,
        output_loading_info=True,
    )
    loaded = time.perf_counter()
    result = measure(model.eval(), job["token_ids"], job["logit_ids"])
    result["load_seconds"], result["forward_seconds"] = loaded - started, time.perf_counter() - loaded
    # transformers 4.57 gives lists, 5 gives sets; an entry is a key, or a key and two shapes
    result["loading_info"] = {name: sorted(map(str, found)) for name, found in info.items() if found}
    result["not_finite"] = [name for name, weight in model.state_dict().items() if not weight.isfinite().all()]
    result["class"] = type(model).__name__
    result["module"] = type(model).__module__
    result["tokenizer_ids"] = None
    if job["text"] is not None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            job["folder"], trust_remote_code=True, local_files_only=True
        )
        result["tokenizer_ids"] = tokenizer(job["text"])["input_ids"]
    result["versions"] = {"torch": torch.__version__, "transformers": transformers.__version__}
    result["peak_memory_bytes"] = peak_memory_bytes()
    return result


def peak_memory_bytes() -> int | None:
    """Return the largest resident set of this process so far; None where the system does not say (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main() -> None:
    job = json.load(sys.stdin)
    for name in job["hidden_modules"]:  # an installed copy of this project must not stand in for the package's code
        sys.modules[name] = None  # type: ignore[assignment]
    # an isolated interpreter leaves out PYTHONPATH and the user's own site-packages, where torch may live
    sys.path.extend(path for path in job["search_path"] if path not in sys.path)
    result = load_and_measure(job)
    with open(job["result"], "w", encoding="utf-8") as file:
        json.dump(result, file)


if __name__ == "__main__":
    main()
