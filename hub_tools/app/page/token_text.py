"""What a token is, as text: its own characters, or its bytes where they are no text by themselves.

Imports the standard library. How GPT-2 writes bytes as characters of its vocabulary: `bytes_to_unicode` in
https://github.com/openai/gpt-2/blob/master/src/encoder.py.
"""

from __future__ import annotations

from typing import Any

# Every byte that is not printable in Latin-1 has a character from 256 on, in order.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTES = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + place): byte for place, byte in enumerate(_OTHERS)}


class TokenTexts:
    """The texts of a tokenizer's tokens, each found once."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._found: dict[int, str] = {}

    def __getitem__(self, id: int) -> str:
        """The token's text; of one that is a part of a character, its bytes, as in `\\xf0\\x9f`."""
        if id not in self._found:
            self._found[id] = self._read(id)
        return self._found[id]

    def _read(self, id: int) -> str:
        text: str = self._tokenizer.decode([id], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if text and "\ufffd" not in text:
            return text
        name = self._tokenizer.convert_ids_to_tokens(id)
        if name is None:  # the vocabulary of the model is larger than the tokenizer's
            return f"<token {id}>"
        if all(char in _BYTES for char in name):
            return bytes(_BYTES[char] for char in name).decode("utf-8", errors="backslashreplace")
        return str(name)


def visible(text: str) -> list[tuple[str, bool]]:
    """`text` in pieces (what to show, whether that is a sign for a character that cannot be seen).

    Spaces, line breaks and tabs get signs. Other characters without a shape of their own, and those that reorder what
    stands around them, get their escapes, as `\\u202e`.
    """
    pieces: list[tuple[str, bool]] = []
    for char in text:
        sign = _SIGNS.get(char)
        if sign is None and not char.isprintable():
            sign = repr(char)[1:-1]
        piece, is_sign = (char, False) if sign is None else (sign, True)
        if pieces and pieces[-1][1] == is_sign:
            pieces[-1] = (pieces[-1][0] + piece, is_sign)
        else:
            pieces.append((piece, is_sign))
    return pieces


_SIGNS = {" ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍"}
