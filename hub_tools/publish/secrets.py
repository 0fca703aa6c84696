"""Find Hub tokens in what a push would publish: in any file, its name, and the words of a commit.

Imports of hub_tools `errors` and `limits`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from ..errors import SecretFoundError
from ..limits import HEADER_BYTES

# User and organisation tokens, and those of OAuth and of jobs, which are JSON web tokens. No \b before them: a token
# after an underscore is one, too.
TOKEN = re.compile(rb"(hf|api_org)_[A-Za-z0-9]{30,}|hf_(oauth|jwt)_[A-Za-z0-9_.\-]{30,}")
_ESCAPE = re.compile(rb"\\+(?:u00|x|U000000)([0-9A-Fa-f]{2})")  # of JSON, Python and YAML


def refuse_tokens(folder: Path, words: Mapping[str, str], token: str) -> None:
    """Refuse to publish a token, the one in use or any other, as it is or escaped, in UTF-8, UTF-16 or UTF-32.

    Args:
        folder: the files; of safetensors only the header is read.
        words: what each text is, for the message -> the text.
        token: the one in use.

    Raises:
        SecretFoundError: names where it is, and does not repeat it.
    """
    for path in sorted(folder.iterdir()):
        if _holds_token(_readable(path), token):
            raise _found(path.name)
        if _holds_token(os.fsencode(path.name), token):
            raise _found("the name of a file")
    for what, text in words.items():
        if _holds_token(text.encode(), token):
            raise _found(what)


def _readable(path: Path) -> bytes:
    """Return a file's bytes, without the tensors."""
    with open(path, "rb") as file:
        if path.suffix != ".safetensors":
            return file.read()
        return file.read(min(int.from_bytes(file.read(8), "little"), HEADER_BYTES))


def _holds_token(data: bytes, token: str) -> bool:
    narrow = data.replace(b"\0", b"")
    plain = _ESCAPE.sub(lambda found: bytes([int(found[1], 16)]), narrow)
    return any((token and token.encode() in text) or TOKEN.search(text) for text in (data, narrow, plain))


def _found(where: str) -> SecretFoundError:
    return SecretFoundError(
        f"{where} holds what looks like a Hub token; nothing was uploaded",
        next_step="take it out; if it was ever published, revoke it in the Hub's settings",
    )
