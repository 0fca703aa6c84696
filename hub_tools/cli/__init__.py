"""The `gpt2-value` command: one short function for each subcommand. What they print is in `console`.

Imports typer, and the modules of hub_tools inside the functions that need them, so that `--help` and `inspect` start
at once.

Exit status, for scripts: 0 done; 1 refused or failed, with the reason and the next step on stderr; 2 wrong
usage; 3 (`inspect` only) the package can be read, but `verify` would refuse it. `audit` exits with 1 for a
dishonest sampler too.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Optional

import typer

from .. import layout
from ..errors import GPT2ValueHubError
from . import audit, console, respond
from .loading import (
    DryRun,
    Json,
    Reviewed,
    TrustRemoteCode,
    load_base,
    load_sampler,
    quiet_transformers,
    refuse_revision_of_a_folder,
)

if TYPE_CHECKING:
    from ..package.inspect import PackageReport

EXIT_REFUSED = 1
EXIT_FINDINGS = 3

app = typer.Typer(
    name="gpt2-value",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit status: 0 done; 1 refused or failed, the reason is on stderr; 2 wrong usage; "
    "3 (inspect) readable, but verify would refuse it.",
)

ExportKind = Literal["policy", "token-classification", "sequence-classification"]


class Dtype(str, Enum):
    """Names of torch dtypes that a package can hold; `auto` is the checkpoint's own."""

    auto = "auto"
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


def _version(asked: bool) -> None:
    if asked:
        print(layout.__version__)
        raise typer.Exit


@app.callback()
def about(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """GPT-2 with a value head: make a package, inspect it, prove that it loads, and sample from it.

    A [bold]package[/] is a folder that one line of Python loads, wherever torch and transformers are:
    AutoModel.from_pretrained(FOLDER, trust_remote_code=True). Start with:

      gpt2-value create --base openai-community/gpt2 my-model

      gpt2-value verify my-model

      gpt2-value respond my-model "My most favourite movie is"
    """


@app.command()
def create(
    out: Annotated[Path, typer.Argument(help="Folder to write the package to: new, empty, or a package.")],
    base: Annotated[str, typer.Option(help="A GPT-2 checkpoint or a package: a folder, or an id on the Hub.")],
    revision: Annotated[Optional[str], typer.Option(help="Branch, tag or commit of the base on the Hub.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="Type of the weights in the package.")] = Dtype.auto,
    license: Annotated[
        Optional[str], typer.Option(help="License identifier for the card, as apache-2.0; none is assumed.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a package that is there already.")] = True,
    tokenizer: Annotated[bool, typer.Option(help="Put the base's tokenizer into the package.")] = True,
    json: Json = False,
) -> None:
    """Make a value-head package of a GPT-2 checkpoint.

    The head is new unless the base has one, and starts at zero: every value is exactly 0 until you train it.
    """
    from ..package.card import is_hub_id
    from ..package.save import save_package

    with console.working(f"loading {base}"):
        loaded = load_base(base, revision=revision, dtype=dtype.value, tokenizer=tokenizer)
    with console.working(f"writing {out}"):
        package = save_package(
            loaded.model,
            out,
            loaded.tokenizer,
            overwrite=overwrite,
            license=license,
            base_model=base if is_hub_id(base) else None,
        )
    if json:
        console.show_json({**asdict(package), "folder": str(package.folder)})
    else:
        console.show_saved(package)


app.command()(respond.respond)


@app.command()
def inspect(
    package: Annotated[str, typer.Argument(help="A package: a folder, or an id on the Hub.")],
    revision: Annotated[Optional[str], typer.Option(help="Branch, tag or commit of a package on the Hub.")] = None,
    hash_weights: Annotated[
        bool, typer.Option("--hash-weights", help="Compare the weights with the record too, by SHA-256.")
    ] = False,
    json: Json = False,
) -> None:
    """Show what is inside a package, without running any of it.

    Reads JSON, hashes code, and of the weights reads the headers, also on the Hub. Pickles are named and never
    opened. Exits with 3 if the package can be read, but verify would refuse it.
    """
    from ..package.inspect import inspect_package

    if revision is not None:
        refuse_revision_of_a_folder(package, revision)
    with console.working(f"inspecting {package}"):
        report = inspect_package(package, revision=revision, hash_weights=hash_weights)
    findings = _findings(report)
    if json:
        console.show_json({**report.to_json(), "findings": findings})
    else:
        console.show_inspection(report, findings)
    if findings:
        raise typer.Exit(EXIT_FINDINGS)


@app.command()
def verify(
    package: Annotated[str, typer.Argument(help="A package's folder.")],
    trust_remote_code: TrustRemoteCode = False,
    timeout: Annotated[
        float, typer.Option(min=1, max=7 * 24 * 3600, help="Seconds that the fresh interpreter may take.")
    ] = 600,
    json: Json = False,
) -> None:
    """Prove that a package loads, and computes what it did when it was saved.

    Loads it strictly in a fresh interpreter that has torch and transformers and cannot see this installation,
    and compares logits and values on a probe with those recorded at save time.
    """
    from ..package.verify import verify_package

    with console.working(f"verifying {package}"):
        report = verify_package(package, trust_remote_code=trust_remote_code, timeout=timeout)
    if json:
        console.show_json(report.to_json())
    else:
        console.show_verification(report)


@app.command()
def convert(
    source: Annotated[
        Path, typer.Argument(help="Another library's checkpoint: a folder, or a weight file with its config.json.")
    ],
    out: Annotated[Path, typer.Argument(help="Folder to write the package to: new, empty, or a package.")],
    config: Annotated[
        Optional[Path], typer.Option(help="GPT-2's config.json, or its folder, where none is beside the weights.")
    ] = None,
    source_format: Annotated[
        Optional[str], typer.Option(help="The library that wrote it, where its files do not tell: seed, trl, ...")
    ] = None,
    base: Annotated[
        Optional[Path], typer.Option(help="For an adapter: the folder of its base model, instead of the one it names.")
    ] = None,
    tokenizer: Annotated[
        Optional[Path], typer.Option(help="Folder of a tokenizer, instead of the checkpoint's own.")
    ] = None,
    summary_first_dropout: Annotated[
        Optional[float], typer.Option(help="Dropout before the head in training, which TRL does not record.")
    ] = None,
    init_value_head: Annotated[
        bool, typer.Option("--init-value-head", help="Start a new head, at zero, where none can be kept.")
    ] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace a package that is there already.")] = True,
    json: Json = False,
) -> None:
    """Make a package of a checkpoint of TRL's, trlx's, the seed's or a reward model. It gives the same numbers as
    there.

    No code that comes with the checkpoint is run. What could not be kept is listed.
    """
    from ..convert.convert import convert_checkpoint

    quiet_transformers()
    with console.working(f"converting {source}"):
        conversion = convert_checkpoint(
            source,
            out,
            config=config,
            source_format=source_format,  # type: ignore[arg-type]  # checked there, by the list that is kept there
            base=base,
            tokenizer=tokenizer,
            summary_first_dropout=summary_first_dropout,
            init_value_head=init_value_head,
            overwrite=overwrite,
        )
    if json:
        console.show_json(conversion.to_json())
    else:
        console.show_conversion(conversion)


@app.command()
def export(
    package: Annotated[Path, typer.Argument(help="A package's folder.")],
    out: Annotated[Path, typer.Argument(help="Folder to write the plain GPT-2 to: new, or empty.")],
    kind: Annotated[ExportKind, typer.Option("--as", help="The policy, or the critic as a classifier.")] = "policy",
    overwrite: Annotated[bool, typer.Option(help="Replace a plain GPT-2 that is there already.")] = False,
    json: Json = False,
) -> None:
    """Write a package's policy as a plain GPT-2 for any runtime, or its critic as a classifier; without code."""
    from ..convert import export

    quiet_transformers()
    with console.working(f"exporting {package}"):
        if kind == "policy":
            exported = export.export_policy(package, out, overwrite=overwrite)
        else:
            exported = export.export_critic(package, out, head=kind, overwrite=overwrite)
    if json:
        console.show_json(exported.to_json())
    else:
        console.show_exported(exported)


@app.command()
def push(
    package: Annotated[Path, typer.Argument(help="A package's folder.")],
    repo_id: Annotated[str, typer.Argument(help="Where to: owner/name, or a name in your own account.")],
    revision: Annotated[Optional[str], typer.Option(help="Branch to push to; made if there is none.")] = None,
    private: Annotated[
        Optional[bool], typer.Option("--private/--public", help="Visibility of a repository that is created.")
    ] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    tag: Annotated[Optional[str], typer.Option(help="Tag for the commit.")] = None,
    message: Annotated[Optional[str], typer.Option("--message", "-m", help="Title of the commit.")] = None,
    dry_run: DryRun = False,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> None:
    """Verify a package, then push it to the Hub in exactly one commit, and print the lines that load it.

    What the repository has already is not sent again. Faults that pass are retried; a push that failed left the
    branch as it was, and can be run again. The token is the one of hf auth login, or HF_TOKEN.
    """
    from ..publish.push import MESSAGE, push_package

    # not a spinner, which would hide the bars of an upload
    console.err.print(f"verifying and pushing {console.visible(str(package))}")
    report = push_package(
        package,
        repo_id,
        revision=revision,
        private=private,
        create_pr=create_pr,
        tag=tag,
        commit_message=MESSAGE if message is None else message,
        dry_run=dry_run,
        trust_remote_code=trust_remote_code,
    )
    if json:
        console.show_json(asdict(report))
    else:
        console.show_push(report)


app.command()(audit.audit)


@app.command("app")
def show_app(
    model: Annotated[str, typer.Argument(help="A package: a folder, or an id on the Hub.")],
    compare: Annotated[
        Optional[str], typer.Option(help="A second model with the same tokens: a package or a GPT-2.")
    ] = None,
    revision: Annotated[Optional[str], typer.Option(help="Branch, tag or commit of the model on the Hub.")] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on this machine; 0: any that is free.")] = 7860,
    reviewed: Reviewed = None,
) -> None:
    """See a model in the browser: draw responses, and look at every token's value, log-probability and alternatives.

    With --compare a second model scores the same tokens. Only this machine is served, and only who knows the address
    that is printed. Needs gradio: pip install gradio
    """
    from ..app import listen, serve

    place = listen(port)
    with console.working(f"loading {model}"):
        mine, tokenizer = load_sampler(model, revision=revision, reviewed=reviewed)
        other = None if compare is None else load_sampler(compare, revision=None, reviewed=None).model
    serve(place, mine, tokenizer, other, say=typer.echo)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False)
def ppo(context: typer.Context) -> None:
    """Train a GPT-2 by PPO on your prompts and your reward; `gpt2-value ppo --help` lists its options."""
    from gpt2_value.ppo import main

    raise SystemExit(main(context.args, "gpt2-value ppo"))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; always ends in `SystemExit` with one of the documented statuses."""
    for stream in (sys.stdout, sys.stderr):  # a terminal or a file that cannot show a letter gets its escape
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app(list(arguments) if arguments is not None else None)
    except GPT2ValueHubError as error:
        console.show_error(error)
        raise SystemExit(EXIT_REFUSED) from None


def _findings(report: PackageReport) -> list[str]:
    """Return why `verify` would refuse a package that can be read."""
    from ..package.verify import refusals

    return [refusal.found for refusal in refusals(report)]


if __name__ == "__main__":
    main()
