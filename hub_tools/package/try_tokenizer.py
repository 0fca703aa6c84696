"""Open a tokenizer's files and use them; run as a script by `tokenizer.py`, in a process of its own with limits.

A tokenizer can be small on the disk and still fill the memory or take for ever: a long token takes time that grows with
its square, and each step may double the output of the one before. So the length of tokens and the growth of all steps
together are bounded by what the files say, and what they do not say (expressions that backtrack, thousands of steps) is
tried, on long runs of each character.
"""

from __future__ import annotations

import base64
import json
import math
import string
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RUN = 40  # of the same character: enough for an expression that backtracks to take for ever


def texts_in(value: Any) -> Iterator[str]:
    """Yield every text in a JSON value, names of fields too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from texts_in([*value, *value.values()])
    elif isinstance(value, list):
        for each in value:
            yield from texts_in(each)


def growth_of(step: Any) -> float:
    """Return how many times longer a normalizer or decoder can make a text: the product over its steps."""
    if isinstance(step, list):
        return math.prod(map(growth_of, step))
    if not isinstance(step, dict):
        return 1.0
    found = growth_of([*step.values()])
    if isinstance(step.get("precompiled_charsmap"), str):
        # SentencePiece's: the length of a trie, the trie, and the texts that it leads to, each ended by a NUL
        table = base64.b64decode(step["precompiled_charsmap"])
        found *= max(map(len, table[4 + int.from_bytes(table[:4], "little") :].split(b"\0")))
    pattern, content = step.get("pattern"), step.get("content" if step.get("type") == "Replace" else "prepend")
    if isinstance(content, str):
        replaced = pattern.get("String") if isinstance(pattern, dict) else None
        # an expression may match nothing, before each character and at the end
        found *= max(1.0, len(content) / len(replaced)) if replaced else 2.0 * len(content) + 1
    return found


def tokens_in(path: Path) -> Iterator[str]:
    """Yield what may be a token in one of a tokenizer's files; a merge is two."""
    if path.suffix == ".txt":
        yield from path.read_text(encoding="utf-8").splitlines()
    elif path.suffix == ".json":
        fields = json.loads(path.read_text(encoding="utf-8"))
        yield from texts_in([each for name, each in fields.items() if name not in ("chat_template", "normalizer")])


def try_tokenizer(folder: Path, *, growth: int, longest: int) -> None:
    """Open the tokenizer and use it.

    Args:
        folder: the tokenizer's files.
        growth: the most that a step may multiply a text. (Normalising turns some characters into 18.)
        longest: the most characters of a token.

    Raises:
        What tokenizers raises for this tokenizer, and SystemExit where it goes beyond these bounds.
    """
    for path in sorted(folder.iterdir()):
        if path.name.startswith(("tokenizer", "special_tokens", "added_tokens", "vocab", "merges")):
            characters = max(map(len, tokens_in(path)), default=0)
            if characters > 2 * longest + 1:
                raise SystemExit(f"{path.name} has a token of {characters:,} characters, too long")
    path = folder / "tokenizer.json"
    if not path.is_file():
        return
    from tokenizers import Tokenizer

    fields = json.loads(path.read_text(encoding="utf-8"))
    for name in ("normalizer", "pre_tokenizer", "decoder"):
        if growth_of(fields.get(name)) > growth:
            raise SystemExit(f"its {name} makes a text more than {growth} times as long, too much")
    tokenizer = Tokenizer.from_file(str(path))
    for character in string.printable + "é中\u0301":
        tokenizer.decode(tokenizer.encode(character * RUN + "!").ids)


def main() -> None:
    folder, growth, longest, *search_path = sys.argv[1:]
    # an isolated interpreter leaves out PYTHONPATH and the user's own site-packages, where tokenizers may live
    sys.path.extend(path for path in search_path if path not in sys.path)
    try_tokenizer(Path(folder), growth=int(growth), longest=int(longest))


if __name__ == "__main__":
    main()
