"""Open a tokenizer.json and use it; run as a script by `tokenizer.py`, in a process of its own with limits.

Imports the standard library, and tokenizers inside the function, because it is run by its path, isolated.

A tokenizer can be small on the disk and still fill the memory, because each of its steps may double the output of the
one before. This script tries it on text that is likely to trigger those steps: its own patterns, and long runs of each
character.
"""

from __future__ import annotations

import json
import string
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RUN = 40  # of the same character: enough for an expression that backtracks to take for ever


def strings_in(value: Any) -> Iterator[str]:
    """Every text in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from strings_in(each)


def try_tokenizer(folder: Path, *, growth: int) -> None:
    """Open the tokenizer and use it.

    Args:
        folder: has `tokenizer.json`, and perhaps `tokenizer_config.json`.
        growth: the most tokens for one character. (A character has at most 4 bytes, and normalising turns some into
            18.)

    Raises:
        What tokenizers raises for this tokenizer, and SystemExit if it makes far too many tokens of a text.
    """
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    tokenizer = Tokenizer.from_file(str(path))
    settings = folder / "tokenizer_config.json"
    special = list(strings_in(json.loads(settings.read_text(encoding="utf-8")))) if settings.exists() else []
    tokenizer.add_special_tokens([text for text in special if 0 < len(text) <= 1000])
    steps = [fields.get(name) for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder")]
    texts = [character * RUN + "!" for character in string.printable + "é中\u0301"]
    texts += [text for text in strings_in(steps) if len(text) <= 10_000]
    for text in texts:
        ids = tokenizer.encode(text).ids
        tokenizer.decode(ids)
        if len(ids) > 1000 + growth * len(text):
            raise SystemExit(f"it makes {len(ids):,} tokens of a text of {len(text):,} characters")


def main() -> None:
    folder, growth, *search_path = sys.argv[1:]
    # an isolated interpreter leaves out PYTHONPATH and the user's own site-packages, where tokenizers may live
    sys.path.extend(path for path in search_path if path not in sys.path)
    try_tokenizer(Path(folder), growth=int(growth))


if __name__ == "__main__":
    main()
