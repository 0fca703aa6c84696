"""The record of a save: a probe, what the model computed on it, and the hashes of what was written. And the releases:
the hashes of every released version's code (`make release-hashes` adds the version that is about to be released).

The numbers are float32, computed on the
CPU whatever the model's dtype and device, so that the same weights give the same numbers (to rounding) on
every machine.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .. import layout, limits
from ..errors import ChangedFileError, PackageError
from ..files import AGAIN, read_json

FORMAT = 1
PROBE_TEXT = "My most favourite movie is"


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

    def write(self, folder: Path) -> None:
        text = json.dumps({"format": FORMAT, **asdict(self)}, allow_nan=False, sort_keys=True)
        (folder / layout.RECORD).write_text(text + "\n", encoding="utf-8")


def probe(config: Any) -> tuple[list[int], list[int]]:
    """Return the probe for a model of this configuration: the ids to feed, and the ids whose logits are recorded.

    These are up to 16 tokens, and 32 logits spread over the vocabulary. Both include its first and last id, because a
    wrong resize of the vocabulary changes those.
    """
    vocab_size = config.vocab_size
    length, spread = min(16, config.n_positions), min(32, vocab_size)
    # multiplying by an odd constant scatters neighbours (Knuth's multiplicative hashing)
    token_ids = [0, vocab_size - 1, *(i * 2654435761 % vocab_size for i in range(1, 15))][:length]
    logit_ids = [i * (vocab_size - 1) // max(spread - 1, 1) for i in range(spread)]
    return token_ids, logit_ids


def read_record(folder: Path) -> Record:
    """Read the record of a package, and check its shape.

    Raises:
        PackageError: see `files`.
    """
    fields = read_json(folder, layout.RECORD, limit=limits.RECORD_BYTES)

    def ids(value: Any) -> bool:
        return isinstance(value, list) and bool(value) and all(type(i) is int and 0 <= i < 1 << 31 for i in value)

    def row(value: Any) -> bool:
        return isinstance(value, list) and all(type(x) in (int, float) and math.isfinite(x) for x in value)

    def rows(value: Any, width: int | None) -> bool:
        return (
            isinstance(value, list)
            and len(value) == len(fields["token_ids"])
            and all(row(line) and len(line) == (width or len(value[0]) or 1) for line in value)
        )

    def table(value: Any) -> bool:
        return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())

    checks: dict[str, Callable[[Any], bool]] = {  # in this order: later ones rely on earlier ones
        "format": lambda value: value == FORMAT,
        "token_ids": lambda value: ids(value) and len(value) <= 16,
        "logit_ids": lambda value: ids(value) and len(value) <= 32,
        "logits": lambda value: rows(value, len(fields["logit_ids"])),
        "logsumexp": lambda value: row(value) and len(value) == len(fields["token_ids"]),
        "values": lambda value: rows(value, None),
        "tokenizer_ids": lambda value: value is None or ids(value),
        "versions": table,
        "sha256": lambda value: table(value) and all(re.fullmatch("[0-9a-f]{64}", x) for x in value.values()),
    }
    for name, holds in checks.items():
        if name not in fields or not holds(fields[name]):
            raise PackageError(
                f"{layout.RECORD}: {name!r} is {str(fields.get(name, 'missing'))[:80]}",
                expected=f"a record of format {FORMAT}, as save_package writes it",
                next_step=AGAIN,
            )
    return Record(**{name: fields[name] for name in checks if name != "format"})


# Releases

RELEASES = Path(__file__).with_name("releases.json")


@dataclass(frozen=True)
class Release:
    """The code of one version: file name -> SHA-256, in hexadecimal."""

    version: str
    sha256: dict[str, str]

    def is_in(self, code: Mapping[str, str]) -> bool:
        """Whether `code` (name -> SHA-256) has every file of this release that a loader runs, unchanged."""
        return all(code.get(name) == digest for name, digest in self.sha256.items())


def releases() -> tuple[Release, ...]:
    """Return every version whose code is known: the installed one (as on the disk), then releases, newest first.

    Raises:
        PackageError: the installation is incomplete.
    """
    recorded = _recorded(RELEASES)
    return (
        Release(layout.__version__, layout.installed_hashes()),
        *(Release(version, recorded[version]) for version in reversed(recorded)),
    )


def release_of(code: Mapping[str, str]) -> Release | None:
    """Return the version whose code this is (name -> SHA-256), all of it unchanged; None for any other code."""
    return next((release for release in releases() if release.is_in(code)), None)


def versions_of(name: str, sha256: str, among: tuple[Release, ...]) -> tuple[str, ...]:
    """Return the versions that have a file of this name and content."""
    return tuple(dict.fromkeys(release.version for release in among if release.sha256.get(name) == sha256))


def diff_command(source: str, commit: str | None = None) -> str:
    """Return the command that shows how a package's code differs from the installed version's."""
    return shlex.join(["gpt2-value", "inspect", source, "--diff", *(["--revision", commit] if commit else [])])


def record_release(to: Path = RELEASES) -> dict[str, str]:
    """Add the installed version's files to the list of releases; return their hashes.

    Raises:
        ChangedFileError: this version was released already, with other hashes.
    """
    recorded, installed = _recorded(to), layout.installed_hashes()
    if recorded.get(layout.__version__, installed) != installed:
        raise ChangedFileError(
            f"version {layout.__version__} was released with other code than is here now",
            expected="code that stays as it was released",
            next_step="raise __version__ in hub_tools/layout.py, and run the same again",
        )
    recorded[layout.__version__] = installed
    to.write_text(json.dumps(recorded, indent=2) + "\n", encoding="utf-8")
    return installed


def _recorded(file: Path) -> dict[str, dict[str, str]]:
    """Read version -> file name -> SHA-256, in the order of release."""
    found: dict[str, dict[str, str]] = json.loads(file.read_text(encoding="utf-8"))
    return found


if __name__ == "__main__":
    for name, digest in record_release().items():
        print(f"{layout.__version__}  {digest}  {name}")
