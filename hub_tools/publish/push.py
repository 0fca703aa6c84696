"""Push a package: copy it, verify the copy, then make exactly one commit, after which the repository is the package.

Imports huggingface_hub, and of hub_tools `contents`, `secrets`, `hub`, and `package`; and torch and transformers only
inside `push_to_hub`. How a commit is made: https://huggingface.co/docs/huggingface_hub/guides/upload.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, constants
from huggingface_hub.hf_api import GitRefs
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    build_hf_headers,
    disable_progress_bars,
    enable_progress_bars,
    get_session,
)

from .. import layout
from ..errors import (
    AuthenticationError,
    ConcurrentPushError,
    GPT2ValueHubError,
    HubRefusedError,
    OptionsError,
    RemoteNotFoundError,
)
from ..hub.ask import Hub, Passing, is_repository_id
from ..hub.download import Repository, download_file, is_hex, read_repository
from ..package.card import load_lines, with_repo_id
from ..package.verify import verify_package
from .contents import copy_package, merge_cards, read_by_a_loader
from .secrets import refuse_tokens

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger(__name__)

MAIN = "main"
MESSAGE = "Push a value-head package"
CREATE = "create the repository"
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
    push = Push(
        repo_id,
        branch=revision,
        private=private,
        create_pr=create_pr,
        tag=tag,
        message=commit_message,
        token=token,
    )
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
        push = Push(
            repo_id,
            branch=revision,
            private=private,
            create_pr=create_pr,
            tag=tag,
            message=commit_message,
            token=token,
        )
        push.refuse_early()
        with tempfile.TemporaryDirectory(prefix="gpt2-value-push-") as home:
            folder = Path(home, "package")
            save_package(
                model,
                folder,
                tokenizer,
                base_model=base_model,
                license=license,
                tags=tags,
                repo_id=push.repo_id,
                max_shard_size=max_shard_size,
            )
            return push.run(folder, dry_run=dry_run)

    return save_and_push(model)


class Push:
    """One push to one branch of a repository; see `push_package` for the arguments and what is raised.

    Args:
        note: a line for the commit's description.
    """

    def __init__(
        self,
        repo_id: str,
        *,
        branch: str | None = None,
        private: bool | None = None,
        create_pr: bool = False,
        tag: str | None = None,
        message: str = MESSAGE,
        note: str = "",
        token: str | None = None,
    ) -> None:
        if create_pr and (branch not in (None, MAIN) or tag is not None):
            raise OptionsError(
                f"create_pr=True with revision {branch!r} and tag {tag!r}",
                expected="a pull request to main, without a tag",
                next_step="leave out one of the two; tag the commit once it is merged",
            )
        self.hub = Hub(token)
        self.repo_id = self.hub.patiently("check the token", lambda: writable_id(self.hub, repo_id))
        self.url = f"{self.hub.api.endpoint}/{self.repo_id}"
        self._branch, self._private, self._create_pr, self._tag = branch or MAIN, private, create_pr, tag
        self._message, self._note, self._id = message, note, PUSH_ID + uuid.uuid4().hex
        self._by_xet = not constants.HF_HUB_DISABLE_XET and importlib.util.find_spec("hf_xet") is not None
        self._has_tokenizer = False
        # of the first attempt:
        self._new = False  # whether it found no repository or branch
        self._plan: PushReport | None = None  # what it was going to do
        self._parent, self._old_prs = "", set[str]()  # the branch's commit, and pull requests

    def refuse_early(self) -> None:
        """Find out with a few small requests whether the Hub would refuse the push, before anything is saved or
        uploaded. Raises what `run` would raise later."""

        def attempt() -> None:
            if (refs := self._refs()) is None:
                return
            self._check_tag(refs, self._read(refs).commit)
            # the Hub says how to upload a file only to those who may
            small = [CommitOperationAdd(layout.CONFIG, b"{}")]
            revision = self._branch if self._branch in _heads(refs) else MAIN
            self._ask("push", self.hub.api.preupload_lfs_files, small, revision=revision, create_pr=self._create_pr)

        self.hub.patiently(f"look at {self.repo_id}", attempt)

    def run(self, folder: Path, *, dry_run: bool = False, **verifying: Any) -> PushReport:
        """Check a package in a private folder, verify it, and push it.

        Args:
            folder: nobody else writes to it. The card in it is changed: it gets the repository's words.
            dry_run: change nothing on the Hub.
            verifying: options of `verify_package`.
        """
        message = f"{self._message}\n{self._note}"
        words = {"the commit message": message, "the tag": self._tag or "", "the branch": self._branch}
        refuse_tokens(folder, words, self.hub.token or "")
        self.refuse_early()
        verify_package(folder, **verifying)
        self._has_tokenizer = (folder / layout.TOKENIZER_CONFIG).exists()
        card = folder / layout.CARD
        own_card = with_repo_id(card.read_bytes(), self.repo_id)

        def attempt() -> PushReport:
            card.write_bytes(own_card)
            return self._attempt(folder, dry_run=dry_run)

        try:
            report = self.hub.patiently(f"push to {self.repo_id}", attempt)
        except KeyboardInterrupt:
            logger.warning("interrupted: %s/commits/%s shows whether the commit was made", self.url, self._branch)
            raise
        if report.commit and self._tag is not None:
            with after_commit(report.commit, but="has no tag; the same push, run again, sets it"):
                self.set_tag(self._tag, report.commit)
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
        return _tags(self._refs()).get(tag)

    def descriptions(self, revision: str) -> dict[str, str]:
        """Return the descriptions of the commits up to a revision, by commit, newest first."""
        commits = self._ask("list the commits", self.hub.api.list_repo_commits, revision=revision)
        return {commit.commit_id: commit.message for commit in commits}

    def _attempt(self, folder: Path, *, dry_run: bool) -> PushReport:
        """Push, unless an earlier attempt has done so already."""
        api, refs = self.hub.api, self._refs()
        self._new = self._new or refs is None or self._branch not in _heads(refs)
        if refs is None and not dry_run:
            self._ask(CREATE, api.create_repo, private=self._private, exist_ok=True)
            refs = self._refs()
        there = Repository(self.repo_id, "", {}, bool(self._private)) if refs is None else self._read(refs)
        if self._plan is None:
            self._parent, self._old_prs = there.commit, _pull_requests(refs)
        elif (done := self._landed(refs, there)) is not None:
            return done
        if layout.CARD in there.files:
            with tempfile.TemporaryDirectory(prefix="gpt2-value-card-") as cache:
                merge_cards(folder / layout.CARD, download_file(self.hub, there, layout.CARD, Path(cache)))
        plan = self._plan = self._planned(folder, there)
        makes_commit = bool(plan.added or plan.changed or plan.deleted)
        self._check_tag(refs, "" if makes_commit else there.commit)
        if dry_run:
            return plan
        if refs is not None and self._branch not in _heads(refs):
            what = f"create the branch {self._branch}"
            self._ask(what, api.create_branch, branch=self._branch, revision=there.commit, exist_ok=True)
        return self._commit(folder, plan, there) if makes_commit else self._done(plan, there.commit, committed=False)

    def _planned(self, folder: Path, there: Repository) -> PushReport:
        """Compare a package with what is in the repository."""
        sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
        # a folder cannot stay in the place of a file
        stale = {n for n in there.files if n not in sizes and (read_by_a_loader(n) or n.split("/")[0] in sizes)}
        return PushReport(
            repo_id=self.repo_id,
            revision=self._branch,
            new=self._new,
            added={name: size for name, size in sizes.items() if name not in there.files},
            changed={n: s for n, s in sizes.items() if n in there.files and not there.files[n].is_at(folder / n)},
            deleted={name: file.size for name, file in there.files.items() if name in stale},
            kept=tuple(name for name in there.files if name not in sizes and name not in stale),
            tag=self._tag,
        )

    def _commit(self, folder: Path, plan: PushReport, there: Repository) -> PushReport:
        """Upload what the plan adds and changes, and commit it with what it deletes."""
        api, sent = self.hub.api, {**plan.added, **plan.changed}
        additions = [CommitOperationAdd(name, folder / name) for name in sent]
        size = sum(sent.values())
        with self._protocol() as by_xet:
            try:
                self._ask(
                    f"upload {len(sent)} files ({size:,} bytes)",
                    api.preupload_lfs_files,
                    additions,
                    revision=self._branch,
                    create_pr=self._create_pr,
                    free_memory=False,
                    gitignore_content="# none",  # the repository's own must not thin out a package
                    moves=size,
                )
            except HubRefusedError as error:
                if not by_xet:
                    raise
                self._by_xet = False  # the next attempt uploads by LFS
                raise Passing(error.found, answered=True) from None
            made = self._ask(
                "commit",
                api.create_commit,
                [*additions, *(CommitOperationDelete(name, is_folder=False) for name in plan.deleted)],
                commit_message=self._message,
                commit_description=f"{self._note}\n{self._id}".strip(),
                revision=self._branch,
                parent_commit=there.commit,
                create_pr=self._create_pr,
            )
        return self._done(plan, made.oid, pr=made.pr_num)

    @contextmanager
    def _protocol(self) -> Iterator[bool]:
        """Have huggingface_hub upload by Xet, or by LFS where the Hub has no Xet storage (which it does not find out by
        itself), with bars on a terminal only; say which of the two."""
        by_xet = False
        if self._by_xet:
            place = f"xet-write-token/{quote(self._branch, safe='')}{'?create_pr=1' if self._create_pr else ''}"
            url = f"{self.hub.api.endpoint}/api/models/{self.repo_id}/{place}"
            headers = build_hf_headers(token=self.hub.token)
            by_xet = self.hub.ask("ask how to upload", get_session().get, url, headers=headers).status_code == 200
        before, constants.HF_HUB_DISABLE_XET = constants.HF_HUB_DISABLE_XET, not by_xet
        hide = not sys.stderr.isatty() and not are_progress_bars_disabled()
        if hide:
            disable_progress_bars()
        try:
            yield by_xet
        finally:
            constants.HF_HUB_DISABLE_XET = before
            if hide:
                enable_progress_bars()

    def _landed(self, refs: GitRefs | None, there: Repository) -> PushReport | None:
        """Return the report of an earlier attempt whose commit was made and whose answer was lost; None if there is no
        such commit.

        Raises:
            ConcurrentPushError: the branch has moved, and not by this push.
        """
        moved = there.commit != self._parent
        for place in _pull_requests(refs) - self._old_prs if self._create_pr else [self._branch] if moved else []:
            for commit, description in self.descriptions(place).items():
                if self._id in description and self._plan is not None:
                    return self._done(self._plan, commit, pr=place.rpartition("/")[2] if self._create_pr else None)
        if moved and not self._create_pr:
            raise ConcurrentPushError(
                f"{self.repo_id} ({self._branch}) is at {there.commit}: somebody pushed since it was read at "
                f"{self._parent}",
                expected="a branch that nobody else pushes to at the same time",
                next_step=f"look at {self.url}/commits/{self._branch}; to push on top of it, run the same again",
            )
        return None

    def _done(self, plan: PushReport, commit: str, *, committed: bool = True, pr: object = None) -> PushReport:
        if not is_hex(commit, 40):
            raise HubRefusedError(
                f"the Hub says that it made the commit {str(commit)[:80]!r}",
                expected="40 hexadecimal digits",
                next_step=f"look at {self.url}/commits/{self._branch}, and make sure that HF_ENDPOINT is a Hub",
            )
        return replace(
            plan,
            commit=commit,
            committed=committed,
            url=f"{self.url}/commit/{commit}",
            pr_url=None if pr is None else f"{self.url}/discussions/{pr}",
            load_lines=load_lines(self.repo_id, revision=commit, tokenizer=self._has_tokenizer),
        )

    def _read(self, refs: GitRefs) -> Repository:
        """Return the branch as it is, or what a new one starts from.

        Raises:
            OptionsError: the branch is a tag or a commit; the repository has another visibility.
            RemoteNotFoundError: there is no branch to start from.
        """
        heads, name = _heads(refs), self._branch
        if name not in heads and (name in _tags(refs) or is_hex(name, 40)):
            raise OptionsError(
                f"revision {name!r} is a {'tag' if name in _tags(refs) else 'commit'}",
                expected="a branch, or a new name for one",
                next_step="pass a branch; to name the new commit pass tag=... (--tag)",
            )
        if (head := heads.get(name, heads.get(MAIN))) is None:
            raise RemoteNotFoundError(
                f"{self.repo_id} has no branch main to start {name!r} from",
                next_step="push to main first: leave out revision",
            )
        there = read_repository(self.hub, self.repo_id, head)
        if self._private not in (None, there.private):
            raise OptionsError(
                f"private={self._private}, and {self.repo_id} is {'private' if there.private else 'public'} already",
                next_step=f"change it in {self.url}/settings, or leave out private",
            )
        return there

    def _refs(self) -> GitRefs | None:
        """Return branches, tags and pull requests; None where there is no repository."""
        try:
            found: GitRefs = self._ask("list the branches", self.hub.api.list_repo_refs, include_pull_requests=True)
        except RemoteNotFoundError:
            return None
        return found

    def _check_tag(self, refs: GitRefs | None, commit: str) -> None:
        """Refuse a tag that is on another commit than the one that will hold the package."""
        found = _tags(refs).get(self._tag or "")
        if found not in (None, commit):
            raise _tag_exists(str(self._tag), str(found))

    def _ask(self, what: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Call a function of huggingface_hub about this repository."""
        denied = (
            "create it under your own name, or with a token of its owner's; if it exists already, it is private, and "
            "this token cannot see it: ask its owner"
            if what == CREATE
            else "ask the owner for write access, use a token with write permission for it, or push to a repository of "
            "your own; to propose the change instead pass create_pr=True (--create-pr)"
        )
        where = f"{what} ({self.repo_id})"
        return self.hub.ask(where, function, self.repo_id, *arguments, denied=denied, **options)


def writable_id(hub: Hub, repo_id: str) -> str:
    """Ask the Hub who we are; return the repository's id, completed by the owner if it has none.

    Raises:
        AuthenticationError: no token, or one that is not valid or may only read.
        OptionsError: it cannot be a repository's id.
    """
    if not is_repository_id(repo_id):
        raise OptionsError(
            f"{str(repo_id)[:200]!r} is no repository's id",
            next_step="pass owner/name, of letters, digits, '-', '_' and '.'",
        )
    if hub.token is None:
        raise AuthenticationError(
            "no token",
            expected="a user access token with write permission",
            next_step="log in: hf auth login; or pass token=... (or set HF_TOKEN)",
        )

    def who() -> tuple[str, str]:
        me = hub.api.whoami()
        return str(me["name"]), str(me.get("auth", {}).get("accessToken", {}).get("role"))

    name, role = hub.ask("check the token", who)
    if role == "read":
        raise AuthenticationError(
            "the token may only read",
            expected="a token with write permission",
            next_step=f"make one at {hub.api.endpoint}/settings/tokens; then " + hub.other_token("that one"),
        )
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


def _heads(refs: GitRefs | None) -> dict[str, str]:
    return {} if refs is None else {ref.name: ref.target_commit for ref in refs.branches}


def _tags(refs: GitRefs | None) -> dict[str, str]:
    return {} if refs is None else {ref.name: ref.target_commit for ref in refs.tags}


def _pull_requests(refs: GitRefs | None) -> set[str]:
    return set() if refs is None else {ref.ref for ref in refs.pull_requests or []}
