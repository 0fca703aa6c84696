"""Push a package: verify it, then make exactly one commit of what changed.

Imports the standard library, huggingface_hub, and of hub_tools `hub`, `verify`, `card` and what these import; torch
and transformers only inside `push_to_hub`. How a commit is made: https://huggingface.co/docs/hub/api, `HfApi.create_commit`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import CommitOperationDelete, metadata_load, metadata_save

from . import layout
from .errors import (
    CardMetadataError,
    ForeignFileError,
    GPT2ValueHubError,
    NotAPackageError,
    PackageChangedError,
    PickleError,
    PushOptionsError,
    SecretFoundError,
    TagExistsError,
)
from .hub import Branch, Hub, RemoteFile
from .reading import MIB, file_in
from .verify import verify_package

if TYPE_CHECKING:
    from torch import nn

MAIN = "main"
MESSAGE = "Push a value-head package"
PATIENCE = 300.0  # seconds
IN_MEMORY = 8 * MIB  # files up to this size are read once; larger ones stay on the disk
# Weights in other formats, under transformers' names: beside new weights they would be an older model's.
OTHER_WEIGHTS = re.compile(
    r"(pytorch_model(-\d{5}-of-\d{5})?\.bin|pytorch_model\.bin\.index\.json|model(-\d{5}-of-\d{5})?\.safetensors"
    r"|tf_model\.h5|flax_model\.msgpack)"
)
TOKEN_LIKE = re.compile(rb"\b(hf_[A-Za-z0-9]{30,}|api_org_[A-Za-z0-9]{30,})\b")


@dataclass(frozen=True)
class PushReport:
    """What a push did, or with `dry_run` would do. File tables map names to bytes."""

    repo_id: str
    revision: str  # the branch pushed to
    commit: str | None  # the commit that holds the package; None in a dry run
    url: str | None  # of that commit
    committed: bool  # False where nothing had changed, and in a dry run
    dry_run: bool
    added: dict[str, int]
    changed: dict[str, int]
    deleted: dict[str, int]
    unchanged: dict[str, int]
    kept: dict[str, int]  # files in the repository that are not a package's, and are left alone
    new_repository: bool
    new_branch: bool
    tag: str | None
    pr_url: str | None  # with `create_pr`
    load_lines: str | None  # the lines that load exactly this commit; None in a dry run

    @property
    def upload_size(self) -> int:
        """Bytes of the files that are added or changed."""
        return sum(self.added.values()) + sum(self.changed.values())

    def __str__(self) -> str:
        verb = "would push" if self.dry_run else "pushed" if self.committed else "nothing to push: unchanged"
        lines = [f"{self.repo_id} ({self.revision}): {verb}"]
        if self.new_repository or self.new_branch:
            lines.append(f"  new {'repository' if self.new_repository else 'branch'}")
        for what, files in (("add", self.added), ("change", self.changed), ("delete", self.deleted)):
            lines += [f"  {what:<6} {name}  {size:,} bytes" for name, size in files.items()]
        if self.added or self.changed:
            lines.append(f"  upload at most {self.upload_size:,} bytes; {len(self.unchanged)} files are unchanged")
        if self.kept:
            lines.append(f"  keep   {', '.join(self.kept)}")
        lines += [f"  {what:<6} {text}" for what, text in (("pr", self.pr_url), ("url", self.url)) if text]
        return "\n".join([*lines, *(["", self.load_lines] if self.load_lines else [])])


def push_package(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    revision: str | None = None,
    private: bool | None = None,
    create_pr: bool = False,
    tag: str | None = None,
    commit_message: str = MESSAGE,
    token: str | None = None,
    dry_run: bool = False,
    trust_remote_code: bool = False,
    patience: float = PATIENCE,
) -> PushReport:
    """Verify a package, then push it in exactly one commit, which either happens or does not.

    What the repository has already is not uploaded again; if nothing changed, there is no commit. Weights of ours that
    no longer belong (other shards, other formats) are deleted in the same commit, and so are tokenizer files that the
    new tokenizer does not have. All other files in the repository stay. A card that is there keeps its text and its
    own metadata; the package's metadata is merged into it.

    The commit names the parent that was read, so nobody's concurrent push is overwritten. Faults that pass (409, 429,
    5xx, broken connections) are retried; an answer that got lost is looked for on the branch before anything is sent
    again. A push that failed can be run again.

    Args:
        folder: a package, as `save_package` writes it.
        repo_id: `name` or `owner/name`. The repository is created if there is none.
        revision: the branch to push to (default: main); created from main if there is none.
        private: visibility of a repository that is created. For one that exists it must be as it is.
        create_pr: open a pull request instead of committing to main.
        tag: a tag for the commit; it must be free, or on this commit already.
        commit_message: the commit's title.
        token: a user access token; default is the one that huggingface_hub knows.
        dry_run: change nothing on the Hub; report what would be.
        trust_remote_code: verify also a package whose code is not this installed version's, which runs that code.
        patience: seconds for which one request may keep failing before the push gives up.

    Raises:
        Everything that `verify_package` raises, and
        ForeignFileError, PickleError, UnsafeFileError: a file that does not belong to a package.
        SecretFoundError: a text that holds a token.
        PushOptionsError: arguments that do not fit each other or the repository.
        CardMetadataError: the card in the repository has metadata that cannot be read.
        AuthenticationError, NoAccessError, RemoteNotFoundError: 401, 403, 404; never retried.
        HubUnavailableError: the Hub kept failing for longer than `patience`.
        HubRefusedError: any other refusal.
        ConcurrentPushError: somebody pushed at the same time. Theirs stands.
        PackageChangedError: the package was written to during the push. Nothing was committed.
        TagExistsError: the tag is on another commit.
    """
    _check_options(revision=revision, create_pr=create_pr, tag=tag)
    hub = Hub(repo_id, token=token, patience=patience)
    hub.check_token()
    package = Package.read(Path(folder))
    package.refuse_secrets(hub, commit_message)
    verify_package(folder, trust_remote_code=trust_remote_code)
    return push(
        package,
        hub,
        branch=revision or MAIN,
        private=private,
        create_pr=create_pr,
        tag=tag,
        message=commit_message,
        dry_run=dry_run,
    )


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    tokenizer: Any = None,
    *,
    base_model: str | None = None,
    license: str | None = None,
    tags: Sequence[str] = (),
    max_shard_size: int | str = "5GB",
    revision: str | None = None,
    private: bool | None = None,
    create_pr: bool = False,
    tag: str | None = None,
    commit_message: str = MESSAGE,
    token: str | None = None,
    dry_run: bool = False,
    patience: float = PATIENCE,
) -> PushReport:
    """Save a model as a package in a temporary folder, and push that: `save_package`, then `push_package`.

    Args:
        model, tokenizer, base_model, license, tags, max_shard_size: as in `save_package`. `tags` are the card's.
        repo_id, revision, private, create_pr, tag, commit_message, token, dry_run, patience: as in `push_package`.
            `tag` is git's.

    Raises:
        Everything that `save_package` and `push_package` raise.
    """
    from .save import save_package

    _check_options(revision=revision, create_pr=create_pr, tag=tag)
    hub = Hub(repo_id, token=token, patience=patience)
    hub.check_token()
    with tempfile.TemporaryDirectory(prefix="gpt2-value-push-") as home:
        folder = Path(home, "package")
        save_package(
            model,
            folder,
            tokenizer,
            base_model=base_model,
            license=license,
            tags=tags,
            repo_id=hub.repo_id,
            max_shard_size=max_shard_size,
        )
        package = Package.read(folder)
        package.refuse_secrets(hub, commit_message)
        verify_package(folder)
        return push(
            package,
            hub,
            branch=revision or MAIN,
            private=private,
            create_pr=create_pr,
            tag=tag,
            message=commit_message,
            dry_run=dry_run,
        )


@dataclass(frozen=True)
class LocalFile:
    """A file of a package. What is small was read once; what is large is on the disk, and hashed once."""

    path: Path
    size: int
    identity: tuple[int, ...]  # of the file on the disk: another one after every write
    data: bytes | None

    @cached_property
    def sha256(self) -> str:
        return layout.sha256_of(self.path) if self.data is None else hashlib.sha256(self.data).hexdigest()

    def is_as(self, remote: RemoteFile | None) -> bool:
        """Whether the Hub has this very content. Git hashes a file as `blob <size>\\0<content>`."""
        if remote is None or remote.size != self.size:
            return False
        if remote.sha256 is not None:
            return remote.sha256 == self.sha256
        data = self.path.read_bytes() if self.data is None else self.data
        return remote.git_oid == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass(frozen=True)
class Package:
    """The files of a package that a push takes along, as they were when it began."""

    folder: Path
    files: Mapping[str, LocalFile] = field(repr=False)

    @classmethod
    def read(cls, folder: Path) -> Package:
        """Read a package's files; what does not belong to a package is refused by name.

        Raises:
            NotAPackageError: no such folder.
            ForeignFileError, PickleError, UnsafeFileError: see `push_package`.
        """
        if not folder.is_dir():
            raise NotAPackageError(
                f"{os.fspath(folder)!r} is not a folder",
                expected="the folder of a package",
                next_step="write one: hub_tools.save_package(model, FOLDER)",
            )
        names = sorted(name for name in os.listdir(folder) if layout.kind_of(name) != "litter")
        foreign = [n for n in names if layout.kind_of(n) == "foreign" or (n.startswith(".") and n != ".gitignore")]
        if foreign:
            raise ForeignFileError(
                f"{', '.join(map(repr, foreign))} do not belong to a package; nothing was uploaded",
                expected="the files that save_package writes, and documents beside them",
                next_step="move them out of the folder; push other files on their own: hf upload",
            )
        pickles = [name for name in names if layout.kind_of(name) == "pickle"]
        if pickles:
            raise PickleError(
                f"{', '.join(map(repr, pickles))}: pickles, which can run code when they are opened",
                expected="weights in safetensors, and nothing else",
                next_step="move them out of the folder",
            )
        return cls(folder, {name: _read_file(file_in(folder, name)) for name in names})

    def refuse_secrets(self, hub: Hub, message: str) -> None:
        """Refuse to publish a token, the one in use or any other of the Hub's.

        Raises:
            SecretFoundError: naming the file.
        """
        texts = {name: file.data for name, file in self.files.items() if file.data is not None}
        for name, data in {**texts, "the commit message": message.encode()}.items():
            if hub.holds_token(data) or TOKEN_LIKE.search(data):
                raise SecretFoundError(
                    f"{name} holds what looks like a Hub token; nothing was uploaded",
                    next_step="take it out; if it was ever published, revoke it in the Hub's settings",
                )

    def check_unchanged(self) -> None:
        """Raises:
        PackageChangedError: a file was written to, replaced or removed since the package was read.
        """
        for name, file in self.files.items():
            if not file.path.exists() or _identity(file.path) != file.identity:
                raise PackageChangedError(
                    f"{name} changed in {self.folder} during the push; nothing was committed",
                    expected="a package that stays as it is until the push is done",
                    next_step="push again once nothing writes to it",
                )


def push(
    package: Package,
    hub: Hub,
    *,
    branch: str,
    private: bool | None,
    create_pr: bool,
    tag: str | None,
    message: str,
    dry_run: bool,
) -> PushReport:
    """Push a package that was verified, with a token that was checked. Arguments and errors as in `push_package`."""
    is_private = hub.is_private()
    new_repository = is_private is None
    if not new_repository and private not in (None, is_private):
        raise PushOptionsError(
            f"private={private}, and {hub.repo_id} is {'private' if is_private else 'public'} already",
            next_step=f"change it in {hub.url}/settings, or leave out private",
        )
    if new_repository and not dry_run:
        hub.create(private=private)
    base = Branch(branch, "", {}, exists=False, tags={}) if new_repository and dry_run else hub.read_branch(branch)
    with tempfile.TemporaryDirectory(prefix="gpt2-value-card-") as scratch:
        package = _with_remote_card(package, hub, base, Path(scratch))
        plan = _plan(package, base)
        plan = replace(plan, repo_id=hub.repo_id, new_repository=new_repository, new_branch=not base.exists, tag=tag)
        at = base.tags.get(tag) if tag is not None else None
        nothing = not (plan.added or plan.changed or plan.deleted)
        if at is not None and not (nothing and at == base.commit):
            raise TagExistsError(
                f"the tag {tag!r} is on {at} already; nothing was committed",
                expected="a free tag",
                next_step="choose another, or delete that one first: hf repos tag delete",
            )
        if dry_run:
            return replace(plan, dry_run=True)
        if not base.exists:
            hub.create_branch(base)
        commit, pr_number = base.commit, None
        if not nothing:
            changed = [*plan.added, *plan.changed]
            sources = {name: package.files[name] for name in changed}
            try:
                additions = hub.upload(
                    {n: f.path if f.data is None else f.data for n, f in sources.items()},
                    branch=branch,
                    create_pr=create_pr,
                )
            except FileNotFoundError:
                package.check_unchanged()
                raise
            package.check_unchanged()
            landed = hub.commit(
                [*additions, *(CommitOperationDelete(name, is_folder=False) for name in plan.deleted)],
                onto=base,
                message=message,
                create_pr=create_pr,
            )
            commit, pr_number = landed.commit, landed.pr_number
    report = replace(
        plan,
        commit=commit,
        url=f"{hub.url}/commit/{commit}",
        committed=not nothing,
        pr_url=f"{hub.url}/discussions/{pr_number}" if pr_number is not None else None,
        load_lines=_load_lines(hub.repo_id, commit, tokenizer=layout.TOKENIZER_CONFIG in package.files),
    )
    if tag is not None:
        try:
            hub.tag(tag, commit=commit)
        except GPT2ValueHubError as error:
            raise type(error)(
                f"the commit {commit} did land, without its tag: {error.found}",
                expected=error.expected,
                next_step=f"{error.next_step}; the same push, run again, only sets the tag",
            ) from error
    return report


def _check_options(*, revision: str | None, create_pr: bool, tag: str | None) -> None:
    if create_pr and revision not in (None, MAIN):
        raise PushOptionsError(
            f"create_pr=True with revision {revision!r}", expected="main", next_step="leave out one of the two"
        )
    if create_pr and tag is not None:
        raise PushOptionsError(
            f"create_pr=True with tag {tag!r}", expected="one of them", next_step="tag the commit once it is merged"
        )


def _plan(package: Package, base: Branch) -> PushReport:
    """What turns the branch into one that holds the package."""
    files = package.files
    same = {name for name, file in files.items() if file.is_as(base.files.get(name))}
    kinds = {layout.kind_of(name) for name in files}

    def stale(name: str) -> bool:
        kind = layout.kind_of(name)
        return name not in files and (
            kind == "weights" or OTHER_WEIGHTS.fullmatch(name) is not None or (kind == "tokenizer" and kind in kinds)
        )

    return PushReport(
        repo_id="",
        revision=base.name,
        commit=None,
        url=None,
        committed=False,
        dry_run=False,
        added={name: file.size for name, file in files.items() if name not in base.files},
        changed={n: file.size for n, file in files.items() if n in base.files and n not in same},
        deleted={name: file.size for name, file in base.files.items() if stale(name)},
        unchanged={name: file.size for name, file in files.items() if name in same},
        kept={name: f.size for name, f in base.files.items() if name not in files and not stale(name)},
        new_repository=False,
        new_branch=False,
        tag=None,
        pr_url=None,
        load_lines=None,
    )


def _with_remote_card(package: Package, hub: Hub, base: Branch, scratch: Path) -> Package:
    """The package with the repository's own card, into which ours was merged. `scratch` holds what it is made from."""
    ours = package.files.get(layout.CARD)
    theirs = base.files.get(layout.CARD)
    if ours is None or ours.data is None or theirs is None or ours.is_as(theirs):
        return package
    merged = merge_cards(ours.data, hub.read(layout.CARD, commit=base.commit, folder=scratch / "cache"), scratch)
    return replace(package, files={**package.files, layout.CARD: replace(ours, data=merged, size=len(merged))})


def merge_cards(ours: bytes, theirs: bytes, scratch: Path) -> bytes:
    """Their card with our metadata: our keys replace theirs, tags are united, all else of theirs stays.

    A card without text, as the Hub's web page makes one from a license, gets our text.

    Raises:
        CardMetadataError: their metadata cannot be read.
    """
    our_path, their_path = scratch / "ours.md", scratch / "theirs.md"
    our_path.write_bytes(ours)
    their_path.write_bytes(theirs)
    try:
        kept: dict[str, Any] = metadata_load(their_path) or {}
        added: dict[str, Any] = metadata_load(our_path) or {}
    except (ValueError, yaml.YAMLError) as error:
        raise CardMetadataError(
            f"the metadata of the README.md in the repository cannot be read: {' '.join(str(error).split())[:300]}",
            expected="a block of YAML between two lines of ---",
            next_step="correct it on the Hub, or delete that file there to get a new card",
        ) from error
    tags = kept.get("tags") or []
    tags = [tags] if isinstance(tags, str) else tags
    merged = {**kept, **added}
    if tags or added.get("tags"):
        merged["tags"] = [*tags, *(tag for tag in added.get("tags", []) if tag not in tags)]
    body = re.sub(rb"\A\s*---\r?\n.*?\n---", b"", theirs, count=1, flags=re.DOTALL)
    if not body.strip():
        metadata_save(our_path, merged)
        return our_path.read_bytes()
    if merged == kept:
        return theirs
    metadata_save(their_path, merged)
    return their_path.read_bytes()


def _read_file(path: Path) -> LocalFile:
    identity, size = _identity(path), path.stat().st_size
    data = path.read_bytes() if size <= IN_MEMORY and layout.kind_of(path.name) != "weights" else None
    return LocalFile(path, size if data is None else len(data), identity, data)


def _identity(path: Path) -> tuple[int, ...]:
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _load_lines(repo_id: str, commit: str, *, tokenizer: bool) -> str:
    arguments = f"{json.dumps(repo_id)}, revision={json.dumps(commit)}, trust_remote_code=True"
    lines = [
        f"from transformers import AutoModel{', AutoTokenizer' if tokenizer else ''}",
        f"model = AutoModel.from_pretrained({arguments})",
    ]
    if tokenizer:  # transformers 5 reads config.json by the package's code to find the tokenizer's class, and asks
        lines.append(f"tokenizer = AutoTokenizer.from_pretrained({arguments})")
    return "\n".join(lines)
