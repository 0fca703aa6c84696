"""Train a GPT-2 of about a million parameters on the grammar's reviews, once, and keep it in the user's cache.

Imports torch, transformers, tokenizers, tqdm and the grammar. The result is a checkpoint laid out like the published
`gpt2` (a plain GPT2LMHeadModel and its byte-level BPE), so everything that reads that one reads this one.
"""

import contextlib
import hashlib
import itertools
import json
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import review_grammar
import torch
from tokenizers import ByteLevelBPETokenizer
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel

END_OF_TEXT = "<|endoftext|>"
IGNORED = -100  # a label that transformers' language-model loss skips


@dataclass(frozen=True)
class Recipe:
    """What decides the weights, beside the text of this file and of the grammar.

    GPT-2's initial standard deviation, 0.02, suits a width of 768. At 176 it makes attention so even at the start that
    a run this short never learns to look back at the stance: 0.06 does.
    """

    seed: int = 0
    threads: int = 2  # on any machine: with more, floats are added in another order and the weights differ
    vocab_size: int = 1024
    n_positions: int = 256
    n_embd: int = 176
    n_layer: int = 2
    n_head: int = 4
    initializer_range: float = 0.06
    steps: int = 900
    batch_size: int = 16  # reviews
    learning_rate: float = 3e-3

    def fingerprint(self) -> str:
        """16 hexadecimal digits that change whenever the code or a setting behind the weights does."""
        sources = b"".join(Path(file).read_bytes() for file in (__file__, review_grammar.__file__))
        return hashlib.sha256(sources + repr(self).encode()).hexdigest()[:16]


def cached_checkpoint(recipe: Recipe) -> Path:
    """Where this recipe's checkpoint is, or will be: under `XDG_CACHE_HOME`, else `~/.cache`."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "gpt2-value" / f"small-gpt2-{recipe.fingerprint()}"


def small_gpt2(recipe: Recipe) -> Path:
    """The recipe's checkpoint folder, trained first if it is not in the cache.

    The folder appears in one step, so a run that is interrupted leaves nothing that looks like a checkpoint.

    Raises:
        OSError: the cache cannot be written.
    """
    folder = cached_checkpoint(recipe)
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".training-", dir=folder.parent))
    try:
        train(recipe, draft)
        with contextlib.suppress(FileExistsError, OSError) if folder.is_dir() else contextlib.nullcontext():
            draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def train(recipe: Recipe, folder: Path) -> float:
    """Train by the recipe, with a progress bar, and write the checkpoint; returns the last loss, in nats per token."""
    texts = [
        review.text
        for review in itertools.islice(
            review_grammar.write_reviews(recipe.seed), recipe.steps * recipe.batch_size
        )
    ]
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        texts[:4000], vocab_size=recipe.vocab_size, special_tokens=[END_OF_TEXT], show_progress=False
    )
    end_of_text = tokenizer.token_to_id(END_OF_TEXT)
    config = GPT2Config(
        vocab_size=recipe.vocab_size,
        n_positions=recipe.n_positions,
        n_embd=recipe.n_embd,
        n_layer=recipe.n_layer,
        n_head=recipe.n_head,
        initializer_range=recipe.initializer_range,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
    )
