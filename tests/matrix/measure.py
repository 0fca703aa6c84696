"""In one environment, without the checkout: load a package, print its numbers, and perhaps save it again."""

import json
import sys

import torch
from transformers import AutoModel, AutoModelForCausalLM

torch.set_num_threads(1)


def numbers(model):
    """What must be the same everywhere: logits, values, rollout, rescored rollout, greedy generation."""
    ids = torch.arange(24).view(2, 12) * 11 % 300
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    output = model(ids, attention_mask=mask)
    drawn = model.rollout(
        ids,
        attention_mask=mask,
        max_new_tokens=16,
        top_p=0.9,
        temperature=0.8,
        eos_token_id=[1, 2, 3],
        generator=torch.Generator().manual_seed(0),
    )
    greedy = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0)
    return {
        "logits": output.logits[mask.bool()].flatten().tolist(),
        "values": output.value[mask.bool()].tolist(),
        "logprobs": drawn.logprobs.flatten().tolist(),
        "rescored": model.rescore(drawn).logprobs.flatten().tolist(),
        "sampled": drawn.responses.tolist(),
        "greedy": greedy.tolist(),
    }


def report(found):
    print(json.dumps(found))


def main():
    package, *again = sys.argv[1:]
    model, info = AutoModel.from_pretrained(package, trust_remote_code=True, output_loading_info=True)
    if info["missing_keys"] or info["unexpected_keys"] or not model.config.detach_value_head:
        raise SystemExit(f"{package} did not load whole: {info}, detached={model.config.detach_value_head}")
    found = numbers(model)
    if numbers(AutoModelForCausalLM.from_pretrained(package, trust_remote_code=True)) != found:
        raise SystemExit(f"{package}: AutoModelForCausalLM and AutoModel give different numbers")
    for folder in again:
        model.save_pretrained(folder)
    report(found)


if __name__ == "__main__":
    main()
