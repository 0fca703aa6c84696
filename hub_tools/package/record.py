"""The record of a save: a probe, what the model computed on it, and the hashes of what was written. And the releases:
the hashes of every released version's code (`make release-hashes` adds the version that is about to be released).

The numbers are float32, computed on the CPU whatever the model's dtype and device, so that the same weights give the
same numbers (to rounding) on every machine.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import layout, limits
from ..errors import PackageError
from ..files import read_json

FORMAT = 1
PROBE_TEXT = "My most favourite movie is"
RELEASES = Path(__file__).with_name("releases.json")


@dataclass(frozen=True)
class Record:
    """The numbers that `verify_package` compares with.

    Shapes: `logits [tokens, len(logit_ids)]`, `logsumexp [tokens]` (over the whole vocabulary), and `values [tokens,
    width]`. The width is 1; if the head does not project to one value, its first 64 numbers are recorded.
    """

    token_ids: list[int]
    logit_ids: list[int]
    logits: list[list[float]]
    logsumexp: list[float]
    values: list[list[float]]
    tokenizer_ids: list[int] | None  # of PROBE_TEXT; None without a tokenizer
    versions: dict[str, str]
    sha256: dict[str, str]
    format: int = FORMAT


def probe(config: Any) -> tuple[list[int], list[int]]:
    """Return the probe for a model of this configuration: the ids to feed, and the ids whose logits are recorded.

    These are up to 16 tokens and 32 logits, spread over the vocabulary. Both include its first and last id, because a
    wrong resize of the vocabulary changes those.
    """
    last = config.vocab_size - 1
    token_ids, logit_ids = (
        [i * last // max(count - 1, 1) for i in range(count)]
        for count in (min(16, config.n_positions, last + 1), min(32, last + 1))
    )
    return token_ids, logit_ids


def read_record(folder: Path) -> Record:
    """Read the record of a package. Its numbers are checked where they are compared.

    Raises:
        PackageError: it cannot be read (see `files`), or is no record.
    """
    fields = read_json(folder, layout.RECORD, limit=limits.RECORD_BYTES)
    tables = (fields.get("versions"), fields.get("sha256"))
    sound = all(isinstance(table, dict) and all(isinstance(text, str) for text in table.values()) for table in tables)
    if not sound or set(fields) != set(Record.__dataclass_fields__) or fields["format"] != FORMAT:
        raise PackageError(f"{layout.RECORD} holds no record of format {FORMAT}", expected="what save_package writes")
    return Record(**fields)


def releases() -> dict[str, dict[str, str]]:
    """Return the versions whose code is known, newest first: version -> file name -> SHA-256. The first is the
    installed one, as it is on the disk.

    Raises:
        PackageError: the installation is incomplete.
    """
    recorded = json.loads(RELEASES.read_text(encoding="utf-8"))
    older = {version: recorded[version] for version in reversed(recorded) if version != layout.__version__}
    return {layout.__version__: layout.installed_hashes(), **older}


def release_of(code: Mapping[str, str]) -> str | None:
    """Return the version whose code this is (name -> SHA-256): every file of it, unchanged. None for other code."""
    return next((version for version, files in releases().items() if files.items() <= code.items()), None)


def diff_command(source: str, commit: str | None = None) -> str:
    """Return the command that shows how a package's code differs from the installed version's."""
    return f"gpt2-value inspect {shlex.quote(source)} --diff" + (f" --revision {commit}" if commit else "")
