"""Rewards that the tests of examples/ppo.py name as MODULE:FUNCTION."""

FAILS_AT = None  # the call, counted from 0, in which `vowels` fails
calls = 0


class Stopped(Exception):
    """What a reward raises to end a run in the middle of an iteration."""


def vowels(texts):
    """The fraction of letters that are vowels."""
    global calls
    if calls == FAILS_AT:
        raise Stopped
    calls += 1
    return [sum(letter in "aeiou" for letter in text) / max(1, len(text)) for text in texts]
