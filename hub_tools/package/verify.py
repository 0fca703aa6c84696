"""Load a package in a fresh interpreter, strictly, and compare what it computes with its record.

`probe.py` is run, not imported. The fresh interpreter is isolated (`python -I`): no checkout, no PYTHONPATH, no caches,
no token, no network.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

from .. import layout, limits
from ..errors import (
    AGAIN,
    ChangedFileError,
    GPT2ValueHubError,
    LoadError,
    MissingHeadError,
    PackageError,
    UntrustedCodeError,
    VerificationError,
    as_ours,
)
from ..limited_process import failure_of, run_limited, search_path_of
from .inspect import PackageReport, inspect_stage
from .record import PROBE_TEXT, Record, diff_command, read_record, release_of
from .stage import make_loadable, stage_package

TOLERANCE = 1e-5  # of the largest recorded number, or of 1 if that is larger
PROBE_SCRIPT = Path(__file__).with_name("probe.py")
HIDDEN_MODULES = (*(name.removesuffix(".py") for name in layout.REMOTE_CODE), "hub_tools", "sampler_audit")


@dataclass(frozen=True)
class VerificationReport:
    """A package that loaded in a fresh interpreter and computed the recorded numbers."""

    max_logit_difference: float  # absolute, also over the log of the softmax's denominator
    max_value_difference: float  # absolute
    package: PackageReport

    def __str__(self) -> str:
        return (
            f"{self.package.source} verified: logits differ by at most {self.max_logit_difference:.2g}, "
            f"values by {self.max_value_difference:.2g}"
        )


def verify_package(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    timeout: float = limits.VERIFY_SECONDS,
    token: str | None = None,
) -> VerificationReport:
    """Check that a package loads, strictly, and computes the same as when it was saved.

    The package is copied to a private folder (see `stage`) and inspected there, as by `inspect_package`, with the hash
    of every file. Then an isolated interpreter calls `AutoModel.from_pretrained(folder, trust_remote_code=True)` on the
    same copy. This interpreter has torch and transformers, and cannot import this project. No key may be missing,
    unknown or of another shape. Every weight must be finite. Logits and values on the recorded probe must agree to 1e-5
    of the largest recorded number (or of 1, if that is larger). The tolerance is the same for all dtypes, because both
    sides compute in float32, and bfloat16 and float16 weights convert to float32 exactly.

    This *runs the package's code*. Code that is byte-identical to a released version's, or to this installed one's, is
    always run. Other code is refused unless you pass `trust_remote_code=True` (as in transformers). The fresh
    interpreter is no sandbox: it protects from mistakes, not from malicious code.

    Args:
        source: a package's folder, or the id of a repository on the Hub (`owner/name`), which is downloaded.
        revision: branch, tag or commit of the repository.
        trust_remote_code: run code that is no released version's.
        timeout: seconds that the fresh interpreter may take.
        token: for the Hub, instead of the one that huggingface_hub knows.

    Raises:
        UntrustedCodeError: code that is no released version's, and `trust_remote_code` is off.
        PackageError, MissingHeadError: not complete, or not only a package.
        ChangedFileError: a file is not the one that was saved.
        LoadError: it does not load, or not strictly, or with NaN or infinite weights, or not within `timeout`.
        VerificationError: it computes other numbers, or its tokenizer gives other ids.
        And everything that `inspect_package` raises.
    """
    with stage_package(source, revision=revision, token=token) as copy:
        package = inspect_stage(copy, os.fspath(source))
        for refusal in refusals(package):
            if not (trust_remote_code and isinstance(refusal, UntrustedCodeError)):
                raise refusal
        record = read_record(copy.folder)
        found = _run(package, make_loadable(copy, package.code_sha256), record, timeout)
    with as_ours(lambda gist: PackageError(f"{layout.RECORD} holds other things than numbers: {gist}")):
        theirs = (*found["logits"], found["logsumexp"])
        logit_difference = _compare("logits", (*record.logits, record.logsumexp), theirs)
        value_difference = _compare("values", record.values, found["values"])
        _compare("tokenizer's ids", [record.tokenizer_ids or []], [found["tokenizer_ids"] or []])
    return VerificationReport(logit_difference, value_difference, package)


def _compare(what: str, recorded: Iterable[Sequence[float]], found: Iterable[Sequence[float]]) -> float:
    """Return the largest absolute difference.

    Raises:
        VerificationError: it is too large, or there are other numbers than recorded.
    """
    ours, theirs = ([*chain.from_iterable(rows)] for rows in (recorded, found))
    tolerance = min(TOLERANCE * max([1.0, *map(abs, ours)]), 0.5)  # ids differ by 1
    differences = [abs(one - other) for one, other in zip(ours, theirs, strict=False)]
    if len(ours) != len(theirs) or not all(each <= tolerance for each in differences):  # NaN is not
        raise VerificationError(
            f"the {what} differ from the recorded ones by {max(differences, default=0.0):.3g} ({len(theirs)} "
            f"for {len(ours)} numbers)",
            expected=f"at most {tolerance:.3g}",
            next_step="save the package again; if it was saved with other versions of torch and transformers (see "
            "gpt2-value inspect), verify with those, to see which of the two changed the numbers",
        )
    return max(differences, default=0.0)


def refusals(package: PackageReport) -> list[GPT2ValueHubError]:
    """Return an error for each finding of `inspect_package` that `verify_package` refuses; it raises the first.

    These are a missing head, files that are missing, foreign or changed, pickles, and code of another version.
    """
    installed = layout.installed_hashes()
    other = [name for name, digest in package.code.items() if digest != installed.get(name)]
    ours = release_of(package.code_sha256) is not None
    findings: list[Any] = [
        (
            MissingHeadError,
            () if package.head else (layout.HEAD_PREFIX,),
            "no value head in the weights",
            "GPT2ValueModel.from_pretrained(FOLDER, init_value_head=True) gives it a new one; save_package writes it",
        ),
        (
            PackageError,
            package.missing,
            "missing from the package",
            "GPT2ValueModel.from_pretrained(FOLDER), then save_package writes it all",
        ),
        (
            PackageError,
            (*package.pickles, *package.foreign),
            "files that do not belong to a package (a pickle can run code when it is opened)",
            "move them out of the package",
        ),
        (
            UntrustedCodeError,
            () if ours else other,
            "code of no released version; it was not run",
            f"read it: {diff_command(package.source)}; then pass trust_remote_code=True (--trust-remote-code)",
        ),
        (
            ChangedFileError,
            package.changed,
            f"not as saved (compared by SHA-256 with {layout.RECORD})",
            "download the package again; after editing on purpose, load it and save_package it",
        ),
    ]
    return [
        kind(
            f"{package.source}: {', '.join(map(repr, names))}: {what}",
            expected="the files that save_package writes, byte for byte, and documents beside them",
            next_step=next_step,
        )
        for kind, names, what, next_step in findings
        if names
    ]


def _run(package: PackageReport, folder: Path, record: Record, timeout: float) -> Any:
    """Run `probe.py` on `folder`, a copy of the package, in an isolated interpreter, and return its result."""
    job = {
        "folder": str(folder),
        "token_ids": record.token_ids,
        "logit_ids": record.logit_ids,
        "text": PROBE_TEXT if record.tokenizer_ids is not None else None,
        "hidden_modules": HIDDEN_MODULES,
        "search_path": search_path_of("torch", "transformers"),
    }
    with tempfile.TemporaryDirectory(prefix="gpt2-value-verify-") as home:
        done = run_limited(
            PROBE_SCRIPT,
            # not RLIMIT_AS, since torch reserves many times the address space that it uses
            limits={"RLIMIT_DATA": limits.verify_memory(package.parameters)},
            seconds=timeout,
            environment={**dict.fromkeys(("HOME", "HF_HOME", "TMPDIR", "TEMP"), home), "HF_HUB_OFFLINE": "1"},
            input=json.dumps(job),
            cwd=home,
        )
        if problem := failure_of(done):
            raise does_not_run(package, problem, details=done.stderr)
        with as_ours(lambda gist: does_not_run(package, gist)):
            return json.loads(Path(home, "result.json").read_text(encoding="utf-8"))


def does_not_run(package: PackageReport, found: str, *, details: str = "") -> LoadError:
    """Return the error for a package whose code does not run here."""
    return LoadError(
        f"{package.source} does not run on transformers {version('transformers')}: {found}",
        expected="AutoModel.from_pretrained(FOLDER, trust_remote_code=True) to succeed, and a forward pass",
        next_step="if an older version wrote it, write it again with this version's code: gpt2-value convert FOLDER "
        f"OUT; give it longer: timeout=... (--timeout); else {AGAIN}",
        details=details,
    )
