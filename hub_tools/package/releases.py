"""Find the released version of gpt2-value that a code file belongs to, byte for byte.

Imports only the standard library, `errors` and `layout`. `releases.json` holds the SHA-256 of every released file of
remote code; `make release-hashes` adds the version that is about to be released.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .. import layout
from ..errors import ChangedFileError

RELEASES = Path(__file__).with_name("releases.json")


@dataclass(frozen=True)
class Release:
    """The code of one version, and its handler where it had one: file name -> SHA-256, in hexadecimal."""

    version: str
    sha256: dict[str, str]

    def is_in(self, code: Mapping[str, str]) -> bool:
        """Whether `code` (name -> SHA-256) has every file of this release that a loader runs, unchanged."""
        return all(code.get(name) == digest for name, digest in self.sha256.items() if name != layout.HANDLER)


def releases() -> tuple[Release, ...]:
    """Return every version whose code is known: the installed one (as on the disk), then releases, newest first.

    Raises:
        PackageError: the installation is incomplete.
    """
    recorded = _recorded(RELEASES)
    return (
        Release(layout.__version__, layout.written_hashes()),
        *(Release(version, recorded[version]) for version in reversed(recorded)),
    )


def versions_of(name: str, sha256: str, among: tuple[Release, ...]) -> tuple[str, ...]:
    """Return the versions that have a file of this name and content."""
    return tuple(dict.fromkeys(release.version for release in among if release.sha256.get(name) == sha256))


def diff_command(path: Path) -> str:
    """Return the command that shows a file of code: how it differs from the installed file of its name, where there is
    one."""
    installed = layout.written_code().get(path.name)
    return shlex.join(["diff", "-u", str(installed), str(path)] if installed else ["less", str(path)])


def record_release(to: Path = RELEASES) -> dict[str, str]:
    """Add the installed version's files to the list of releases; return their hashes.

    Raises:
        ChangedFileError: this version was released already, with other hashes.
    """
    recorded, installed = _recorded(to), layout.written_hashes()
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
