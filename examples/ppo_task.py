"""What the demo of PPO gives to `gpt2_value.ppo`: film reviews as prompts, and a lexicon of sentiment as the reward.

Imports torch, vaderSentiment, the demo's grammar and small GPT-2, and the package's public names.
"""

import itertools
import os
from pathlib import Path
from typing import Any

import torch
from review_grammar import write_reviews
from torch import Tensor
from train_small_gpt2 import Recipe, small_gpt2
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from gpt2_value import rollout

REVIEWS = 1024  # of the grammar, whose openings are the prompts
ANALYZER = SentimentIntensityAnalyzer()


def vader(texts: list[str]) -> list[float]:
    """The compound score in [-1, 1] of a sentiment lexicon (Hutto and Gilbert, "VADER", ICWSM 2014)."""
    return [ANALYZER.polarity_scores(text)["compound"] for text in texts]


def demo_settings(recipe: Recipe | None = None) -> dict[str, Any]:
    """The settings of a run that are the demo's: the small GPT-2, trained at first use, prompts and reward."""
    base = small_gpt2(recipe).folder
    prompts = base.with_name("ppo-prompts.txt")
    if not prompts.exists():
        draft = Path(f"{prompts}.{os.getpid()}")
        lines = (review.text for review in itertools.islice(write_reviews(seed=1), REVIEWS))
        draft.write_text("\n".join(lines), encoding="utf-8")
        draft.replace(prompts)
    return {"base": str(base), "prompts": prompts, "cut_prompts": (2, 8), "reward": "ppo_task:vader"}


def write_texts(model: Any, tokenizer: Any, queries: list[Tensor], *, max_new_tokens: int, seed: int) -> list[str]:
    """Prompt and response of each row, without padding and end-of-text."""
    generator = torch.Generator(model.device).manual_seed(seed)
    ends = tokenizer.eos_token_id
    drawn = rollout(model, queries, max_new_tokens=max_new_tokens, eos_token_id=ends, generator=generator)
    rows = zip(drawn.sequences, drawn.attention_mask.bool(), strict=True)
    return [tokenizer.decode(tokens[mask], skip_special_tokens=True) for tokens, mask in rows]
