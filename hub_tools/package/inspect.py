"""Read a package without running any of it: JSON, code and safetensors headers; pickles are never opened.

Needs neither torch nor transformers. The idea to look before loading is from skops:
https://skops.readthedocs.io/en/stable/persistence.html.
"""

from __future__ import annotations

import difflib
import io
import math
import os
import tempfile
import tokenize
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .. import layout, limits
from ..errors import PackageError, visible
from ..files import open_in, read_json
from . import config as config_fields
from .record import Record, read_record
from .stage import Stage, repository_id, stage_package
from .weights import Tensor, check_tensors, package_weights

LONGEST = 200_000  # bytes of a file that `code_differences` shows: the largest file of any release has a tenth


@dataclass(frozen=True)
class PackageReport:
    """What is inside a package. Nothing of it was run."""

    source: str
    folder: Path  # for a repository on the Hub: where its files are in the Hub's cache
    commit: str | None  # of a repository on the Hub
    parameters: int  # tied embeddings count once
    dtypes: dict[str, int]  # torch's name for the type -> parameters of that type
    weight_files: dict[str, int]  # name -> bytes
    head: Tensor | None  # its weight: [1, n_embd], or () where the config says no projection
    tied_embeddings: bool
    vocab_size: int
    n_positions: int
    n_embd: int
    n_layer: int
    n_head: int
    tokenizer: str | None  # its class
    code: dict[str, str]  # files that `trust_remote_code=True` may run -> SHA-256
    versions: dict[str, str]  # of the libraries that wrote the package, as its record names them
    missing: tuple[str, ...]  # files of a complete package that this one lacks
    changed: tuple[str, ...]  # files that were changed, removed or added since the save
    pickles: tuple[str, ...]
    foreign: tuple[str, ...]  # other files that do not belong to a package

    @property
    def code_sha256(self) -> dict[str, str]:
        """The Python files and their SHA-256. Once you have read them, pass it to `load_package(reviewed_sha256=)`."""
        return {name: digest for name, digest in self.code.items() if name.endswith(".py")}

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {**asdict(self), "folder": str(self.folder)}


def inspect_package(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    hash_weights: bool = False,
    token: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> PackageReport:
    """Report what is inside a package, without running any of it.

    Every tensor's name, shape and dtype is compared with what `config.json` calls for, so a report means that the
    weights are complete. A package that cannot be read, or that contradicts itself, is refused. What is unusual but
    harmless to *read* (another version's code, pickles, foreign files, no head) is only reported; `verify_package`
    refuses it.

    Args:
        source: a package's folder, or the id of a repository on the Hub (`owner/name`). From a repository, the JSON and
            code files are downloaded, and only the headers of the weights.
        revision: branch, tag or commit of the repository.
        hash_weights: also hash the weights (about a second per GB), and compare with the hashes of the record. The
            weights of a repository are then downloaded.
        token: for the Hub, instead of the one that huggingface_hub knows.
        cache_dir: the Hub's cache, instead of huggingface_hub's.
        local_files_only: use only the Hub's cache, without the network. Offline mode does the same.

    Raises:
        OptionsError: an option for the Hub, but the source is a folder.
        RemoteNotFoundError, AuthenticationError, HubUnavailableError: the download failed.
        NotAPackageError: no such folder, or `config.json` describes another kind of model.
        PackageError: a file without which there is no model.
        PackageError: truncated, oversized, invalid JSON, or values that cannot be right.
        PackageError: links out of the package, devices, pipes.
        PackageError: the only weights are a pickle.
        PackageError: tensors that are missing, unknown, or of the wrong shape or dtype.
        PackageError: `auto_map` does not name the package's own classes.
    """
    with (
        _at_hand(
            source,
            whole=hash_weights,
            local_files_only=local_files_only,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
        ) as (folder, readable, commit),
        stage_package(folder, with_weights=hash_weights) as copy,
    ):
        report = inspect_stage(copy, os.fspath(source))
    return replace(report, folder=readable, commit=commit)


@contextmanager
def _at_hand(
    source: str | os.PathLike[str], *, whole: bool = False, local_files_only: bool = False, **options: Any
) -> Iterator[tuple[Path, Path, str | None]]:
    """Yield a folder with a package, where people can read its JSON and code, and its commit.

    Of a repository on the Hub, only the headers of the weights are downloaded, unless all of it is wanted.
    """
    repo_id = repository_id(source, local_files_only=local_files_only, **options)
    if repo_id is None:
        yield Path(source), Path(source), None
        return
    from ..hub.download import fetch

    with tempfile.TemporaryDirectory(prefix="gpt2-value-inspect-") as home:
        outline = None if whole else Path(home)
        folder = fetch(repo_id, local_files_only=local_files_only, outline=outline, **options)
        yield Path(home) if os.listdir(home) else folder, folder, folder.name


def inspect_stage(copy: Stage, source: str) -> PackageReport:
    """Report on the copy of a package (see `stage_package`). Where it has no weights, their headers are read from the
    source."""
    names = copy.names
    known = {
        file: config_fields.reduce(file, read_json(copy.folder, file, limit=limits.INDEX_BYTES))
        for file in config_fields.REDUCED
        if file in copy.sha256
    }
    config, tokenizer = known[layout.CONFIG], known.get(layout.TOKENIZER_CONFIG)

    are_copied = any(name.endswith(".safetensors") for name in copy.sha256)
    shards = package_weights(copy.folder if are_copied else copy.source, names)
    tensors = {name: tensor for shard in shards.values() for name, tensor in shard.items()}
    head = check_tensors(tensors, config)
    dtypes: dict[str, int] = {}
    for tensor in tensors.values():
        dtypes[tensor.dtype] = dtypes.get(tensor.dtype, 0) + math.prod(tensor.shape)

    record = read_record(copy.folder) if layout.RECORD in names else None
    parts = (*layout.REMOTE_CODE, layout.CARD, layout.RECORD, layout.GENERATION_CONFIG)
    return PackageReport(
        source=source,
        folder=copy.source,
        commit=copy.commit,
        parameters=sum(dtypes.values()),
        dtypes=dtypes,
        weight_files={name: (copy.source / name).stat().st_size for name in shards},
        head=head,
        tied_embeddings=config_fields.tied(config),
        **{name: config[name] for name in config_fields.SIZES},
        tokenizer=None if tokenizer is None else str(tokenizer.get("tokenizer_class")),
        code=_read_code(copy),
        versions={} if record is None else record.versions,
        missing=tuple(name for name in parts if name not in names),
        changed=() if record is None else _changed(record, copy),
        pickles=tuple(name for name in names if layout.kind_of(name) == "pickle"),
        foreign=tuple(name for name in names if layout.kind_of(name) == "foreign"),
    )


def _changed(record: Record, copy: Stage) -> tuple[str, ...]:
    """Return the files that differ from the record: changed, missing, or added since. Weights may have no hash here."""
    saved = record.sha256
    here = {
        name: copy.sha256.get(name, saved.get(name, "added")) for name in copy.names if layout.written_by_save(name)
    }
    names = {*here, *saved} - {layout.CARD, layout.RECORD, layout.HANDLER}  # 0.2.0 recorded its own handler
    return tuple(sorted(name for name in names if here.get(name) != saved.get(name)))


# Code


def _read_code(copy: Stage) -> dict[str, str]:
    """Return the hash of each file of code, and refuse code that a person cannot review."""
    code = {name: copy.sha256[name] for name in filter(layout.is_code, copy.names)}
    for name in code:
        if name.endswith(".py") and (reasons := disguises((copy.folder / name).read_bytes())):
            raise PackageError(
                f"{name!r} cannot be reviewed, since it looks otherwise than it runs: {reasons[0]}",
                expected="code in UTF-8 with printable characters alone",
                next_step="do not use this package",
            )
    return code


def disguises(code: bytes) -> list[str]:
    """Return why what an editor or a terminal shows of this code is not what Python runs; nothing for honest code.

    Python reads a file in the encoding that its first lines name (PEP 263), where every viewer shows UTF-8; a terminal
    obeys control characters, and characters that are not printable can reorder or hide what stands beside them.
    """
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(code).readline)
        lines = code.decode("utf-8").replace("\r\n", "\n").replace("\t", " ").split("\n")
    except (SyntaxError, ValueError):
        return ["it is not UTF-8, or declares an encoding that is none"]
    found = []
    if encoding != "utf-8":
        found.append(f"it declares an encoding, {encoding}, by which Python reads other lines than these")
    if odd := [number for number, line in enumerate(lines, 1) if not line.isprintable()]:
        found.append(f"characters that are not what they look like, in lines {str(odd)[1:80]}")
    return found


def code_differences(source: str, *, revision: str | None = None) -> Iterator[str]:
    """Yield, line by line, what makes each file of a package's code another one than the installed version's.

    Every character that a terminal would obey, or that has no shape, is an escape. Lines that begin with `DANGER` name
    what a reader cannot judge: compiled files, other encodings, hidden line breaks, files too large to be read. There
    is no line where all code is this version's.

    Args:
        source: a folder, or the id of a repository on the Hub.
        revision: branch, tag or commit of the repository.

    Raises:
        NotAPackageError: there is no such folder.
        PackageError: a file of code is a link that leads out of the folder, or no regular file.
        And what `fetch` raises.
    """
    with _at_hand(source, revision=revision) as (folder, _, _):
        installed, hashes = layout.installed_code(), layout.installed_hashes()
        names = sorted(filter(layout.is_code, os.listdir(folder)))
        for name in names:
            with open_in(folder, name) as file:
                digest, code = layout.sha256_of(folder / name), file.read(LONGEST + 1)
            if digest == hashes.get(name):
                continue
            shown = _on_one_line(name)
            yield f"{shown}  sha256 {digest}"
            if len(code) > LONGEST or not name.endswith(".py"):
                yield f"DANGER: compiled code, or more than {LONGEST:,} bytes, which is not shown: nobody can read it"
                continue
            yield from (f"DANGER: {reason}" for reason in disguises(code))
            ours = installed[name].read_text(encoding="utf-8") if name in installed else ""
            theirs = code.decode("utf-8", errors="backslashreplace").replace("\r\n", "\n")
            before, after = (text.removesuffix("\n").split("\n") for text in (ours, theirs))
            lines = difflib.unified_diff(before, after, f"installed/{shown}", f"package/{shown}", lineterm="")
            yield from map(_on_one_line, lines)
        yield from (f"missing: {name}" for name in installed if name not in names)
        if deeper := sorted(_on_one_line(str(path.relative_to(folder))) for path in folder.glob("*/*.py*")):
            yield f"DANGER: code in folders, where no package has any: {', '.join(deeper[:8])}"


def _on_one_line(text: str) -> str:
    """Text as it is shown, without a way to look like the next line."""
    return visible(text).replace("\n", "\\n")
