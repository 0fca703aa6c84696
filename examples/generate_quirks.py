"""What `generate()` does that a plain scoring pass does not know of, and what the audit says of it: a table.

    python examples/generate_quirks.py            # trains a small GPT-2 first, then takes a minute; prints Markdown

Each row is one setting: tokens of `generate()`, claimed as draws from the model, and tokens of `rollout` in its place.
Exits with 1 if a quirk was not caught, or a rollout did not pass.
"""

import copy
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout need not be installed

import torch
from train_small_gpt2 import Recipe, small_gpt2
from transformers import AutoTokenizer, GPT2LMHeadModel
from transformers.utils import logging

from gpt2_value import SamplerAudit, Sampling, audit_sampler, rollout

ROWS, T = 320, 24  # responses of at most 24 tokens
RECIPE = Recipe(steps=200)  # nothing here needs a model that writes well
# name -> what generate() is called with, and rollout in its place. All else is the model's own distribution.
Quirk = tuple[dict[str, Any], dict[str, Any]]
QUIRKS: dict[str, Quirk] = {
    "padding after the end is scored": ({}, {}),
    f"end suppressed: `min_new_tokens={T}`": ({"min_new_tokens": T}, {"min_new_tokens": T}),
    "hidden top-k: `top_k` not passed, so 50": ({"top_k": 50}, {"top_k": 50}),
    "`temperature=0.8`": ({"temperature": 0.8}, {"temperature": 0.8}),
    "`top_p=0.9`": ({"top_p": 0.9}, {"top_p": 0.9}),
    "`repetition_penalty=1.5`, as in a checkpoint's generation_config": ({"repetition_penalty": 1.5}, {}),
    "every second id in `suppress_tokens`": ({"suppress_tokens": list(range(2, 1024, 2))}, {}),
    "`no_repeat_ngram_size=1`": ({"no_repeat_ngram_size": 1}, {}),
    "+2 nats for 3 tokens, by `sequence_bias`": ({"sequence_bias": {(1,): 2.0, (12,): 2.0, (14,): 2.0}}, {}),
    "no `eval()`: dropout 0.1 while sampling": ({}, {}),
}


def audits(model: Any, prompts: torch.Tensor, end: int, name: str, quirk: Quirk) -> tuple[SamplerAudit, SamplerAudit]:
    """The audits of `generate()` and of `rollout`, after `prompts [B, P]`."""
    P, dropout = prompts.shape[1], "dropout" in name
    padding_is_drawn = "padding" in name
    always = {"do_sample": True, "top_k": 0, "max_new_tokens": T, "eos_token_id": end, "pad_token_id": end}
    model.train(dropout)
    mask = torch.ones_like(prompts)
    tokens = model.generate(prompts, attention_mask=mask, **{**always, **quirk[0]})
    claim = Sampling() if padding_is_drawn else Sampling(eos_token_id=end)
    told = audit_sampler(model, tokens, prompt_length=P, attention_mask=mask, sampling=claim)
    drawn = rollout(model, prompts, attention_mask=mask, max_new_tokens=T, eos_token_id=end, **quirk[1])
    return told, audit_sampler(model, drawn)


def main() -> None:
    """Print the table."""
    logging.set_verbosity_error()
    torch.manual_seed(0)
    checkpoint = small_gpt2(RECIPE).folder
    tokenizer, trained = AutoTokenizer.from_pretrained(checkpoint), GPT2LMHeadModel.from_pretrained(checkpoint)
    prompts = torch.tensor([tokenizer("The film was")["input_ids"]] * ROWS)
    print("| what `generate()` did | sampler | bias, nats a token | p | verdict |\n|---|---|---:|---:|---|")
    wrong = 0
    for name, quirk in QUIRKS.items():
        told, drawn = audits(copy.deepcopy(trained), prompts, int(tokenizer.eos_token_id), name, quirk)
        wrong += told.honest + (not drawn.honest)
        for sampler, shown, audit in (("`generate()`", name, told), ("`rollout`", "", drawn)):
            numbers = f"{audit.bias_nats:+.3f} ± {audit.standard_error:.3f} | {audit.p_value:.2g}"
            print(f"| {shown} | {sampler} | {numbers} | {audit.verdict} |", flush=True)
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
