"""Push a package: copy it, verify the copy, then make exactly one commit, after which the repository is the package.

How a commit is made: https://huggingface.co/docs/huggingface_hub/guides/upload.
"""

from __future__ import annotations

import os
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, constants

from .. import layout
from ..errors import (
    AuthenticationError,
    ConcurrentPushError,
    GPT2ValueHubError,
    OptionsError,
    RemoteNotFoundError,
)
from ..hub.ask import LOG_IN, Hub, is_repository_id
from ..hub.download import Repository, download_file, is_hash, odd_answer, read_repository
from ..package.card import load_lines, with_repo_id
from ..package.verify import verify_package
from .contents import copy_package, merge_cards, read_by_a_loader, refuse_tokens

if TYPE_CHECKING:
    from torch import nn

MAIN = "main"
MESSAGE = "Push a value-head package"
PUSH_ID = "gpt2-value-push: "  # a line in a commit's description, by which a push recognises its own commit


@dataclass(frozen=True)
class PushReport:
    """What a push did or, without a `commit`, would do. The dicts map file names to sizes in bytes."""

    repo_id: str
    revision: str  # the branch
    new: bool  # whether the repository or the branch is a new one
    added: dict[str, int]
    changed: dict[str, int]
    deleted: dict[str, int]  # what a loader would have read, and the package does not have
    kept: tuple[str, ...]  # the repository's other files
    tag: str | None
    commit: str | None = None  # that holds the package; None in a dry run
    committed: bool = False  # False if nothing had changed, and in a dry run
    url: str | None = None  # of the commit
    pr_url: str | None = None  # with `create_pr`
    load_lines: str | None = None  # the lines that load exactly this commit; None in a dry run

    def __str__(self) -> str:
        changes = (("add", self.added), ("change", self.changed), ("delete", self.deleted))
        did = "unchanged" if not any(files for _, files in changes) else "pushed" if self.commit else "would push"
        lines = [f"{self.repo_id} ({self.revision}{', new' if self.new else ''}): {did}"]
        lines += [f"  {what:<6} {name}  {size:,} bytes" for what, files in changes for name, size in files.items()]
        texts = (("keep", ", ".join(self.kept)), ("tag", self.tag), ("pr", self.pr_url), ("url", self.url))
        lines += [f"  {what:<6} {text}" for what, text in texts if text]
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
) -> PushReport:
    """Verify a package, then push it in exactly one commit. It is pushed as a whole or not at all.

    The package is copied to a private folder first, and checked and pushed from there. After the push, what loads from
    the repository is the package: files that a loader would read and the package does not have (other weights,
    adapters, tokenizers, configs, templates) are removed in the same commit. All other files in the repository stay. An
    existing card keeps its text and its own metadata; the package's metadata is merged into it. Files that the
    repository has already are not uploaded again; if nothing changed, there is no commit.

    The commit names the parent that was read, so it cannot overwrite a concurrent push. After failures that pass (409,
    429, 5xx, broken connections) the push is repeated, for up to five minutes; if the answer to a commit was lost, the
    commit is found on the branch and not made again. A push that failed can be run again.

    Args:
        folder: a package, as `save_package` writes it.
        repo_id: `name` or `owner/name`. The repository is created if there is none.
        revision: the branch to push to (default: main); created from main if there is none.
        private: visibility of a repository that is created. For an existing one, pass its own visibility or None.
        create_pr: open a pull request instead of committing to main.
        tag: a tag for the commit; it must be free, or on this commit already.
        commit_message: the commit's title.
        token: a user access token; default is the one that huggingface_hub knows.
        dry_run: change nothing on the Hub; report what a push would do.
        trust_remote_code: also verify, and so run, code that is not this installed version's.

    Raises:
        Everything that `verify_package` raises, and
        PackageError: a file that does not belong to a package.
        SecretFoundError: a file, its name, the commit message, the tag or the branch holds a token.
        OptionsError: arguments that do not fit each other or the repository; the tag is on another commit; the card in
            the repository has metadata that cannot be read.
        AuthenticationError, RemoteNotFoundError: 401, 403, 404; never retried.
        HubUnavailableError: the Hub kept failing, cannot be reached, or asks for a longer pause.
        HubRefusedError: any other refusal.
        ConcurrentPushError: somebody pushed at the same time. Theirs stands.
    """
    push = Push(repo_id, revision or MAIN, private, create_pr, tag, commit_message, token)
    with tempfile.TemporaryDirectory(prefix="gpt2-value-push-") as home:
        copy = copy_package(Path(folder), Path(home, "package"))
        return push.run(copy, dry_run=dry_run, trust_remote_code=trust_remote_code)


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
) -> PushReport:
    """Save a model as a package in a temporary folder, and push that: `save_package`, then `push_package`.

    A model that FSDP2 shards is pushed in all processes by the same call, as in `save_package`. They wait for the
    first, which pushes: where that may outlast the process group's timeout, save first, and push the folder in one.

    Args:
        model, tokenizer, base_model, license, tags, max_shard_size: as in `save_package`. `tags` go into the card.
        repo_id, revision, private, create_pr, tag, commit_message, token, dry_run: as in `push_package`. `tag` is a
            git tag.

    Raises:
        Everything that `save_package` and `push_package` raise.
    """
    from ..package.save import save_package
    from ..package.sharded import in_first_process

    @in_first_process
    def save_and_push(model: nn.Module) -> PushReport:
        push = Push(repo_id, revision or MAIN, private, create_pr, tag, commit_message, token)
        with tempfile.TemporaryDirectory(prefix="gpt2-value-push-") as home:
            folder = Path(home, "package")
            save_package(
                model,
                folder,
                tokenizer,
                base_model=base_model,
                license=license,
                tags=tags,
                max_shard_size=max_shard_size,
            )
            return push.run(folder, dry_run=dry_run)

    return save_and_push(model)


class Push:
    """One push to one branch of a repository; see `push_package` for the arguments and what is raised."""

    def __init__(
        self,
        repo_id: str,
        branch: str = MAIN,
        private: bool | None = None,
        create_pr: bool = False,
        tag: str | None = None,
        message: str = MESSAGE,
        token: str | None = None,
    ) -> None:
        if create_pr and (branch != MAIN or tag is not None):
            raise OptionsError(
                f"create_pr=True with revision {branch!r} and tag {tag!r}",
                expected="a pull request to main, without a tag",
                next_step="leave out one of the two; tag the commit once it is merged",
            )
        self.hub = Hub(token)
        self.repo_id = self.hub.patiently("check the token", lambda: writable_id(self.hub, repo_id))
        self.url = f"{self.hub.api.endpoint}/{self.repo_id}"
        self._branch, self._private, self._create_pr, self._tag, self._message = (
            branch,
            private,
            create_pr,
            tag,
            message,
        )
        self._id = PUSH_ID + uuid.uuid4().hex
        self._refs: dict[str, str] = {}  # full name -> commit: branches, tags and pull requests
        self._has_tokenizer = False
        self._new = False  # whether the first look found no repository or branch
        self._first: tuple[PushReport, str, set[str]] | None = None  # of the first attempt: plan, parent and refs

    def run(self, folder: Path, *, dry_run: bool = False, **verifying: Any) -> PushReport:
        """Check a package in a private folder, verify it, and push it.

        Args:
            folder: nobody else writes to it. The card in it is changed: it gets the repository's words.
            dry_run: change nothing on the Hub.
            verifying: options of `verify_package`.
        """
        words = {"the commit message": self._message, "the tag": self._tag or "", "the branch": self._branch}
        refuse_tokens(folder, words, self.hub.token or "")
        self._has_tokenizer = (folder / layout.TOKENIZER_CONFIG).exists()
        card = with_repo_id((folder / layout.CARD).read_bytes(), self.repo_id)
        # what the Hub would refuse anyway is found before the verification, which takes longer
        plan = self.hub.patiently(f"look at {self.repo_id}", lambda: self._plan(folder, card, self._look()))
        verify_package(folder, **verifying)
        if dry_run:
            return plan
        report = self.hub.patiently(f"push to {self.repo_id}", lambda: self._attempt(folder, card))
        if self._tag is not None:
            with after_commit(str(report.commit), but="has no tag; the same push, run again, sets it"):
                self.set_tag(self._tag, str(report.commit))
        return report

    def set_tag(self, tag: str, commit: str, *, move: bool = False) -> None:
        """Give a commit a tag; with `move`, take it from any other commit. (The Hub's tags do not move: between
        deleting and creating there is none.)"""

        def attempt() -> None:
            found = self.tagged(tag)
            if found not in (None, commit):
                if not move:
                    raise _tag_exists(tag, str(found))
                self._ask(f"delete the tag {tag}", self.hub.api.delete_tag, tag=tag)
            if found != commit:
                self._ask(f"tag {tag}", self.hub.api.create_tag, tag=tag, revision=commit)

        self.hub.patiently(f"set the tag {tag} of {self.repo_id}", attempt)

    def tagged(self, tag: str) -> str | None:
        """Return the commit that has the tag; None where no commit has it."""
        self._read_refs()
        return self._refs.get(f"refs/tags/{tag}")

    def _attempt(self, folder: Path, card: bytes) -> PushReport:
        """Push, unless an earlier attempt has done so already."""
        there = self._look(create=True)
        if self._first is not None and (done := self._landed(*self._first, there)) is not None:
            return done
        plan = self._plan(folder, card, there)
        self._first = self._first or (plan, there.commit, set(self._refs))
        if not (plan.added or plan.changed or plan.deleted):
            return self._done(plan, there.commit, committed=False)
        api, sent = self.hub.api, {**plan.added, **plan.changed}
        additions = [CommitOperationAdd(name, folder / name) for name in sent]
        target: Any = {"revision": self._branch, "create_pr": self._create_pr}

        def commit() -> Any:
            api.preupload_lfs_files(
                self.repo_id,
                additions,
                free_memory=False,
                gitignore_content="# none",  # the repository's own must not thin out a package
                **target,
            )
            return api.create_commit(
                self.repo_id,
                [*additions, *(CommitOperationDelete(name, is_folder=False) for name in plan.deleted)],
                commit_message=self._message,
                commit_description=self._id,
                parent_commit=there.commit,
                **target,
            )

        with _by_lfs():
            made = self.hub.ask(f"push to {self.repo_id}", commit, moves=sum(sent.values()))
        return self._done(plan, made.oid, pr=made.pr_num)

    def _look(self, *, create: bool = False) -> Repository:
        """Return the branch as it is, or what a new one starts from; with `create`, after making it.

        Raises:
            OptionsError: the branch is a tag or a commit; the repository has another visibility.
        """
        exists, name = self._read_refs(), self._branch
        if create and not exists:
            self._ask("create the repository", self.hub.api.create_repo, private=self._private, exist_ok=True)
            exists = self._read_refs()
        head = self._refs.get(f"refs/heads/{name}")
        self._new |= head is None
        if not exists:
            return Repository(self.repo_id, "", {}, bool(self._private))
        if head is None and (f"refs/tags/{name}" in self._refs or is_hash(name)):
            raise OptionsError(
                f"revision {name!r} is a tag or a commit",
                expected="a branch, or a new name for one",
                next_step="pass a branch; to name the new commit pass tag=... (--tag)",
            )
        there = read_repository(self.hub, self.repo_id, head or MAIN)
        if self._private not in (None, there.private):
            raise OptionsError(
                f"private={self._private}, and {self.repo_id} is {'private' if there.private else 'public'} already",
                next_step=f"change it in {self.url}/settings, or leave out private",
            )
        if head is None and create:
            create_branch = self.hub.api.create_branch
            self._ask(f"create the branch {name}", create_branch, branch=name, revision=there.commit, exist_ok=True)
        return there

    def _read_refs(self) -> bool:
        """Ask for branches, tags and pull requests; return whether there is a repository."""
        try:
            found = self._ask("list the branches", self.hub.api.list_repo_refs, include_pull_requests=True)
        except RemoteNotFoundError:
            self._refs = {}
            return False
        refs = [*found.branches, *found.tags, *(found.pull_requests or [])]
        self._refs = {ref.ref: ref.target_commit for ref in refs}
        return True

    def _plan(self, folder: Path, card: bytes, there: Repository) -> PushReport:
        """Merge the cards, and compare a package with what is in the repository.

        Raises:
            OptionsError: the tag is on another commit than the one that will hold the package.
        """
        (folder / layout.CARD).write_bytes(card)
        if layout.CARD in there.files:
            with tempfile.TemporaryDirectory(prefix="gpt2-value-card-") as cache:
                merge_cards(folder / layout.CARD, download_file(self.hub, there, layout.CARD, Path(cache)))
        sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
        # a folder cannot stay in the place of a file
        stale = {n for n in there.files if n not in sizes and (read_by_a_loader(n) or n.split("/")[0] in sizes)}
        plan = PushReport(
            repo_id=self.repo_id,
            revision=self._branch,
            new=self._new,
            added={name: size for name, size in sizes.items() if name not in there.files},
            changed={n: s for n, s in sizes.items() if n in there.files and not there.files[n].is_at(folder / n)},
            deleted={name: there.files[name].size for name in sorted(stale)},
            kept=tuple(name for name in there.files if name not in sizes and name not in stale),
            tag=self._tag,
        )
        tagged = self._refs.get(f"refs/tags/{self._tag}")
        if tagged is not None and (tagged != there.commit or plan.added or plan.changed or plan.deleted):
            raise _tag_exists(str(self._tag), tagged)
        return plan

    def _landed(self, plan: PushReport, parent: str, refs: set[str], there: Repository) -> PushReport | None:
        """Return the report of an earlier attempt whose commit was made and whose answer was lost; None if there is no
        such commit.

        Raises:
            ConcurrentPushError: the branch has moved, and not by this push.
        """
        moved = there.commit != parent
        places = [self._branch] if moved else []
        if self._create_pr:
            places = [ref for ref in self._refs if ref.startswith("refs/pr/") and ref not in refs]
        for place in places:
            for commit in self._ask("list the commits", self.hub.api.list_repo_commits, revision=place):
                if self._id in commit.message:
                    return self._done(plan, commit.commit_id, pr=place.rpartition("/")[2] if self._create_pr else None)
        if moved and not self._create_pr:
            raise ConcurrentPushError(
                f"{self.repo_id} ({self._branch}) is at {there.commit}: somebody pushed since it was read at {parent}",
                expected="a branch that nobody else pushes to at the same time",
                next_step=f"look at {self.url}/commits/{self._branch}; to push on top of it, run the same again",
            )
        return None

    def _done(self, plan: PushReport, commit: str, *, committed: bool = True, pr: object = None) -> PushReport:
        if not is_hash(commit):
            raise odd_answer(f"says that it made the commit {str(commit)[:80]!r}")
        return replace(
            plan,
            commit=commit,
            committed=committed,
            url=f"{self.url}/commit/{commit}",
            pr_url=None if pr is None else f"{self.url}/discussions/{pr}",
            load_lines=load_lines(self.repo_id, revision=commit, tokenizer=self._has_tokenizer),
        )

    def _ask(self, what: str, function: Callable[..., Any], **options: Any) -> Any:
        """Call a function of huggingface_hub about this repository."""
        return self.hub.ask(f"{what} ({self.repo_id})", function, self.repo_id, **options)


@contextmanager
def _by_lfs() -> Iterator[None]:
    """Have huggingface_hub upload by LFS, which every Hub has: by Xet it would fail where there is none."""
    before, constants.HF_HUB_DISABLE_XET = constants.HF_HUB_DISABLE_XET, True
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_XET = before


def writable_id(hub: Hub, repo_id: str) -> str:
    """Ask the Hub who we are; return the repository's id, completed by the owner if it has none.

    Raises:
        AuthenticationError: no token, or one that is not valid.
        OptionsError: it cannot be a repository's id.
    """
    if not is_repository_id(repo_id):
        raise OptionsError(
            f"{str(repo_id)[:200]!r} is no repository's id",
            next_step="pass owner/name, of letters, digits, '-', '_' and '.'",
        )
    if hub.token is None:
        raise AuthenticationError("no token", expected="a user access token with write permission", next_step=LOG_IN)
    name = hub.ask("check the token", lambda: str(hub.api.whoami()["name"]))
    return repo_id if "/" in repo_id else f"{name}/{repo_id}"


@contextmanager
def after_commit(commit: str, *, but: str) -> Iterator[None]:
    """Extend errors raised in the block: they say that the commit is on the Hub, and what is missing (`but`)."""
    try:
        yield
    except GPT2ValueHubError as error:
        found = f"the commit {commit} is on the Hub, but {but}: {error.found}"
        raise type(error)(found, expected=error.expected, next_step=error.next_step) from error


def _tag_exists(tag: str, commit: str) -> OptionsError:
    return OptionsError(
        f"the tag {tag!r} is on {commit} already",
        expected="a free tag",
        next_step="choose another, or delete that one first: hf repos tag delete",
    )
