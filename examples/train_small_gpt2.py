"""Train a GPT-2 of about a million parameters on the grammar's reviews, once, and keep it in the user's cache.

Imports torch, transformers, tokenizers, tqdm and the grammar. The result is a checkpoint laid out like the published
`gpt2` (a plain GPT2LMHeadModel and its byte-level BPE), so everything that reads that one reads this one.

Beside the language model's loss there is a second, small one: from the last hidden state at every token a linear probe
must tell how the judge will score the review. A body this small would else look back for the stance only where it needs
it, and a linear head would find nothing elsewhere. In PPO the body learns the same, from the value loss.
"""

import contextlib
import hashlib
import itertools
import json
import os
import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import review_grammar
import torch
from tokenizers import ByteLevelBPETokenizer
from torch.nn.functional import cross_entropy, mse_loss
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

    GPT-2's standard deviation of initial weights, 0.02, is made for a width of 768. At 176 it starts attention so even
    that in a run this short the model never learns to look back at what the review thinks of the film.
    """

    seed: int = 0
    # More would add floats in another order, and so end in other weights; and two threads that meet in every small
    # operation are fast on an idle machine alone.
    threads: int = 1
    vocab_size: int = 1024
    n_positions: int = 256
    n_embd: int = 176
    n_layer: int = 2
    n_head: int = 4
    initializer_range: float = 0.08
    steps: int = 700
    batch_size: int = 16  # reviews
    learning_rate: float = 2e-3
    score_weight: float = 1.0

    def fingerprint(self) -> str:
        """16 hexadecimal digits that change whenever the code or a setting behind the weights does."""
        sources = b"".join(Path(file).read_bytes() for file in (__file__, review_grammar.__file__))
        return hashlib.sha256(sources + repr(self).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class SmallGPT2:
    """A checkpoint folder, and how it came to be: trained in this call, or found in the cache."""

    folder: Path
    trained_now: bool
    parameters: int
    loss: float  # mean over the last 50 steps, in nats per token


def small_gpt2(recipe: Recipe | None = None) -> SmallGPT2:
    """The recipe's checkpoint, trained first (with a progress bar) if it is not in the cache.

    The cache is `gpt2-value` under `XDG_CACHE_HOME`, else under `~/.cache`. A checkpoint appears there in one step, so
    a run that is interrupted leaves nothing that looks like one.

    Raises:
        OSError: the cache cannot be written.
    """
    recipe = recipe or Recipe()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpt2-value"
    folder = cache / f"small-gpt2-{recipe.fingerprint()}"
    trained_now = not folder.exists()
    if trained_now:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".training-", dir=cache) as draft:
            checkpoint = Path(draft) / "checkpoint"
            train(recipe, checkpoint)
            try:
                checkpoint.rename(folder)
            except OSError:  # another process was faster; the two are equal
                if not folder.is_dir():
                    raise
    facts = json.loads((folder / "training.json").read_text())
    return SmallGPT2(folder, trained_now, facts["parameters"], facts["loss"])


def train(recipe: Recipe, folder: Path) -> None:
    """Train by the recipe and write the checkpoint to `folder`, with `training.json` beside the weights.

    torch's global random state and number of threads are left as they were.
    """
    written = itertools.islice(review_grammar.write_reviews(recipe.seed), recipe.steps * recipe.batch_size)
    texts = [review.text for review in written]
    tokenizer = ByteLevelBPETokenizer()
    # BPE's own defaults are for corpora; 4,000 reviews hold every word of the grammar many times.
    tokenizer.train_from_iterator(texts[:4000], recipe.vocab_size, special_tokens=[END_OF_TEXT], show_progress=False)
    end_of_text = tokenizer.token_to_id(END_OF_TEXT)
    documents = [torch.tensor([*encoding.ids, end_of_text]) for encoding in tokenizer.encode_batch(texts)]
    reviews = [(document, review_grammar.judge(text)) for document, text in zip(documents, texts, strict=True)]

    with _threads(recipe.threads), torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        config = GPT2Config(
            vocab_size=tokenizer.get_vocab_size(),
            n_positions=recipe.n_positions,
            n_embd=recipe.n_embd,
            n_layer=recipe.n_layer,
            n_head=recipe.n_head,
            initializer_range=recipe.initializer_range,
            activation_function="gelu_pytorch_tanh",  # gelu_new in one kernel instead of eight
            bos_token_id=end_of_text,
            eos_token_id=end_of_text,
        )
        # No review is seen twice, so there is nothing for dropout to regularise: eval() switches it off.
        model = GPT2LMHeadModel(config).eval()
        probe = torch.nn.Linear(recipe.n_embd, 1)  # thrown away in the end
        trained = [*model.parameters(), *probe.parameters()]
        optimizer = AdamW(trained, lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        schedule = OneCycleLR(optimizer, recipe.learning_rate, total_steps=recipe.steps, pct_start=0.1)
        losses: list[float] = []
        batches = tqdm(_batches(reviews, recipe.batch_size), "training", recipe.steps, unit="step", leave=False)
        for batch in batches:
            tokens = pad_sequence(
                [document for document, _ in batch], batch_first=True, padding_value=IGNORED
            )  # [B, T]
            # Attention looks only to the left: padding at the right needs no mask.
            hidden = model.transformer(tokens.clamp(min=0), use_cache=False).last_hidden_state  # [B, T, n_embd]
            logits = model.lm_head(hidden[:, :-1])
            loss = cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=IGNORED)
            scores = torch.tensor([[score] for _, score in batch]).expand(tokens.shape)
            real = tokens != IGNORED
            score_loss = mse_loss(probe(hidden).squeeze(-1)[real], scores[real])
            (loss + recipe.score_weight * score_loss).backward()
            clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            batches.set_postfix(loss=f"{losses[-1]:.2f}", refresh=False)

    config.activation_function = "gelu_new"  # the name of the same function in the published config
    model.save_pretrained(folder)
    tokenizer.save_model(str(folder))  # vocab.json and merges.txt
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": recipe.n_positions}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    recent = losses[-50:]
    facts = {"parameters": model.num_parameters(), "loss": sum(recent) / len(recent)}
    (folder / "training.json").write_text(json.dumps(facts, indent=2))


def _batches(reviews: list[tuple[torch.Tensor, float]], size: int) -> Iterator[list[tuple[torch.Tensor, float]]]:
    """Batches of reviews of about equal length (sorted within each 16 batches): a third of a batch would be padding."""
    dice = random.Random(0)
    for start in range(0, len(reviews), 16 * size):
        pool = sorted(reviews[start : start + 16 * size], key=lambda review: len(review[0]))
        batches = [pool[first : first + size] for first in range(0, len(pool), size)]
        dice.shuffle(batches)
        yield from batches


@contextlib.contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
