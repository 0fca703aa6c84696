"""Train a GPT-2 of about a million parameters on the grammar's reviews, once, and keep it in the user's cache.

Imports torch, transformers, tokenizers, tqdm and the grammar. The result is a checkpoint laid out like the published
`gpt2` (a plain GPT2LMHeadModel and its byte-level BPE), so everything that reads that one reads this one.
"""

import hashlib
import itertools
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import review_grammar
import torch
from tokenizers import ByteLevelBPETokenizer
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel

END_OF_TEXT = "<|endoftext|>"
IGNORED = -100  # a label that transformers' language-model loss skips


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, together with the text of this file and of the grammar.

    Two threads, whatever the machine has: more would add floats in another order and end in another model.
    """

    seed: int = 0
    vocab_size: int = 1024
    n_positions: int = 256
    n_embd: int = 128
    n_layer: int = 4
    n_head: int = 4
    steps: int = 500
    batch_size: int = 32
    learning_rate: float = 4e-3
    threads: int = 2

    def fingerprint(self) -> str:
        """16 hexadecimal digits that change whenever the code or a setting behind the weights does."""
        sources = b"".join(Path(file).read_bytes() for file in (__file__, review_grammar.__file__))
        return hashlib.sha256(sources + repr(self).encode()).hexdigest()[:16]
