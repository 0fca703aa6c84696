"""Reviewed loading: inspect a package, and load it only if its code is known, or was read by a person.

Imports torch, transformers and this installation's model inside the functions that need them, and of hub_tools
`download`, `inspection`, `releases`, `stage`, `verify` and what these import. Code is trusted by its bytes, never
because of its repository. The idea is skops': https://skops.readthedocs.io/en/stable/persistence.html.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import layout
from ..errors import (
    ChangedFileError,
    GPT2ValueHubError,
    LoadError,
    MissingHeadError,
    OptionsError,
    PackageError,
    TokenizerMismatchError,
    UnsavableModelError,
    UntrustedCodeError,
    as_ours,
)
from ..files import AGAIN
from .inspect import PackageReport, inspect_stage
from .record import Release, diff_command, releases
from .stage import HubOptions, local_folder, make_loadable, repository_id, stage_package
from .tokenizer import load_tokenizer
from .verify import refusals
from .weights import not_finite

if TYPE_CHECKING:
    import torch

    from modeling_gpt2_value import GPT2ValueModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedPackage:
    """A model with its tokenizer, and where it comes from."""

    model: GPT2ValueModel  # in evaluation mode, on the CPU
    tokenizer: Any  # a transformers tokenizer; None where the package has none
    commit: str | None  # what to pass as `revision` to get the same again; None for a folder
    code_version: str | None  # the release that its code belongs to; None for code that a person reviewed
    package: PackageReport


def load_package(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    reviewed_sha256: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
    token: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> LoadedPackage:
    """Load a package from a folder or the Hub, strictly, and without running code that nobody has reviewed.

    The revision is resolved to a commit, the package's files are downloaded (never a pickle), and inspected as by
    `inspect_package`. What happens next depends on the SHA-256 of its Python files:

    - Code of this installed version is not run at all: the installed classes load the weights.
    - Code of another released version, or code that `reviewed_sha256` names, is run: exactly the bytes that were
      hashed.
    - Other code is refused. The error lists each file with its hash, and the command that shows how it differs.

    No option trusts all code. If the package has a record, the weights must match it.

    Everything is read from a private copy (see `stage`), with only the files that belong to a package, and only known
    JSON fields. Later changes to the folder do not affect the model.

    Args:
        source: a package's folder, or the id of a repository on the Hub (`owner/name`).
        revision: branch, tag or commit of the repository.
        reviewed_sha256: file name -> SHA-256 in hexadecimal, of code that you have read: `code_sha256` of the report of
            `inspect_package`. If a file named here has another hash, the package is refused.
        dtype: of the weights (the head stays float32); None keeps the package's own.
        token: for the Hub, instead of the one that huggingface_hub knows.
        cache_dir: the Hub's cache, instead of huggingface_hub's.
        local_files_only: use only the Hub's cache, without the network. Offline mode does the same.

    Raises:
        UntrustedCodeError: code that belongs to no released version, and was not reviewed.
        NotAPackageError, PackageError: a repository without a package, or with a pickle for its weights.
        MissingHeadError, PackageError: not complete.
        ChangedFileError: a file is not the one that was saved.
        UnsavableModelError: NaN or infinite weights.
        LoadError: transformers does not load it, or not strictly.
        TokenizerMismatchError: its tokenizer has ids that the model does not have.
        PackageChangedError: the folder was written to while it was being copied.
        ResourceLimitError: the folder for temporary files has no room for the copy.
        OptionsError: an option that a folder has no use for, or `reviewed_sha256` with something that is no hash.
        And everything that `inspect_package` raises.
    """
    options = HubOptions(revision, token, None if cache_dir is None else Path(cache_dir), local_files_only)
    reviewed = _checked(reviewed_sha256)
    repo_id, commit = repository_id(source, options), None
    if repo_id is None:
        folder = local_folder(source)
    else:
        from ..hub import download

        snapshot = download.fetch(repo_id, **vars(options))
        folder, commit = snapshot.folder, snapshot.commit
    with stage_package(folder) as copy:
        package = replace(inspect_stage(copy, os.fspath(source)), commit=commit)
        _refuse(package, MissingHeadError)
        release = _approve(package, reviewed)
        _refuse(replace(package, changed=tuple(sorted(set(package.changed) - set(reviewed)))), ChangedFileError)
        installed = release is not None and release.sha256 == layout.written_hashes()
        # what was hashed is what runs: nobody else can write to the copy
        code = set() if installed else set(release.sha256 if release else package.code_sha256) - {layout.HANDLER}
        loadable = make_loadable(copy, code)
        model = _load_model(loadable, package, dtype, by_installed_code=installed)
        tokenizer = None
        if package.tokenizer is not None:
            tokenizer = load_tokenizer(loadable, package.source, config=model.config)
            _refuse_other_vocabulary(package, tokenizer)
    return LoadedPackage(model, tokenizer, commit, release.version if release else None, package)


def _refuse_other_vocabulary(package: PackageReport, tokenizer: Any) -> None:
    """Refuse a tokenizer with ids that the model has no embedding for, as `save_package` does."""
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= package.vocab_size:
        raise TokenizerMismatchError(
            f"the tokenizer of {package.source} has the id {largest}, and its vocabulary ends at "
            f"{package.vocab_size - 1}",
            expected="no id that the model has no embedding for",
            next_step=AGAIN,
        )


def _checked(reviewed: Mapping[str, str] | None) -> dict[str, str]:
    """Check the reviewed hashes, and return them in lower case."""
    if reviewed is None:
        return {}
    if not isinstance(reviewed, Mapping):
        raise OptionsError(
            f"reviewed_sha256 is a {type(reviewed).__name__}",
            expected="a mapping: file name -> SHA-256",
            next_step="gpt2-value inspect prints names and hashes",
        )
    for name, digest in reviewed.items():
        if not isinstance(digest, str) or not re.fullmatch("[0-9a-fA-F]{64}", digest):
            raise OptionsError(
                f"reviewed_sha256 has {str(digest)[:80]!r} for {name!r}",
                expected="a SHA-256: 64 hexadecimal digits",
                next_step="gpt2-value inspect prints names and hashes",
            )
    return {name: digest.lower() for name, digest in reviewed.items()}


def _refuse(package: PackageReport, kind: type[GPT2ValueHubError]) -> None:
    """Refuse a package that `verify_package` would refuse with this type of error.

    Its other refusals do not matter for loading: foreign files are neither read nor run, and loading needs neither card
    nor record.
    """
    for refusal in refusals(package):
        if isinstance(refusal, kind):
            raise refusal


def _approve(package: PackageReport, reviewed: Mapping[str, str]) -> Release | None:
    """Return the release whose code the package has, or None if its code was reviewed; refuse any other code."""
    code = package.code_sha256
    changed = [name for name, digest in reviewed.items() if code.get(name) != digest]
    release = next((release for release in releases() if release.is_in(code)), None)
    if release is None or changed:
        installed = layout.written_hashes()
        unknown = sorted(
            name for name, digest in code.items() if digest not in (reviewed.get(name), installed.get(name))
        )
        if unknown or changed:
            raise _untrusted(package, code, unknown, changed)
        if not reviewed:
            raise PackageError(
                f"{package.folder} has no {', '.join(name for name in layout.REMOTE_CODE if name not in code)}",
                expected="all of the code that auto_map leads to",
                next_step="GPT2ValueModel.from_pretrained(FOLDER) loads it without; then save_package writes it all",
            )
    return release


def _untrusted(
    package: PackageReport, code: Mapping[str, str], unknown: list[str], changed: list[str]
) -> UntrustedCodeError:
    what = [f"{name} (sha256 {code[name]}) is no released version's and was not reviewed" for name in unknown]
    what += [
        f"{name} has sha256 {code[name]}, not the reviewed one"
        if name in code
        else f"{name} was reviewed and is not there"
        for name in changed
        if name not in unknown
    ]
    to_read = sorted({*unknown, *(name for name in changed if name in code)})
    where = f"{package.source} at {package.commit}" if package.commit else package.source
    return UntrustedCodeError(
        f"the code of {where} was not run: {'; '.join(what)}",
        expected="a released version's code, or code that a person has read",
        next_step=(
            f"read it: {' ; '.join(diff_command(package.folder / name) for name in to_read)} , and if it is good pass "
            f"reviewed_sha256={ {name: code[name] for name in to_read} }"
            if to_read
            else "review the package again: gpt2-value inspect"
        ),
    )


def _load_model(stage: Path, package: PackageReport, dtype: torch.dtype | None, *, by_installed_code: bool) -> Any:
    """Load the model strictly, and refuse weights that are not finite."""
    import torch
    from transformers import AutoModel

    from modeling_gpt2_value import GPT2ValueModel

    stored = max(package.dtypes, key=lambda name: package.dtypes[name])  # the body's: a head may differ
    options: dict[str, Any] = {
        "dtype": getattr(torch, stored) if dtype is None else dtype,
        "local_files_only": True,
        "use_safetensors": True,
        "output_loading_info": True,
    }
    with as_ours(lambda gist: _does_not_load(package, gist)):
        if by_installed_code:
            model, info = GPT2ValueModel.from_pretrained(stage, **options)
        else:
            model, info = AutoModel.from_pretrained(stage, trust_remote_code=True, **options)
    lost = {name: sorted(map(str, keys)) for name, keys in info.items() if keys}
    if lost:
        raise LoadError(
            f"{package.source} loads, but not strictly: {str(lost)[:500]}",
            expected="no key missing, unknown or of another shape",
            next_step=AGAIN,
        )
    damaged = list(not_finite(model.state_dict()))
    if damaged:
        raise UnsavableModelError(
            f"NaN or infinite values in {', '.join(damaged[:5])} of {package.source}",
            expected="finite weights",
            next_step=AGAIN if dtype is None else f"load it without dtype: {dtype} may not hold its numbers",
        )
    model.name_or_path = model.config._name_or_path = package.source
    model.config._commit_hash = package.commit
    return model


def _does_not_load(package: PackageReport, gist: str) -> GPT2ValueHubError:
    return LoadError(
        f"{package.source} does not load, because of its weights or its config: {gist}",
        expected="a package that this version of transformers can load",
        next_step=AGAIN,
    )
