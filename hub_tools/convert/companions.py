"""Convert the tokenizer and the generation config that lie beside a checkpoint's weights.

Imports transformers, and of hub_tools `allowed_fields`, `stage`, `tokenizer` and what these import. Only known fields
are read. The tokenizer is read from a private copy.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from transformers import GenerationConfig, GPT2Config, PreTrainedTokenizerBase

from .. import limits
from ..errors import LoadError, PackageError, TokenizerMismatchError, as_ours
from ..files import read_json
from ..layout import GENERATION_CONFIG, TOKENIZER, kind_of
from ..package.config import reduce
from ..package.stage import make_loadable, package_file_limit, stage
from ..package.tokenizer import load_tokenizer


def carried_tokenizer(
    given: PreTrainedTokenizerBase | str | os.PathLike[str] | Literal[False] | None,
    homes: Sequence[Path],
    *,
    vocab_size: int,
) -> PreTrainedTokenizerBase | None:
    """The tokenizer that was given, or for None the first one in `homes`; None if there is none, and for False.

    Args:
        given: a tokenizer, or the folder of one; None or False.
        homes: folders.
        vocab_size: of the model, by which the tokenizer's files are bounded.

    Raises:
        TokenizerMismatchError: its files cannot be loaded without running code of theirs.
        ResourceLimitError: it takes more memory or time than a tokenizer needs.
        PackageError: links out of the folder, files that are too large, or no JSON.
    """
    if isinstance(given, PreTrainedTokenizerBase):
        return given
    if given is False:
        return None
    folders = homes if given is None else [Path(given)]
    home = next((home for home in folders if any(os.path.lexists(home / name) for name in TOKENIZER)), None)
    if home is None and given is None:
        return None
    home = home or folders[0]
    vocabulary = limits.vocabulary_bytes(vocab_size)

    def limit_of(name: str) -> int | None:
        return package_file_limit(name, vocabulary=vocabulary, weights=0) if kind_of(name) == "tokenizer" else None

    try:
        with stage(home, limit_of=limit_of) as copy:
            # transformers takes the tokenizer's class from the config if the tokenizer's settings do not name it
            return load_tokenizer(make_loadable(copy, ()), str(home), config=GPT2Config())
    except LoadError as err:
        raise TokenizerMismatchError(
            f"the tokenizer in {home} cannot be loaded: {err.found}",
            expected="the files of a tokenizer of transformers' own",
            next_step="pass a tokenizer: tokenizer=, or move its files out of the folder",
        ) from err


def carried_generation_config(homes: Sequence[Path]) -> GenerationConfig | None:
    """The generation config in the first of `homes` that has one; None if there is none.

    Raises:
        PackageError: no JSON, or a setting that cannot be right.
    """
    home = next((home for home in homes if os.path.lexists(home / GENERATION_CONFIG)), None)
    if home is None:
        return None
    fields = reduce(GENERATION_CONFIG, read_json(home, GENERATION_CONFIG))
    with as_ours(lambda gist: _not_valid(home, gist)):
        config = GenerationConfig.from_dict(fields)
        config.validate(strict=True)
    return config


def _not_valid(home: Path, gist: str) -> PackageError:
    return PackageError(
        f"{home / GENERATION_CONFIG} is not valid: {gist}",
        next_step="correct the field, or remove the file: the model works without it",
    )
