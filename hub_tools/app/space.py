"""The app as a Space on the Hub: written complete, for a model that was verified at one commit, and pushed in one.

Imports the standard library, huggingface_hub, of hub_tools `hub`, `package` and `publish`. What a Space's metadata
mean: https://huggingface.co/docs/hub/spaces-config-reference.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from huggingface_hub import CommitOperationDelete, constants

from .. import layout
from ..errors import FolderRefusedError, SaveFailedError, SourceError
from ..hub import download
from ..hub.repository import Branch, Hub
from ..package.loading.verify import verify_package
from ..package.reading.source import HubOptions, repository_id
from ..publish.report import MAIN, PushReport
from ..publish.upload_set import LocalFile, merge_cards

FILES = Path(__file__).with_name("space_files")
PAGE = Path(__file__).with_name("page")
# What the page imports of the remote code; the model itself comes with its own.
CODE = ("decoding_gpt2_value.py", "generation_gpt2_value.py", "sampling_gpt2_value.py", "scoring_gpt2_value.py")
REQUIRED = ("torch", "transformers", "huggingface_hub", "safetensors", "tokenizers", "gradio", "matplotlib")
OURS = ("page", "sampler_audit")  # folders of a Space that hold nothing else
CARD, APP, REQUIREMENTS = "README.md", "app.py", "requirements.txt"
MESSAGE = "Push the app"


def space_files(
    model: str, *, revision: str | None = None, token: str | None = None, trust_remote_code: bool = False
) -> dict[str, bytes]:
    """Verify a package on the Hub, and return the files of a Space that shows it: path -> content.

    Args:
        model: the package's id on the Hub, `owner/name`.
        revision: branch, tag or commit; the Space loads the commit that this is now.
        token: for the Hub, instead of the one that huggingface_hub knows.
        trust_remote_code: verify also a package whose code is not this installed version's, which runs that code.

    Raises:
        SourceError: a folder, which a Space could not load, or a package without a tokenizer.
        And everything that `download.fetch` and `verify_package` raise.
    """
    if repository_id(model, HubOptions()) is None:
        raise SourceError(
            f"{model} is not on the Hub, and a Space loads its model from there",
            expected="owner/name of a package on the Hub",
            next_step="push it first: gpt2-value push FOLDER OWNER/NAME",
        )
    snapshot = download.fetch(model, revision=revision, token=token)
    package = verify_package(snapshot.folder, trust_remote_code=trust_remote_code).package
    if package.tokenizer is None:
        raise SourceError(
            f"{model} has no tokenizer, and the app shows texts",
            expected="a package with a tokenizer's files",
            next_step="save it again with its tokenizer: save_package(model, FOLDER, tokenizer), then push",
        )
    facts = {
        "model": model,
        "commit": snapshot.commit,
        "url": f"{constants.ENDPOINT}/{model}",
        "title": json.dumps(f"{model.split('/')[1]}, token by token"),
        "gradio": importlib.metadata.version("gradio"),
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
    }
    quoted = {name: json.dumps(facts[name]) for name in ("model", "commit")}
    files = {
        CARD: _filled(CARD, facts),
        APP: _filled(APP, quoted),
        REQUIREMENTS: "".join(f"{name}=={_version(name)}\n" for name in REQUIRED).encode(),
    }
    home = Path(layout.__file__).resolve().parent.parent
    files |= {name: (home / name).read_bytes() for name in CODE}
    for folder in (PAGE, home / "sampler_audit"):
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".py", ".css"):
                files[PurePosixPath(folder.name, path.relative_to(folder)).as_posix()] = path.read_bytes()
    return files


def write_space(files: Mapping[str, bytes], folder: Path) -> None:
    """Write a Space's files into a folder that is new or empty.

    Raises:
        FolderRefusedError: it holds something.
        SaveFailedError: the system refused a write.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise FolderRefusedError(
                f"{folder} is not empty", expected="a new or empty folder", next_step="name another: --folder FOLDER"
            )
        for name, data in files.items():
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)
    except OSError as error:
        raise SaveFailedError(
            f"the Space cannot be written to {folder}: {error}",
            expected="a folder that can be written",
            next_step="name another: --folder FOLDER",
        ) from error


def push_space(
    files: Mapping[str, bytes],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    dry_run: bool = False,
    patience: float = 300.0,
) -> PushReport:
    """Push a Space's files in exactly one commit; what the Space has already is not sent again.

    Files of the app that no longer belong are deleted in the same commit, and all others in the repository stay. Its
    README keeps its text and its own metadata; ours are merged into it.

    Args:
        files: what `space_files` returned.
        repo_id: `name` or `owner/name` of the Space, which is created if there is none.
        private: visibility of a Space that is created.
        token, dry_run, patience: as in `push_package`.

    Raises:
        What `push_package` raises of the Hub, the token and the branch.
    """
    hub = Hub(repo_id, kind="space", token=token, patience=patience)
    hub.check_token()
    is_new = hub.is_private() is None
    if is_new and not dry_run:
        hub.create(private=private)
    base = Branch(MAIN, "", {}, exists=False, tags={}) if is_new and dry_run else hub.read_branch(MAIN)
    with tempfile.TemporaryDirectory(prefix="gpt2-value-space-") as scratch:
        files = _with_their_card(files, hub, base, Path(scratch))
    local = {name: LocalFile(Path(name), len(data), (), data) for name, data in files.items()}
    same = {name for name, file in local.items() if file.same_as(base.files.get(name))}
    stale = {name for name in base.files if name.split("/")[0] in OURS and name not in local}
    plan = PushReport(
        repo_id=hub.repo_id,
        revision=MAIN,
        new_repository=is_new,
        new_branch=False,
        added={name: file.size for name, file in local.items() if name not in base.files},
        changed={name: file.size for name, file in local.items() if name in base.files and name not in same},
        deleted={name: base.files[name].size for name in sorted(stale)},
        unchanged={name: file.size for name, file in local.items() if name in same},
        kept={name: file.size for name, file in base.files.items() if name not in local and name not in stale},
        tag=None,
        sets_tag=False,
        dry_run=dry_run,
    )
    if dry_run:
        return plan
    commit = base.commit
    if plan.makes_commit:
        sent = {name: files[name] for name in (*plan.added, *plan.changed)}
        additions = hub.upload(dict(sent), branch=MAIN, create_pr=False)
        deletions = [CommitOperationDelete(name, is_folder=False) for name in plan.deleted]
        commit = hub.commit([*additions, *deletions], onto=base, message=MESSAGE, create_pr=False).commit
    return PushReport(
        **{**vars(plan), "commit": commit, "url": f"{hub.url}/commit/{commit}", "committed": plan.makes_commit}
    )


def _with_their_card(files: Mapping[str, bytes], hub: Hub, base: Branch, scratch: Path) -> dict[str, bytes]:
    """The files, with our metadata in the README that the Space has already."""
    if CARD not in base.files:
        return dict(files)
    theirs = hub.read(CARD, commit=base.commit, folder=scratch / "cache")
    return {**files, CARD: theirs if theirs == files[CARD] else merge_cards(files[CARD], theirs, scratch)}


def _filled(name: str, facts: Mapping[str, str]) -> bytes:
    return (FILES / f"{name}.template").read_text(encoding="utf-8").format(**facts).encode()


def _version(name: str) -> str:
    """The installed version, without the part that says for which hardware it was built."""
    return importlib.metadata.version(name).split("+")[0]
