"""Rewards that the tests of gpt2_value.ppo name as MODULE:FUNCTION."""

import os

FAILS_AT = None  # the call, counted from 0, in which `vowels` returns a NaN for one text
RANK, FAILS_IN_RANK = os.environ.get("RANK"), os.environ.get("FAILS_IN_RANK", "none")
calls = 0


def vowels(texts):
    """The fraction of letters that are vowels."""
    global calls
    calls += 1
    if calls == 3 and RANK == FAILS_IN_RANK:  # after the trial and one iteration
        raise OSError(f"in rank {RANK}")
    scores = [sum(letter in "aeiou" for letter in text) / max(1, len(text)) for text in texts]
    return [*scores[:-1], float("nan")] if calls - 1 == FAILS_AT else scores


def answers(prompts, responses, tokens):
    """The same for the response alone, all of it on the last token."""
    return [[0.0] * (len(ids) - 1) + vowels([text]) for text, ids in zip(responses, tokens, strict=True)]
