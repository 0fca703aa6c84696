"""The options of a push, its plan, and its report.

Imports the standard library and of hub_tools `errors`.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import OptionsError

MAIN = "main"
MESSAGE = "Push a value-head package"


@dataclass(frozen=True)
class PushOptions:
    """Where in a repository a push goes, and how; see `push_package`.

    Raises:
        OptionsError: `create_pr` with a branch other than main, or with a tag.
    """

    branch: str = MAIN
    private: bool | None = None
    create_pr: bool = False
    tag: str | None = None
    message: str = MESSAGE  # the commit's title
    note: str = ""  # goes into the commit's description
    dry_run: bool = False

    def __post_init__(self) -> None:
        if self.create_pr and self.branch != MAIN:
            raise OptionsError(
                f"create_pr=True with revision {self.branch!r}", expected="main", next_step="leave out one of the two"
            )
        if self.create_pr and self.tag is not None:
            raise OptionsError(
                f"create_pr=True with tag {self.tag!r}",
                expected="one of them",
                next_step="tag the commit once it is merged",
            )


@dataclass(frozen=True)
class PushPlan:
    """What a push would do. The dicts map file names to sizes in bytes."""

    repo_id: str
    revision: str  # the branch to push to
    new_repository: bool
    new_branch: bool
    added: dict[str, int]
    changed: dict[str, int]
    deleted: dict[str, int]
    unchanged: dict[str, int]
    kept: dict[str, int]  # files in the repository that are not a package's, and are left alone
    tag: str | None
    sets_tag: bool  # False if there is no tag to set, or it is on the commit already

    @property
    def upload_size(self) -> int:
        """Bytes of the files that are added or changed."""
        return sum(self.added.values()) + sum(self.changed.values())

    @property
    def makes_commit(self) -> bool:
        """Whether anything is to be committed."""
        return bool(self.added or self.changed or self.deleted)

    def _lines(self) -> list[str]:
        lines = []
        if self.new_repository or self.new_branch:
            lines.append(f"  new {'repository' if self.new_repository else 'branch'}")
        for what, files in (("add", self.added), ("change", self.changed), ("delete", self.deleted)):
            lines += [f"  {what:<6} {name}  {size:,} bytes" for name, size in files.items()]
        if self.added or self.changed:
            lines.append(f"  upload at most {self.upload_size:,} bytes; {len(self.unchanged)} files are unchanged")
        if self.kept:
            lines.append(f"  keep   {', '.join(self.kept)}")
        if self.tag is not None:
            lines.append(f"  tag    {self.tag}{'' if self.sets_tag else ' (in its place already)'}")
        return lines


@dataclass(frozen=True)
class PushReport(PushPlan):
    """What a push did, or with `dry_run` would do: the plan and its result."""

    dry_run: bool = False
    commit: str | None = None  # the commit that holds the package; None in a dry run
    url: str | None = None  # of that commit
    committed: bool = False  # False if nothing had changed, and in a dry run
    pr_url: str | None = None  # with `create_pr`
    load_lines: str | None = None  # the lines that load exactly this commit; None in a dry run

    def __str__(self) -> str:
        if self.dry_run:
            did = "would push" if self.makes_commit or self.new_repository else "would push nothing: unchanged"
        elif self.committed:
            did = "pushed"
        else:
            did = f"nothing to push: unchanged{'; the tag was set' if self.sets_tag else ''}"
        lines = [f"{self.repo_id} ({self.revision}): {did}", *self._lines()]
        lines += [f"  {what:<6} {text}" for what, text in (("pr", self.pr_url), ("url", self.url)) if text]
        return "\n".join([*lines, *(["", self.load_lines] if self.load_lines else [])])
