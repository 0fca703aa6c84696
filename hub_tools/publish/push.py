"""Push a package: verify it, then make exactly one commit of what changed.

Imports the standard library, huggingface_hub, and of hub_tools `report`, `upload_set`, `hub`, `verify`, `card` and what
these import; and `save` and `sharded`, with torch and transformers, only inside `push_to_hub`.
"""

from __future__ import annotations

import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitOperationDelete

from .. import layout
from ..errors import GPT2ValueHubError, OptionsError
from ..hub.repository import Branch, Hub, PushedCommit
from ..package.card import load_lines, with_repo_id
from ..package.verify import verify_package
from .report import MAIN, MESSAGE, PushOptions, PushPlan, PushReport
from .upload_set import Package, merge_cards

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger(__name__)

PATIENCE = 300.0  # seconds
# Weights in other formats, under transformers' names. Next to new weights they would be those of an older model.
OTHER_WEIGHTS = re.compile(
    r"(pytorch_model(-\d{5}-of-\d{5})?\.bin|pytorch_model\.bin\.index\.json|model(-\d{5}-of-\d{5})?\.safetensors"
    r"|tf_model\.h5|flax_model\.msgpack)"
)


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
    """Verify a package, then push it in exactly one commit. It is pushed as a whole or not at all.

    Files that the repository has already are not uploaded again; if nothing changed, there is no commit. Stale weights
    (other shards, other formats) are deleted in the same commit, and so are tokenizer files that the new tokenizer does
    not have. All other files in the repository stay. An existing card keeps its text and its own metadata; the
    package's metadata is merged into it.

    The commit names the parent that was read, so it cannot overwrite a concurrent push. Temporary faults (409, 429,
    5xx, broken connections) are retried. If the answer to a commit is lost, the push first looks for the commit on the
    branch, and only then sends it again. A push that failed can be run again.

    Args:
        folder: a package, as `save_package` writes it.
        repo_id: `name` or `owner/name`. The repository is created if there is none.
        revision: the branch to push to (default: main); created from main if there is none.
        private: visibility of a repository that is created. For an existing one, pass its own visibility or None.
        create_pr: open a pull request instead of committing to main. (Pull requests name no parent. If the Hub reports
            a failure and still acts on the request, the retry opens a second pull request.)
        tag: a tag for the commit; it must be free, or on this commit already.
        commit_message: the commit's title.
        token: a user access token; default is the one that huggingface_hub knows.
        dry_run: change nothing on the Hub; report what a push would do.
        trust_remote_code: also verify, and so run, code that is not this installed version's.
        patience: seconds for which one request may keep failing before the push gives up.

    Raises:
        Everything that `verify_package` raises, and
        PackageError: a file that does not belong to a package.
        SecretFoundError: a text file or the commit message holds a token.
        OptionsError: arguments that do not fit each other or the repository.
        OptionsError: the card in the repository has metadata that cannot be read.
        AuthenticationError, RemoteNotFoundError: 401, 403, 404; never retried.
        HubUnavailableError: the Hub kept failing for longer than `patience`.
        HubRefusedError: any other refusal.
        ConcurrentPushError: somebody pushed at the same time. Theirs stands.
        PackageChangedError: the package was written to during the push. Nothing was committed.
        OptionsError: the tag is on another commit.
    """
    options = PushOptions(revision or MAIN, private, create_pr, tag, commit_message, dry_run=dry_run)
    hub = open_repository(repo_id, token=token, patience=patience)
    package = read_verified(Path(folder), hub, options, trust_remote_code=trust_remote_code)
    return push(package, hub, options)


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    tokenizer: Any = None,
    *,
    base_model: str | None = None,
    license: str | None = None,
    tags: Sequence[str] = (),
    max_shard_size: int | str = "5GB",
    handler: bool = False,
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

    A model that FSDP2 shards is pushed in all processes by the same call, as in `save_package`. They wait for the
    first, which pushes: where that may outlast the process group's timeout, save first, and push the folder in one.

    Args:
        model, tokenizer, base_model, license, tags, max_shard_size, handler: as in `save_package`. `tags` go into the
            card.
        repo_id, revision, private, create_pr, tag, commit_message, token, dry_run, patience: as in `push_package`.
            `tag` is a git tag.

    Raises:
        Everything that `save_package` and `push_package` raise.
    """
    from ..package.save import SaveOptions, write_package
    from ..package.sharded import State, in_first_process

    options = PushOptions(revision or MAIN, private, create_pr, tag, commit_message, dry_run=dry_run)

    def save_and_push(state: State | None) -> PushReport:
        hub = open_repository(repo_id, token=token, patience=patience)
        refuse_early(hub, options)
        with tempfile.TemporaryDirectory(prefix="gpt2-value-push-") as home:
            folder = Path(home, "package")
            saving = SaveOptions(base_model, license, tags, hub.repo_id, max_shard_size, handler=handler)
            write_package(model, state, folder, tokenizer, saving)
            return push(read_verified(folder, hub, options), hub, options)

    return in_first_process(model, save_and_push)


def open_repository(repo_id: str, *, token: str | None = None, patience: float = PATIENCE) -> Hub:
    """Return the repository, with a token that the Hub accepts.

    Raises:
        AuthenticationError, OptionsError, HubUnavailableError: see `push_package`.
    """
    hub = Hub(repo_id, token=token, patience=patience)
    hub.check_token()
    return hub


def refuse_early(hub: Hub, options: PushOptions) -> None:
    """Find out with a few small requests whether the Hub would refuse the push, before anything is saved or uploaded.

    Raises:
        OptionsError, AuthenticationError: the errors that `push` would raise later.
    """
    if _is_new(hub, options):
        return
    branch = hub.find_branch(options.branch)
    if options.tag is not None and branch.tags.get(options.tag) not in (None, branch.commit):
        raise _tag_exists(options.tag, branch.tags[options.tag])
    hub.check_write_access(branch, create_pr=options.create_pr)


def read_verified(folder: Path, hub: Hub, options: PushOptions, *, trust_remote_code: bool = False) -> Package:
    """Refuse a package that must not be published or cannot be pushed, and verify it.

    Returns the package as it was before verification, so that `push` notices if it is written to later.

    Raises:
        Everything that `push_package` raises before it uploads anything.
    """
    package = Package.read(folder)
    package.refuse_secrets(hub, options.message)
    refuse_early(hub, options)
    verify_package(folder, trust_remote_code=trust_remote_code)
    return package


def _is_new(hub: Hub, options: PushOptions) -> bool:
    """Whether the repository has yet to be created."""
    is_private = hub.is_private()
    if is_private is not None and options.private not in (None, is_private):
        raise OptionsError(
            f"private={options.private}, and {hub.repo_id} is {'private' if is_private else 'public'} already",
            next_step=f"change it in {hub.url}/settings, or leave out private",
        )
    return is_private is None


def _tag_exists(tag: str, commit: str) -> OptionsError:
    return OptionsError(
        f"the tag {tag!r} is on {commit} already; nothing was committed",
        expected="a free tag",
        next_step="choose another, or delete that one first: hf repos tag delete",
    )


def push(package: Package, hub: Hub, options: PushOptions) -> PushReport:
    """Push a verified package, with a token that was checked. Raises what `push_package` raises.

    After an interrupt (Ctrl-C), the log says in which state the repository is.
    """
    states = [f"nothing was changed in {hub.repo_id}"]
    try:
        return _push(package, hub, options, say_state=states.append)
    except KeyboardInterrupt:
        logger.warning("interrupted: %s", states[-1])
        raise


def _push(package: Package, hub: Hub, options: PushOptions, *, say_state: Callable[[str], None]) -> PushReport:
    """Push, and call `say_state` with a description whenever the state of the repository may have changed."""
    new_repository = _is_new(hub, options)
    if new_repository and not options.dry_run:
        say_state(f"{hub.repo_id} may have been created; it holds nothing of ours")
        hub.create(private=options.private)
    if new_repository and options.dry_run:
        branch = Branch(options.branch, "", {}, exists=False, tags={})
    else:
        branch = hub.read_branch(options.branch)
    with tempfile.TemporaryDirectory(prefix="gpt2-value-card-") as scratch:
        package = _with_remote_card(package, hub, branch, Path(scratch))
        plan = _plan(package, branch, options, repo_id=hub.repo_id, new_repository=new_repository)
        if options.dry_run:
            return PushReport(**vars(plan), dry_run=True)
        if not branch.exists:
            say_state(f"{hub.repo_id} may have a new branch {branch.name}; nothing was committed to it")
            hub.create_branch(branch)
        pushed = PushedCommit(branch.commit)
        if plan.makes_commit:
            pushed = _commit(package, hub, plan, branch, options, say_state=say_state)
    report = PushReport(
        **vars(plan),
        commit=pushed.commit,
        url=f"{hub.url}/commit/{pushed.commit}",
        committed=plan.makes_commit,
        pr_url=f"{hub.url}/discussions/{pushed.pr_number}" if pushed.pr_number is not None else None,
        load_lines=load_lines(hub.repo_id, revision=pushed.commit, tokenizer=layout.TOKENIZER_CONFIG in package.files),
    )
    if options.tag is not None and plan.sets_tag:
        say_state(f"the package is in {hub.repo_id}, commit {pushed.commit}; its tag may be missing")
        with after_commit(pushed.commit, but="has no tag", next_step="; the same push, run again, only sets the tag"):
            hub.tag(options.tag, commit=pushed.commit)
    return report


@contextmanager
def after_commit(commit: str, *, but: str, next_step: str = "") -> Iterator[None]:
    """Extend errors raised in the block: they say that the commit is on the Hub, and what is missing (`but`)."""
    try:
        yield
    except GPT2ValueHubError as error:
        raise type(error)(
            f"the commit {commit} is on the Hub, but {but}: {error.found}",
            expected=error.expected,
            next_step=f"{error.next_step}{next_step}",
        ) from error


def _commit(
    package: Package,
    hub: Hub,
    plan: PushPlan,
    branch: Branch,
    options: PushOptions,
    *,
    say_state: Callable[[str], None],
) -> PushedCommit:
    """Upload what the plan adds and changes, and commit it with what it deletes."""
    files = {name: package.files[name] for name in (*plan.added, *plan.changed)}
    sources = {name: file.path if file.data is None else file.data for name, file in files.items()}
    deletions = [CommitOperationDelete(name, is_folder=False) for name in plan.deleted]
    say_state(f"nothing was committed to {hub.repo_id}; what was uploaded is not sent again")
    try:
        additions = hub.upload(sources, branch=branch.name, create_pr=options.create_pr)
        package.check_unchanged()
        say_state(f"the commit was sent, and may be there: look at {hub.url}/commits/{branch.name}")
        return hub.commit(
            [*additions, *deletions],
            onto=branch,
            message=options.message,
            create_pr=options.create_pr,
            note=options.note,
        )
    except (FileNotFoundError, ValueError):  # huggingface_hub raises these if a file has disappeared
        package.check_unchanged()
        raise


def _plan(package: Package, branch: Branch, options: PushOptions, *, repo_id: str, new_repository: bool) -> PushPlan:
    """Find out what to add, change and delete so that the branch holds the package.

    Raises:
        OptionsError: the tag is on another commit than the one that will hold the package.
    """
    files = package.files
    unchanged = {name for name, file in files.items() if file.same_as(branch.files.get(name))}
    kinds = {layout.kind_of(name) for name in files}

    def stale(name: str) -> bool:
        kind = layout.kind_of(name)
        return name not in files and (
            kind == "weights" or OTHER_WEIGHTS.fullmatch(name) is not None or (kind == "tokenizer" and kind in kinds)
        )

    tagged = branch.tags.get(options.tag) if options.tag is not None else None
    plan = PushPlan(
        repo_id=repo_id,
        revision=branch.name,
        new_repository=new_repository,
        new_branch=not branch.exists,
        added={name: file.size for name, file in files.items() if name not in branch.files},
        changed={name: file.size for name, file in files.items() if name in branch.files and name not in unchanged},
        deleted={name: file.size for name, file in branch.files.items() if stale(name)},
        unchanged={name: file.size for name, file in files.items() if name in unchanged},
        kept={name: file.size for name, file in branch.files.items() if name not in files and not stale(name)},
        tag=options.tag,
        sets_tag=options.tag is not None and tagged is None,
    )
    if options.tag is not None and tagged is not None and (plan.makes_commit or tagged != branch.commit):
        raise _tag_exists(options.tag, tagged)
    return plan


def _with_remote_card(package: Package, hub: Hub, branch: Branch, scratch: Path) -> Package:
    """Return the package with the card to push: the package's own, or the repository's with the package's metadata.

    `scratch` is a folder for temporary files.
    """
    ours = package.files.get(layout.CARD)
    theirs = branch.files.get(layout.CARD)
    if ours is None or ours.data is None:
        return package
    data = with_repo_id(ours.data, hub.repo_id)
    if theirs is not None and not ours.same_as(theirs):
        data = merge_cards(data, hub.read(layout.CARD, commit=branch.commit, folder=scratch / "cache"), scratch)
    return replace(package, files={**package.files, layout.CARD: replace(ours, data=data, size=len(data))})
