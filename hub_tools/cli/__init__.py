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
from pathlib import Path
from typing import Annotated, Any, Literal, Optional

import typer

from .. import layout
from ..errors import GPT2ValueHubError, SaveFailedError, SourceError, as_ours
from . import audit, console
from .options import (
    Json,
    Out,
    Overwrite,
    Package,
    Reviewed,
    Revision,
    Seed,
    Temperature,
    TopK,
    TopP,
    TrustRemoteCode,
    encode,
    load,
    nothing_drawn,
    quiet_transformers,
    refuse_revision_of_a_folder,
)

EXIT_REFUSED, EXIT_FINDINGS = 1, 3

app = typer.Typer(
    name="gpt2-value",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # which would take [app] in a help text for a style
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit status: 0 done; 1 refused or failed, the reason is on stderr; 2 wrong usage; "
    "3 (inspect) readable, but verify would refuse it.",
)


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

    A package is a folder that one line of Python loads, wherever torch and transformers are:
    AutoModel.from_pretrained(FOLDER, trust_remote_code=True). Start with:

      gpt2-value create --base openai-community/gpt2 my-model

      gpt2-value verify my-model

      gpt2-value respond my-model "My most favourite movie is"
    """


@app.command()
def create(
    out: Out,
    base: Annotated[str, typer.Option(help="A GPT-2 checkpoint or a package: a folder, or an id on the Hub.")],
    revision: Revision = None,
    dtype: Annotated[
        Literal["auto", "float32", "float16", "bfloat16"], typer.Option(help="Of the weights; auto: the base's.")
    ] = "auto",
    license: Annotated[
        Optional[str], typer.Option(help="License identifier for the card, as apache-2.0; none is assumed.")
    ] = None,
    overwrite: Overwrite = True,
    tokenizer: Annotated[bool, typer.Option(help="Put the base's tokenizer into the package.")] = True,
    json: Json = False,
) -> None:
    """Make a value-head package of a GPT-2 checkpoint.

    The head is new unless the base has one, and starts at zero: every value is exactly 0 until you train it.
    """
    import torch

    from ..convert.convert import load_checkpoint
    from ..package.card import is_hub_id
    from ..package.save import save_package

    quiet_transformers()
    refuse_revision_of_a_folder(base, revision)
    console.working(f"making {out} of {base}")
    loaded = load_checkpoint(base, revision=revision, tokenizer=None if tokenizer else False)
    if tokenizer and loaded.tokenizer is None:
        raise SourceError(f"{base} has no tokenizer", next_step="if it needs none: create --no-tokenizer")
    model = loaded.model if dtype == "auto" else loaded.model.to(getattr(torch, dtype))
    base_model = base if is_hub_id(base) else None
    package = save_package(model, out, loaded.tokenizer, overwrite=overwrite, license=license, base_model=base_model)
    console.show(json, asdict(package), str(package), next=["gpt2-value", "verify", out])


@app.command()
def respond(
    package: Package,
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="What to respond to, one text each.")],
    revision: Revision = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of a response, at most.")] = 20,
    temperature: Temperature = 1.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    reviewed: Reviewed = None,
    html: Annotated[
        Optional[Path], typer.Option(help="Write the responses to this file too, as one page for a browser.")
    ] = None,
    json: Json = False,
) -> None:
    """Respond to prompts, and show each token's log-probability and the value of the state before it.

    The package's code runs only if it is a released version's, or if you say with --reviewed that you have read it.
    """
    import torch

    from gpt2_value.view import TokenTexts, show
    from sampling_gpt2_value import Sampling

    if html is not None and not html.absolute().parent.is_dir():
        raise typer.BadParameter(f"--html {html}: there is no folder {html.absolute().parent}")
    settings: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    try:
        Sampling(**settings)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    console.working(f"loading {package}")
    loaded = load(package, revision=revision, reviewed=reviewed)
    queries = encode(loaded, prompts, package, max_new_tokens)
    settings = {"max_new_tokens": max_new_tokens, **settings}
    generator = torch.Generator()
    generator.manual_seed(generator.seed() if seed is None else seed)
    texts = TokenTexts(loaded.tokenizer)
    ends = {"eos_token_id": loaded.tokenizer.eos_token_id, "generator": generator}
    with as_ours(lambda gist: nothing_drawn(package, gist)):
        rollout = loaded.model.rollout(queries, **settings, **ends)
        page = None if html is None else show(rollout, loaded.tokenizer, loaded.model)
    if html is not None and page is not None:
        try:
            page.save(html)
        except OSError as error:
            raise SaveFailedError(
                f"{html} cannot be written: {error}", next_step="name another: --html FILE"
            ) from error
    responses = []
    for row, prompt in enumerate(prompts):
        drawn = rollout.response_mask[row]
        ids, logprobs = rollout.responses[row][drawn].tolist(), rollout.logprobs[row][drawn].tolist()
        values = [None] * len(ids) if rollout.values is None else rollout.values[row][drawn].tolist()
        tokens = [
            {"id": id, "text": texts[id], "logprob": logprob, "value": value}
            for id, logprob, value in zip(ids, logprobs, values, strict=True)
        ]
        truncated = bool(rollout.truncated[row])
        responses.append({"prompt": prompt, "text": texts.join(ids), "truncated": truncated, "tokens": tokens})
    if json:
        console.show(json, {"package": package, **settings, "seed": seed, "responses": responses})
    else:
        console.show_responses(responses)


@app.command()
def inspect(
    package: Package,
    revision: Revision = None,
    hash_weights: Annotated[
        bool, typer.Option("--hash-weights", help="Compare the weights with the record too, by SHA-256.")
    ] = False,
    diff: Annotated[bool, typer.Option("--diff", help="Show how its code differs from this version's.")] = False,
    json: Json = False,
) -> None:
    """Show what is inside a package, without running any of it.

    Reads JSON, hashes code, and of the weights reads the headers, also on the Hub. Pickles are named and never
    opened. Exits with 3 if the package can be read, but verify would refuse it.
    """
    from ..package.inspect import code_differences, inspect_package
    from ..package.record import diff_command
    from ..package.verify import refusals

    refuse_revision_of_a_folder(package, revision)
    console.working(f"inspecting {package}")
    if diff:
        lines = list(code_differences(package, revision=revision))
        for line in lines or [f"all code is version {layout.__version__}'s"]:
            typer.secho(line, fg={"+": "green", "-": "red", "D": "yellow"}.get(line[:1]))
        raise typer.Exit(EXIT_FINDINGS if lines else 0)
    report = inspect_package(package, revision=revision, hash_weights=hash_weights)
    findings = [refusal.found for refusal in refusals(report)]
    value = {**report.to_json(), "findings": findings}
    known = {file.name: file.installed or bool(file.releases) for file in report.code}
    unknown = ", ".join(name for name, is_known in known.items() if not is_known)
    lines = [
        console.facts(
            {
                **value,
                "code": "" if unknown else "this version's or a released one's",
                "findings": None,
                "NOT a released version's": unknown,
            }
        )
    ]
    lines += [f"{file.sha256}  {file.name}" for file in report.code]  # as `sha256sum` writes it
    lines += [f"! {console.visible(finding)}" for finding in findings]
    lines += [f"read it: {diff_command(package, report.commit)}"] if unknown else []
    console.show(json, value, "\n".join(lines))
    if findings:
        raise typer.Exit(EXIT_FINDINGS)


@app.command()
def verify(
    package: Package,
    revision: Revision = None,
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

    refuse_revision_of_a_folder(package, revision)
    console.working(f"verifying {package}")
    report = verify_package(package, revision=revision, trust_remote_code=trust_remote_code, timeout=timeout)
    console.show(json, asdict(report), str(report))


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="A checkpoint: a folder, a weight file, or an id on the Hub.")],
    out: Out,
    revision: Revision = None,
    config: Annotated[
        Optional[Path], typer.Option(help="GPT-2's config.json, or its folder, where none is beside the weights.")
    ] = None,
    source_format: Annotated[
        Optional[str], typer.Option(help="The library that wrote it, where its files do not tell: seed, trl, ...")
    ] = None,
    base: Annotated[Optional[str], typer.Option(help="For an adapter: its base model, not the one it names.")] = None,
    tokenizer: Annotated[
        Optional[Path], typer.Option(help="Folder of a tokenizer, instead of the checkpoint's own.")
    ] = None,
    summary_first_dropout: Annotated[
        Optional[float], typer.Option(help="Dropout before the head in training, which TRL does not record.")
    ] = None,
    init_value_head: Annotated[
        bool, typer.Option("--init-value-head", help="Start a new head, at zero, where none can be kept.")
    ] = False,
    overwrite: Overwrite = True,
    json: Json = False,
) -> None:
    """Make a package of another library's checkpoint, an adapter or a reward model. It gives the same numbers as there.

    No code that comes with the checkpoint is run. What could not be kept is listed.
    """
    from ..convert.convert import convert_checkpoint

    quiet_transformers()
    refuse_revision_of_a_folder(source, revision)
    console.working(f"converting {source}")
    made = convert_checkpoint(
        source,
        out,
        revision=revision,
        config=config,
        source_format=source_format,  # type: ignore[arg-type]  # checked there, by the list that is kept there
        base=base,
        tokenizer=tokenizer,
        summary_first_dropout=summary_first_dropout,
        init_value_head=init_value_head,
        overwrite=overwrite,
    )
    console.show(json, asdict(made), next=["gpt2-value", "verify", out])


@app.command()
def export(
    package: Package,
    out: Out,
    kind: Annotated[
        Literal["policy", "token-classification", "sequence-classification"],
        typer.Option("--as", help="The policy, or the critic as a classifier."),
    ] = "policy",
    revision: Revision = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Write a package's policy as a plain GPT-2 for any runtime, or its critic as a classifier; without code."""
    from ..convert.export import export_critic, export_policy

    quiet_transformers()
    refuse_revision_of_a_folder(package, revision)
    console.working(f"exporting {package}")
    if kind == "policy":
        exported = export_policy(package, out, revision=revision, overwrite=overwrite)
    else:
        exported = export_critic(package, out, head=kind, revision=revision, overwrite=overwrite)
    console.show(json, asdict(exported))


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
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would change, and change nothing.")] = False,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> None:
    """Verify a package, then push it to the Hub in exactly one commit, and print the lines that load it.

    What the repository has already is not sent again. Faults that pass are retried; a push that failed left the
    branch as it was, and can be run again. The token is the one of hf auth login, or HF_TOKEN.
    """
    from ..publish.push import MESSAGE, push_package

    console.working(f"verifying and pushing {package}")
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
    console.show(json, asdict(report), str(report))


app.command()(audit.audit)


@app.command("app")
def show_app(
    model: Package,
    compare: Annotated[
        Optional[str], typer.Option(help="A second model with the same tokens: a package or a GPT-2.")
    ] = None,
    revision: Revision = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on this machine; 0: any that is free.")] = 7860,
    reviewed: Reviewed = None,
) -> None:
    """See a model in the browser: draw responses, and look at every token's value, log-probability and alternatives.

    With --compare a second model scores the same tokens. Only this machine is served, and only who knows the address
    that is printed. Needs gradio: pip install gradio
    """
    from ..app import end_tidily, listen, serve

    end_tidily()
    place = listen(port)
    console.working(f"loading {model}")
    mine, tokenizer = load(model, revision=revision, reviewed=reviewed, plain=True)
    other = None if compare is None else load(compare, plain=True).model
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


if __name__ == "__main__":
    main()
