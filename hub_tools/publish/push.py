"""Push a package: verify it, then make exactly one commit of what changed.

Imports the standard library, huggingface_hub, and of hub_tools `contents`, `hub`, `verify` and what these import; and
`save`, with torch and transformers, only inside `push_to_hub`.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitOperationDelete

from .. import layout
from ..errors import GPT2ValueHubError, PushOptionsError, TagExistsError
from ..hub.repository import Branch, Hub, Landed
from ..package.card import addressed, load_lines
from ..package.verify import verify_package
from .upload_set import Package, merge_cards

if TYPE_CHECKING:
    from torch import nn

MAIN = "main"
MESSAGE = "Push a value-head package"
PATIENCE = 300.0  # seconds
# Weights in other formats, under transformers' names: beside new weights they would be an older model's.
OTHER_WEIGHTS = re.compile(
    r"(pytorch_model(-\d{5}-of-\d{5})?\.bin|pytorch_model\.bin\.index\.json|model(-\d{5}-of-\d{5})?\.safetensors"
    r"|tf_model\.h5|flax_model\.msgpack)"
)


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
        create_pr: open a pull request instead of committing to main. (Pull requests name no parent: where the Hub acts
            on a request only after it has answered that it failed, there can be two.)
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
    return _push_folder(
        Path(folder),
        hub,
        trust_remote_code=trust_remote_code,
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
    from ..package.save import save_package

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
        return _push_folder(
            folder,
            hub,
            branch=revision or MAIN,
            private=private,
            create_pr=create_pr,
            tag=tag,
            message=commit_message,
            dry_run=dry_run,
        )


def _push_folder(folder: Path, hub: Hub, *, message: str, trust_remote_code: bool = False, **how: Any) -> PushReport:
    """Refuse what must not leave, verify, and push. `how`: the other arguments of `push`."""
    package = Package.read(folder)
    package.refuse_secrets(hub, message)
    verify_package(folder, trust_remote_code=trust_remote_code)
    return push(package, hub, message=message, **how)


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
        landed = Landed(base.commit)
        if not nothing:
            landed = _commit(package, hub, plan, base, message=message, create_pr=create_pr)
    report = replace(
        plan,
        commit=landed.commit,
        url=f"{hub.url}/commit/{landed.commit}",
        committed=not nothing,
        pr_url=f"{hub.url}/discussions/{landed.pr_number}" if landed.pr_number is not None else None,
        load_lines=load_lines(hub.repo_id, revision=landed.commit, tokenizer=layout.TOKENIZER_CONFIG in package.files),
    )
    if tag is not None:
        try:
            hub.tag(tag, commit=landed.commit)
        except GPT2ValueHubError as error:
            raise type(error)(
                f"the commit {landed.commit} did land, without its tag: {error.found}",
                expected=error.expected,
                next_step=f"{error.next_step}; the same push, run again, only sets the tag",
            ) from error
    return report


def _commit(package: Package, hub: Hub, plan: PushReport, base: Branch, *, message: str, create_pr: bool) -> Landed:
    """Upload what the plan adds and changes, and commit it with what it deletes."""
    files = {name: package.files[name] for name in (*plan.added, *plan.changed)}
    sources = {name: file.path if file.data is None else file.data for name, file in files.items()}
    deletions = [CommitOperationDelete(name, is_folder=False) for name in plan.deleted]
    try:
        with hub.uploaded(sources, branch=base.name, create_pr=create_pr) as additions:
            package.check_unchanged()
            return hub.commit([*additions, *deletions], onto=base, message=message, create_pr=create_pr)
    except (FileNotFoundError, ValueError):  # what huggingface_hub says of a file that is not there any more
        package.check_unchanged()
        raise


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
    """The package with the card that the repository gets: ours with its address, or theirs with our metadata.

    `scratch` holds what it is made from.
    """
    ours = package.files.get(layout.CARD)
    theirs = base.files.get(layout.CARD)
    if ours is None or ours.data is None:
        return package
    data = addressed(ours.data, hub.repo_id)
    if theirs is not None and not ours.is_as(theirs):
        data = merge_cards(data, hub.read(layout.CARD, commit=base.commit, folder=scratch / "cache"), scratch)
    return replace(package, files={**package.files, layout.CARD: replace(ours, data=data, size=len(data))})
