"""Push a package: copy it, verify the copy, then make exactly one commit, after which the repository is the package.

How a commit is made: https://huggingface.co/docs/huggingface_hub/guides/upload.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import InitVar, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, constants

from .. import layout
from ..errors import ConcurrentPushError, GPT2ValueHubError, OptionsError, RemoteNotFoundError
from ..hub.ask import Hub, is_repository_id
from ..hub.download import Repository, is_hash, odd_answer, read_repository
from ..package.card import load_lines, with_repo_id
from ..package.stage import stage
from ..package.verify import verify_package
from .contents import limit_of, merge_cards, read_by_a_loader, refuse_tokens

if TYPE_CHECKING:
    from torch import nn

MAIN = "main"
MESSAGE = "Push a value-head package"


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
        changes = {"add": self.added, "change": self.changed, "delete": self.deleted}
        did = "pushed" if self.committed else "unchanged" if self.commit else "would push"
        lines = [f"{self.repo_id} ({self.revision}{', new' if self.new else ''}): {did}"]
        for what, files in changes.items():
            lines += [f"  {what:<6} {name}  {size:,} bytes" for name, size in files.items()]
        texts = {"keep": ", ".join(self.kept), "tag": self.tag, "pr": self.pr_url, "url": self.url}
        lines += [f"  {what:<6} {text}" for what, text in texts.items() if text]
        return "\n".join([*lines, "", self.load_lines or ""]).strip()


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
    commit is found on the branch and not made again (a pull request may then be opened twice). A push that failed can
    be run again.

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
    with stage(folder, limit_of=limit_of) as copy:
        return push.run(copy.folder, dry_run=dry_run, trust_remote_code=trust_remote_code)


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


@dataclass
class Push:
    """One push to one branch of a repository; see `push_package` for the arguments and what is raised."""

    repo_id: str
    branch: str
    private: bool | None
    create_pr: bool = False
    tag: str | None = None
    message: str = MESSAGE
    token: InitVar[str | None] = None

    def __post_init__(self, token: str | None) -> None:
        if self.create_pr and (self.branch != MAIN or self.tag is not None):
            raise OptionsError(
                f"create_pr=True with revision {self.branch!r} and tag {self.tag!r}",
                expected="a pull request to main, without a tag",
                next_step="leave out one of the two; tag the commit once it is merged",
            )
        self.hub = Hub(token)
        self.repo_id = self.hub.patiently("check the token", lambda: writable_id(self.hub, self.repo_id))
        self.url = f"{self.hub.api.endpoint}/{self.repo_id}"
        self._parent = ""  # the commit that the branch was at when it was first read

    def run(self, folder: Path, *, dry_run: bool = False, **verifying: Any) -> PushReport:
        """Check a package in a private folder, verify it, and push it.

        Args:
            folder: nobody else writes to it. The card in it is changed: it gets the repository's words.
            dry_run: change nothing on the Hub.
            verifying: options of `verify_package`.
        """
        words = {"the commit message": self.message, "the tag": self.tag or "", "the branch": self.branch}
        refuse_tokens(folder, words, self.hub.token or "")
        card = with_repo_id((folder / layout.CARD).read_bytes(), self.repo_id)
        # what the Hub would refuse anyway is found before the verification, which takes longer
        plan = self.hub.patiently(f"look at {self.repo_id}", lambda: self._plan(folder, card, self._look()))
        verify_package(folder, **verifying)
        if dry_run:
            return plan
        report = self.hub.patiently(f"push to {self.repo_id}", lambda: self._attempt(folder, card, plan))
        if self.tag is not None:
            self.set_tag(self.tag, str(report.commit))
        return report

    def set_tag(self, tag: str, commit: str, *, beats: Callable[[str], bool] | None = None) -> bool:
        """Give a commit a tag. (The Hub's tags do not move: between deleting and creating there is none.)

        Args:
            beats: whether to take it from a commit that has it. Without this, that is an error.

        Returns:
            whether the commit has the tag now.

        Raises:
            Errors that say that the commit is on the Hub.
        """

        def attempt() -> bool:
            self._read_refs()
            found = self._refs.get(f"refs/tags/{tag}")
            if found == commit:
                return True
            if found is not None:
                if beats is None:
                    raise _tag_exists(tag, found)
                if not beats(found):
                    return False
                self.ask(f"delete the tag {tag}", self.hub.api.delete_tag, tag=tag)
            self.ask(f"tag {tag}", self.hub.api.create_tag, tag=tag, revision=commit)
            return True

        try:
            return self.hub.patiently(f"set the tag {tag}", attempt)
        except GPT2ValueHubError as error:
            raise type(error)(
                f"the commit {commit} is on the Hub, but the tag {tag!r} may be missing or on another: {error.found}",
                expected=error.expected,
                next_step=error.next_step,
            ) from error

    def ask(self, what: str, function: Callable[..., Any], **options: Any) -> Any:
        """Call a function of huggingface_hub about this repository."""
        return self.hub.ask(f"{what} ({self.repo_id})", function, self.repo_id, **options)

    def _attempt(self, folder: Path, card: bytes, planned: PushReport) -> PushReport:
        """Push, unless an earlier attempt has done so already, and its answer was lost; complete what was planned.

        Raises:
            ConcurrentPushError: the branch has moved, and is not what this push makes of it.
        """
        there = self._look(create=True)
        plan = self._plan(folder, card, there)
        sent = {**plan.added, **plan.changed}
        made, commit = None, there.commit
        if sent or plan.deleted:
            if commit != self._parent:
                raise ConcurrentPushError(
                    f"{self.repo_id} ({self.branch}) is at {commit}: somebody pushed since it was at {self._parent}",
                    next_step=f"look at {self.url}/commits/{self.branch}; to push on top of it, run the same again",
                )
            made = self.ask("push", self._commit, folder=folder, plan=plan, moves=sum(sent.values()))
            if not is_hash(commit := made.oid):
                raise odd_answer(f"says that it made the commit {str(commit)[:80]!r}")
        return replace(
            planned,
            commit=commit,
            committed=commit != self._parent,
            url=f"{self.url}/commit/{commit}",
            pr_url=made and made.pr_url,
            load_lines=load_lines(self.repo_id, revision=commit, tokenizer=(folder / layout.TOKENIZER_CONFIG).exists()),
        )

    def _commit(self, repo_id: str, *, folder: Path, plan: PushReport) -> CommitInfo:
        """Upload what the plan adds and changes, and commit it with what it deletes.

        By LFS, which every Hub has: by Xet huggingface_hub would fail where there is none.
        """
        additions = [CommitOperationAdd(name, folder / name) for name in (*plan.added, *plan.changed)]
        where: dict[str, Any] = {"revision": self.branch, "create_pr": self.create_pr}
        before, constants.HF_HUB_DISABLE_XET = constants.HF_HUB_DISABLE_XET, True
        try:
            # the repository's own .gitignore must not thin out a package
            self.hub.api.preupload_lfs_files(repo_id, additions, gitignore_content="# none", **where)
            return self.hub.api.create_commit(
                repo_id,
                [*additions, *(CommitOperationDelete(name, is_folder=False) for name in plan.deleted)],
                commit_message=self.message,
                parent_commit=self._parent,
                **where,
            )
        finally:
            constants.HF_HUB_DISABLE_XET = before

    def _look(self, *, create: bool = False) -> Repository:
        """Return the branch as it is, or what a new one starts from; with `create`, after making it.

        Raises:
            OptionsError: the branch is a tag or a commit; the repository has another visibility.
        """
        exists = self._read_refs()
        if create and not exists:
            self.ask("create the repository", self.hub.api.create_repo, private=self.private, exist_ok=True)
            exists = self._read_refs()
        if not exists:
            return Repository(self.hub, self.repo_id, "", {}, bool(self.private), Path())
        head = self._refs.get(f"refs/heads/{self.branch}")
        if head is None and (f"refs/tags/{self.branch}" in self._refs or is_hash(self.branch)):
            raise OptionsError(
                f"revision {self.branch!r} is a tag or a commit",
                expected="a branch, or a new name for one",
                next_step="pass a branch; to name the new commit pass tag=... (--tag)",
            )
        there = read_repository(self.hub, self.repo_id, head or MAIN)
        self._parent = self._parent or there.commit
        if self.private not in (None, there.private):
            raise OptionsError(
                f"private={self.private}, and {self.repo_id} is {'private' if there.private else 'public'} already",
                next_step=f"change it in {self.url}/settings, or leave out private",
            )
        if create and head is None:
            self.ask(
                "create the branch",
                self.hub.api.create_branch,
                branch=self.branch,
                revision=there.commit,
                exist_ok=True,
            )
        return there

    def _read_refs(self) -> bool:
        """Ask for branches and tags; return whether there is a repository."""
        self._refs: dict[str, str] = {}  # refs/heads/NAME and refs/tags/NAME -> commit
        try:
            found = self.ask("list the branches", self.hub.api.list_repo_refs)
        except RemoteNotFoundError:
            return False
        self._refs = {ref.ref: ref.target_commit for ref in (*found.branches, *found.tags)}
        return True

    def _plan(self, folder: Path, card: bytes, there: Repository) -> PushReport:
        """Merge the cards, and compare a package with what is in the repository.

        Raises:
            OptionsError: the tag is on another commit than the one that will hold the package.
        """
        (folder / layout.CARD).write_bytes(card)
        if layout.CARD in there.files:
            merge_cards(folder / layout.CARD, there.download(layout.CARD))
        sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
        others = [name for name in there.files if name not in sizes]
        # a folder cannot stay in the place of a file
        stale = [name for name in others if read_by_a_loader(name) or name.split("/")[0] in sizes]
        plan = PushReport(
            repo_id=self.repo_id,
            revision=self.branch,
            new=f"refs/heads/{self.branch}" not in self._refs,
            added={name: size for name, size in sizes.items() if name not in there.files},
            changed={n: s for n, s in sizes.items() if n in there.files and not there.files[n].is_at(folder / n)},
            deleted={name: there.files[name].size for name in stale},
            kept=tuple(name for name in others if name not in stale),
            tag=self.tag,
        )
        tagged = self._refs.get(f"refs/tags/{self.tag}")
        if tagged is not None and (tagged != there.commit or plan.added or plan.changed or plan.deleted):
            raise _tag_exists(str(self.tag), tagged)
        return plan


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
    name = hub.ask("check the token", lambda: str(hub.api.whoami()["name"]))
    return repo_id if "/" in repo_id else f"{name}/{repo_id}"


def _tag_exists(tag: str, commit: str) -> OptionsError:
    return OptionsError(
        f"the tag {tag!r} is on {commit} already",
        next_step="choose another, or delete that one first: hf repos tag delete",
    )
