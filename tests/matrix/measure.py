"""In one environment, without the checkout: load packages, print their numbers, and perhaps save each again.

python measure.py [--again FOLDER] PACKAGE...    # JSON: name of the package -> numbers
"""

import json
import sys
import warnings
from pathlib import Path

import torch
from transformers import AutoModel, AutoModelForCausalLM

torch.set_num_threads(1)  # in make.py, too: sums in another order differ by 1e-6


def numbers(model):
    """What must be the same everywhere: logits, values, rollout, rescored rollout, greedy generation."""
    ids = torch.arange(24).view(2, 12) * 11 % 300
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    output = model(ids, attention_mask=mask)
    settings = {"max_new_tokens": 16, "top_p": 0.9, "temperature": 0.8, "eos_token_id": [1, 2, 3]}
    drawn = model.rollout(ids, attention_mask=mask, generator=torch.Generator().manual_seed(0), **settings)
    greedy = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0)
    return {
        "logits": output.logits[mask.bool()].flatten().tolist(),
        "values": output.value[mask.bool()].tolist(),
        "logprobs": drawn.logprobs.flatten().tolist(),
        "rescored": model.rescore(drawn).logprobs.flatten().tolist(),
        "sampled": drawn.responses.tolist(),
        "greedy": greedy.tolist(),
    }


def measured(package, again):
    model, info = AutoModel.from_pretrained(package, trust_remote_code=True, output_loading_info=True)
    if info["missing_keys"] or info["unexpected_keys"]:
        raise SystemExit(f"{package} did not load whole: {info}")
    found = numbers(model)
    if numbers(AutoModelForCausalLM.from_pretrained(package, trust_remote_code=True)) != found:
        raise SystemExit(f"{package}: AutoModelForCausalLM and AutoModel give different numbers")
    if again:
        model.save_pretrained(again / package.name)
    return found


def main():
    warnings.simplefilter("error", FutureWarning)
    again, packages = None, sys.argv[1:]
    if packages[0] == "--again":
        again, packages = Path(packages[1]), packages[2:]
    print(json.dumps({Path(package).name: measured(Path(package), again) for package in packages}))


if __name__ == "__main__":
    main()
