"""Measure what a model computes on the probe. Run as a script, load a package in a fresh interpreter and measure it.

Imports only the standard library, and torch and transformers inside the functions. `verify.py` runs this file by its
path in an isolated interpreter, which can import neither a checkout nor an installed copy of this project.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def measure(model: Any, token_ids: list[int], logit_ids: list[int]) -> dict[str, Any]:
    """Return `logits`, `logsumexp` and `values` for a `Record`, from one forward pass.

    The model must be in float32, in eval mode and on the CPU.
    """
    import torch

    with torch.no_grad():
        output = model(input_ids=torch.tensor([token_ids]), use_cache=False, return_dict=True)
    logits, values = output.logits[0], output.value[0]  # (T, vocab), (T) or (T, n_embd)
    return {
        "logits": logits[:, logit_ids].tolist(),
        "logsumexp": torch.logsumexp(logits, dim=-1).tolist(),
        "values": values.reshape(len(token_ids), -1)[:, :64].tolist(),
    }


def load_and_measure(
    folder: str, token_ids: list[int], logit_ids: list[int], text: str | None = None
) -> dict[str, Any]:
    """Load a package by the one line that a user types, and measure it; tokenize the text, if there is one."""
    import torch
    import transformers

    model, info = transformers.AutoModel.from_pretrained(
        folder,
        trust_remote_code=True,
        local_files_only=True,
        use_safetensors=True,
        dtype=torch.float32,
        output_loading_info=True,
    )
    info["NaN or infinite"] = [name for name, weight in model.state_dict().items() if not weight.isfinite().all()]
    if wrong := {name: list(found)[:5] for name, found in info.items() if found}:
        raise SystemExit(f"its weights do not load strictly: {wrong}")
    tokenizer_ids = None
    if text is not None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True, local_files_only=True)
        tokenizer_ids = tokenizer(text)["input_ids"]
    return {**measure(model.eval(), token_ids, logit_ids), "tokenizer_ids": tokenizer_ids}


def main() -> None:
    job = json.load(sys.stdin)
    for name in job.pop("hidden_modules"):  # an installed copy of this project must not stand in for the package's code
        sys.modules[name] = None  # type: ignore[assignment]
    # an isolated interpreter leaves out PYTHONPATH and the user's own site-packages, where torch may live
    sys.path.extend(path for path in job.pop("search_path") if path not in sys.path)
    with open("result.json", "w", encoding="utf-8") as file:
        json.dump(load_and_measure(**job), file)


if __name__ == "__main__":
    main()
