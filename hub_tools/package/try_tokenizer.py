"""Open a tokenizer's files and use them; run as a script by `tokenizer.py`, in a process of its own with limits.

A tokenizer can be small on the disk and still fill the memory or take for ever: a long token takes time that grows with
its square, and each step may double the output of the one before. So the length of tokens and the growth of each step
are bounded by what the files say, and then the tokenizer is tried on text that is likely to trigger what they do not
say: its own patterns, long runs of each character, and each of its tokens.
"""

from __future__ import annotations

import base64
import json
import string
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RUN = 40  # of the same character: enough for an expression that backtracks to take for ever


def strings_in(value: Any) -> Iterator[str]:
    """Yield every text in a JSON value, names of fields too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, each in value.items():
            yield name
            yield from strings_in(each)
    elif isinstance(value, list):
        for each in value:
            yield from strings_in(each)


def growth_of(step: Any) -> float:
    """Return how many times longer a normalizer or decoder can make a text: the product over its steps."""
    if isinstance(step, list):
        product = 1.0
        for each in step:
            product *= growth_of(each)
        return product
    if not isinstance(step, dict):
        return 1.0
    found = growth_of([each for each in step.values() if isinstance(each, (dict, list))])
    if isinstance(step.get("precompiled_charsmap"), str):
        # SentencePiece's: the length of a trie, the trie, and the texts that it leads to, each ended by a NUL
        table = base64.b64decode(step["precompiled_charsmap"])
        return found * max(map(len, table[4 + int.from_bytes(table[:4], "little") :].split(b"\0")))
    pattern, content = step.get("pattern"), step.get("content" if step.get("type") == "Replace" else "prepend")
    if not isinstance(content, str):
        return found
    replaced = pattern.get("String") if isinstance(pattern, dict) else None
    # an expression may match nothing, before each character and at the end
    return found * (max(1.0, len(content) / max(len(replaced), 1)) if replaced else 2.0 * len(content) + 1)


def refuse_long_tokens(folder: Path, most: int) -> None:
    """Refuse a vocabulary with a text of more than `most` characters, in whichever file it is."""
    for path in sorted(folder.iterdir()):
        if path.name in ("tokenizer.json", "vocab.json", "added_tokens.json"):
            fields = json.loads(path.read_text(encoding="utf-8"))
            vocabulary = fields.get("model", fields) if path.name == "tokenizer.json" else fields
            texts: Iterator[str] = strings_in([vocabulary, fields.get("added_tokens")])
        elif path.name in ("merges.txt", "vocab.txt"):
            texts = iter(path.read_text(encoding="utf-8").splitlines())
        else:
            continue
        longest = max(map(len, texts), default=0)
        if longest > 2 * most + 1:  # a merge is two tokens
            raise SystemExit(f"it has a token of {longest:,} characters, too long")


def try_tokenizer(folder: Path, *, growth: int, longest: int) -> None:
    """Open the tokenizer and use it.

    Args:
        folder: the tokenizer's files.
        growth: the most tokens for one character, and the most that a step may multiply a text. (A character has at
            most 4 bytes, and normalising turns some into 18.)
        longest: the most characters of a token.

    Raises:
        What tokenizers raises for this tokenizer, and SystemExit where it goes beyond these bounds.
    """
    refuse_long_tokens(folder, longest)
    path = folder / "tokenizer.json"
    if not path.is_file():
        return
    from tokenizers import Tokenizer

    fields = json.loads(path.read_text(encoding="utf-8"))
    for name in ("normalizer", "pre_tokenizer", "decoder"):
        if growth_of(fields.get(name)) > growth:
            raise SystemExit(f"its {name} makes a text more than {growth} times as long, too much")
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
            raise SystemExit(f"it makes {len(ids):,} tokens of a text of {len(text):,} characters, too many")
    for token, id in tokenizer.get_vocab().items():
        if len(tokenizer.decode([id], skip_special_tokens=False)) > 100 + 4 * len(token):
            raise SystemExit(f"it decodes a token of {len(token):,} characters to a text that is too long")


def main() -> None:
    folder, growth, longest, *search_path = sys.argv[1:]
    # an isolated interpreter leaves out PYTHONPATH and the user's own site-packages, where tokenizers may live
    sys.path.extend(path for path in search_path if path not in sys.path)
    try_tokenizer(Path(folder), growth=int(growth), longest=int(longest))


if __name__ == "__main__":
    main()
