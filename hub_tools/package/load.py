"""Reviewed loading: inspect a package, and load it only if its code is known, or was read by a person.

Code is trusted by its bytes, never because of its repository. The idea is skops':
https://skops.readthedocs.io/en/stable/persistence.html.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import layout
from ..errors import (
    AGAIN,
    ChangedFileError,
    LoadError,
    MissingHeadError,
    UnsavableModelError,
    UntrustedCodeError,
    as_ours,
)
from .inspect import PackageReport, inspect_stage
from .record import diff_command, release_of, releases
from .stage import Stage, make_loadable, stage_package
from .tokenizer import check_tokenizer, load_tokenizer
from .verify import does_not_run, refusals
from .weights import not_finite

MODELING = "modeling_gpt2_value"

if TYPE_CHECKING:
    import torch

    from modeling_gpt2_value import GPT2ValueModel


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
    JSON fields. Later changes to the folder do not affect the model. The model is run once, on 16 tokens, before it is
    returned.

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
        LoadError: it does not load, or not strictly; or it does not run here, or gives NaN.
        TokenizerMismatchError: its tokenizer has ids that the model does not have.
        ResourceLimitError: the folder for temporary files has no room for the copy.
        OptionsError: an option that a folder has no use for.
        TypeError, ValueError: `reviewed_sha256` is no mapping.
        And everything that `inspect_package` raises.
    """
    reviewed = {name: str(digest).lower() for name, digest in dict(reviewed_sha256 or {}).items()}
    with stage_package(
        source, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
    ) as copy:
        package = inspect_stage(copy, os.fspath(source))
        release = _approve(package, reviewed)
        for refusal in refusals(replace(package, changed=tuple(sorted(set(package.changed) - set(reviewed))))):
            # nothing foreign is read or run, and loading needs neither card nor record
            if isinstance(refusal, (MissingHeadError, ChangedFileError)):
                raise refusal
        code = releases()[release] if release else package.code_sha256
        make_loadable(copy, code)
        model = _load(copy, package, code, dtype)
        _check_model(model, package)
        tokenizer = None
        if package.tokenizer is not None:
            tokenizer = load_tokenizer(copy.folder, package.source, config=model.config)
            check_tokenizer(tokenizer, package.vocab_size)
    model.name_or_path = model.config._name_or_path = package.source
    model.config._commit_hash = package.commit
    return LoadedPackage(model, tokenizer, package.commit, release, package)


def _load(copy: Stage, package: PackageReport, code: Mapping[str, str], dtype: torch.dtype | None) -> Any:
    """Return the model of a reduced copy, strictly: by the installed classes if their code is the same."""
    import torch

    def fails(gist: str) -> LoadError:
        return LoadError(
            f"{package.source} does not load, because of its weights or its config: {gist}",
            expected="a package that loads strictly in this version of transformers",
            next_step=AGAIN,
        )

    stored = max(package.dtypes, key=lambda name: package.dtypes[name])  # the body's: a head may differ
    with as_ours(fails):
        model, info = _imported(copy, code).GPT2ValueModel.from_pretrained(
            copy.folder,
            dtype=dtype or getattr(torch, stored),
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    lost = {name: sorted(map(str, keys)) for name, keys in info.items() if keys}
    if lost:
        raise fails(f"keys that are missing, unknown or of another shape: {str(lost)[:500]}")
    return model.eval()


def _imported(copy: Stage, code: Mapping[str, str]) -> Any:
    """Return the module of the model: the installed one, or the code that was hashed, from a private folder that lives
    as long as this process. Nothing that lies in transformers' shared cache of modules is read, compiled or not."""
    if code == layout.installed_hashes():
        return importlib.import_module(MODELING)
    digest = hashlib.sha256(repr(sorted(code.items())).encode()).hexdigest()
    package = f"gpt2_value_code_{digest[:32]}"
    if package not in sys.modules:
        home = tempfile.TemporaryDirectory(prefix="gpt2-value-code-", ignore_cleanup_errors=True)
        for name in code:
            shutil.copyfile(copy.folder / name, Path(home.name, name))
        spec = ModuleSpec(package, None, is_package=True)
        spec.submodule_search_locations = [home.name]
        module = importlib.util.module_from_spec(spec)
        module.__dict__["_home"] = home  # removed when the process ends
        sys.modules[package] = module
    return importlib.import_module(f"{package}.{MODELING}")


def _check_model(model: Any, package: PackageReport) -> None:
    """Refuse weights that are not finite, and a model that does not run here, or gives NaN."""
    from .sharded import computed

    if damaged := not_finite(model.state_dict()):
        raise UnsavableModelError(
            f"NaN or infinite values in {', '.join(damaged[:5])} of {package.source}",
            expected="finite weights",
            next_step=f"load it without dtype=, which may not hold its numbers; or {AGAIN}",
        )
    try:
        numbers = computed(model)
    except UnsavableModelError as error:
        raise does_not_run(package, error.found) from error
    for name in not_finite(numbers):
        raise LoadError(
            f"{package.source} gives NaN or infinite {name}, though none of its weights is: some are too large",
            expected="a model that computes finite numbers",
            next_step="load it without dtype=, which may overflow; or ask its author for one",
        )


def _approve(package: PackageReport, reviewed: Mapping[str, str]) -> str | None:
    """Return the release whose code the package has, or None if its code was reviewed; refuse any other code."""
    code = package.code_sha256
    release = release_of(code)
    known = {**(code if release else layout.installed_hashes()), **reviewed}
    needed = reviewed if release or reviewed else known
    wrong = [name for name in sorted({*code, *needed}) if code.get(name) != known.get(name)]
    if not wrong:
        return release
    where = f"{package.source} at {package.commit}" if package.commit else package.source
    to_read = {name: code[name] for name in wrong if name in code}
    raise UntrustedCodeError(
        f"the code of {where} was not run, since no release has it and it was not reviewed: "
        + ", ".join(f"{name} (sha256 {code[name]})" if name in code else f"{name} (not there)" for name in wrong),
        expected="a released version's code, all of it, or code that a person has read",
        next_step=f"read it: {diff_command(package.source, package.commit)} , and if it is good pass "
        f"reviewed_sha256={to_read}"
        if to_read
        else "review the package again: gpt2-value inspect",
    )
