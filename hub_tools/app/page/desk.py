"""What the app does, without how it looks: draw responses, read texts, compare, and say within which bounds.

Imports torch, the remote code, and of these pages `records` and `stream`. A `Desk` holds nothing of a visitor: whoever
calls it keeps what it returns, so visitors do not disturb each other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from decoding_gpt2_value import check_tokens
from generation_gpt2_value import Rollout
from sampling_gpt2_value import Sampling

from .records import Response, as_read, drawn_so_far, records
from .stream import stream

MOST_ROWS = 16  # responses, or texts, at a time
MAX_SEED = (1 << 63) - 1  # torch's


@dataclass(frozen=True)
class Named:
    """A model in evaluation mode, and what to call it."""

    name: str
    model: Any
    tokenizer: Any
    about: str = ""  # where it comes from: a commit, whose code it is


@dataclass(frozen=True, eq=False)  # by identity: gradio hashes what it keeps for a visitor
class Found:
    """Responses, the model (and the second one) that they are of, and what they were drawn with."""

    responses: tuple[Response, ...]
    names: tuple[str, str | None]
    settings: dict[str, Any]
    done: bool  # False while it is drawn: then only what the rollout says of itself is known

    @property
    def drawn(self) -> int:
        """Tokens in the longest response."""
        return max(len(response.tokens) for response in self.responses)


@dataclass(frozen=True)
class Desk:
    """A model, and perhaps a second one to compare it with.

    Raises:
        ValueError: the two models' vocabularies differ, or the first has no tokenizer.
    """

    mine: Named
    other: Named | None = None

    def __post_init__(self) -> None:
        if self.mine.tokenizer is None:
            raise ValueError(f"{self.mine.name} has no tokenizer, and the app shows texts: add one to the package.")
        if self.other is not None and self.vocabulary != _vocabulary(self.other):
            found = f"{self.mine.name} has {self.vocabulary:,} tokens, {self.other.name} {_vocabulary(self.other):,}"
            raise ValueError(f"the models' vocabularies differ: {found}; compare models with the same tokenizer.")

    @property
    def names(self) -> tuple[str, str | None]:
        return self.mine.name, None if self.other is None else self.other.name

    @property
    def vocabulary(self) -> int:
        return _vocabulary(self.mine)

    @property
    def positions(self) -> int:
        """Tokens that a prompt and its response may have together."""
        models = [self.mine] if self.other is None else [self.mine, self.other]
        return min(int(named.model.config.max_position_embeddings) for named in models)

    @property
    def ends(self) -> tuple[int, ...]:
        """The tokens that end a response."""
        end = self.mine.tokenizer.eos_token_id
        return () if end is None else (int(end),)

    @property
    def bounds(self) -> str:
        """What fits, in words."""
        return (
            f"A prompt and its response have at most {self.positions:,} tokens together, as many as the model has "
            f"positions; {MOST_ROWS} responses or texts are worked on at a time."
        )

    def sample(
        self,
        prompts: Sequence[str],
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        max_new_tokens: int = 20,
        min_new_tokens: int = 0,
        responses: int = 1,
        seed: int | None = None,
        is_stopped: Callable[[], bool] = lambda: False,
    ) -> Iterator[Found]:
        """Draw responses to prompts: what was drawn so far again and again, and at the end all about each token.

        Args:
            temperature, top_k, top_p, min_new_tokens: as in `Sampling`.
            max_new_tokens: tokens of a response, at most.
            responses: how many to each prompt.
            seed: makes the draw repeatable; None: another one each time.
            is_stopped: asked after each piece; once it says True, what was drawn is all.

        Raises:
            TypeError, ValueError: a prompt or a setting that cannot be, before or right after the first token.
        """
        sampling = Sampling(temperature, top_k, top_p, min_new_tokens, self.ends)
        queries = self.encode(prompts)
        if responses < 1 or responses * len(queries) > MOST_ROWS:
            raise ValueError(
                f"{len(queries)} prompts with {responses} responses each; expected 1 to {MOST_ROWS} responses in all."
            )
        generator = torch.Generator(self.mine.model.device)
        used = generator.seed() % (1 << 32) if seed is None else seed  # short, so that people can type it
        if not 0 <= used <= MAX_SEED:
            raise ValueError(f"seed={seed}; expected an int from 0 to {MAX_SEED}.")
        generator.manual_seed(used)
        settings = {
            **dataclasses.asdict(sampling),
            "max_new_tokens": max_new_tokens,
            "num_return_sequences": responses,
            "seed": used,
        }
        lengths = {"max_new_tokens": max_new_tokens, "num_return_sequences": responses}
        for rollout in stream(self.mine.model, queries, sampling=sampling, **lengths, generator=generator):
            so_far = drawn_so_far(self.mine.tokenizer, rollout)
            yield Found(tuple(so_far), self.names, settings, done=False)
            if is_stopped():
                break
        yield self._all_about(rollout, settings)

    def read(self, texts: Sequence[str]) -> Found:
        """All about the tokens of texts of one's own; the first token of each is given, and not scored.

        Raises:
            ValueError: no text, too many, or one that is too long.
        """
        ids = self.encode(texts)
        if len(ids) > MOST_ROWS:
            raise ValueError(f"{len(ids)} texts; expected at most {MOST_ROWS} at a time.")
        return self._all_about(as_read(ids), {"texts": len(ids)})

    def encode(self, texts: Sequence[str]) -> list[torch.Tensor]:
        """Each text's token ids, `[P]`.

        Raises:
            ValueError: no text, one without tokens, or one that is too long.
        """
        if not texts:
            raise ValueError("there is no text; write one to go on from.")
        found = []
        for number, text in enumerate(texts, 1):
            ids = torch.tensor(self.mine.tokenizer(text)["input_ids"], dtype=torch.long)
            if not len(ids):
                raise ValueError(f"text {number}, {text[:40]!r}, has no tokens; write one to go on from.")
            if len(ids) > self.positions:
                what = f"text {number}, {text[:40]!r}..., has {len(ids):,} tokens"
                raise ValueError(f"{what}; expected at most {self.positions:,}, the model's positions: shorten it.")
            check_tokens(self.mine.model, ids[None], torch.ones_like(ids[None]))
            found.append(ids)
        return found

    def _all_about(self, rollout: Rollout, settings: dict[str, Any]) -> Found:
        other = None if self.other is None else self.other.model
        found = records(self.mine.model, self.mine.tokenizer, rollout, other=other)
        return Found(tuple(found), self.names, settings, done=True)


def _vocabulary(named: Named) -> int:
    return int(named.model.get_input_embeddings().weight.shape[0])
