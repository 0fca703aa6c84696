"""`gpt2-value app` and `gpt2-value space`: see a model in a browser, here or on the Hub.

Imports typer, of hub_tools the command's loading and showing, and, inside the functions, the app.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from . import console
from .loading import DryRun, Json, TrustRemoteCode, load_sampler, refuse_revision_of_a_folder

if TYPE_CHECKING:
    from ..app.page.desk import Named
    from ..app.review import Source


def app(
    model: Annotated[str, typer.Argument(help="A package: a folder, or an id on the Hub.")],
    compare: Annotated[
        Optional[str], typer.Option(help="A second model with the same tokens: a package or a GPT-2.")
    ] = None,
    revision: Annotated[Optional[str], typer.Option(help="Branch, tag or commit of the model on the Hub.")] = None,
    compare_revision: Annotated[
        Optional[str], typer.Option(help="Branch, tag or commit of the second model on the Hub.")
    ] = None,
    port: Annotated[
        Optional[int], typer.Option(min=1, max=65535, help="Port on this machine; default: the first free from 7860.")
    ] = None,
    browser: Annotated[bool, typer.Option(help="Open a browser's window.")] = True,
) -> None:
    """See a model in the browser: draw responses, and look at every token's value, log-probability and alternatives.

    With --compare a second model scores the same tokens. The page is served on 127.0.0.1 only. Code that is no released
    version's is shown in the browser first, and runs once you agree to it there. Needs pip install 'gpt2-value[app]'.
    """
    from ..app.review import Source
    from ..app.serve import open_app

    if compare is None and compare_revision is not None:
        raise typer.BadParameter("--compare-revision has no use without --compare: leave it out")
    sources = [Source(model, revision)] + ([Source(compare, compare_revision)] if compare is not None else [])
    for source in sources:
        refuse_revision_of_a_folder(source.name, source.revision)
    page = open_app(sources, _load, port=port, in_browser=browser, say=lambda text: typer.echo(text, err=True))
    page.block_thread()


def _load(source: Source, reviewed: Mapping[str, str]) -> Named:
    """A package whose code is known or was agreed to, or a plain GPT-2."""
    from ..app.page.desk import Named

    hashes = [f"{name}={digest}" for name, digest in reviewed.items()]
    loaded = load_sampler(source.name, revision=source.revision, reviewed=hashes)
    commit = getattr(loaded.model.config, "_commit_hash", None)
    about = [f"commit {commit}"] if commit else []
    if not any(weight.any() for weight in loaded.model.v_head.parameters()):
        about.append("its value head is new, so every value is 0")
    return Named(source.name, loaded.model, loaded.tokenizer, ", ".join(about))


def space(
    model: Annotated[str, typer.Argument(help="A package's id on the Hub.")],
    repo_id: Annotated[
        Optional[str], typer.Argument(metavar="[OWNER/NAME]", help="The Space; left out with --folder.")
    ] = None,
    revision: Annotated[Optional[str], typer.Option(help="Branch, tag or commit of the package.")] = None,
    folder: Annotated[
        Optional[Path], typer.Option(help="Write the Space to this new folder only, and push nothing.")
    ] = None,
    private: Annotated[
        Optional[bool], typer.Option("--private/--public", help="Visibility of a Space that is created.")
    ] = None,
    dry_run: DryRun = False,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> None:
    """Put the app for a package on the Hub, as a Space, in exactly one commit.

    The package is verified first, and the Space loads the very commit that was. It is complete by itself: its
    requirements are pinned, and this project need not be installed where it runs.
    """
    from ..app.serve import require_gradio
    from ..app.space import push_space, space_files, write_space

    if (repo_id is None) == (folder is None):
        raise typer.BadParameter("name the Space, OWNER/NAME, to push it, or --folder FOLDER to write it only")
    require_gradio()
    with console.working(f"verifying {model}"):
        files = space_files(model, revision=revision, trust_remote_code=trust_remote_code)
    if folder is not None:
        write_space(files, folder)
        sizes = {name: len(data) for name, data in files.items()}
        if json:
            console.show_json({"folder": str(folder), "files": sizes})
        else:
            console.show_space(folder, sizes)
        return
    with console.working(f"pushing {repo_id}"):
        report = push_space(files, str(repo_id), private=private, dry_run=dry_run)
    if json:
        console.show_json(asdict(report))
    else:
        console.show_push(report)
