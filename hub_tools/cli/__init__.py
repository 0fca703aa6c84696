"""The `gpt2-value` command: one short function for each subcommand. What they print is in `console`.

hub_tools is imported inside the functions, so that `--help` and `inspect` start at once.

Exit status, for scripts: 0 done; 1 refused or failed, with the reason and the next step on stderr; 2 wrong
usage; 3 (`inspect` only) the package can be read, but `verify` would refuse it. `audit` exits with 1 for a
dishonest sampler too.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .. import layout
from ..errors import GPT2ValueHubError, LoadError, OptionsError, SourceError, as_ours
from . import audit as audit  # a subcommand, which registers itself
from . import console
from .options import command, encode, flag, load, option, parser, wrong

EXIT_REFUSED, EXIT_USAGE, EXIT_FINDINGS = 1, 2, 3
parser.add_argument("--version", action="version", version=layout.__version__)
parser.epilog = """\
Exit status: 0 done; 1 refused or failed, the reason is on stderr; 2 wrong usage; 3 (inspect) readable, but verify
would refuse it.
"""
parser.description = """\
GPT-2 with a value head: make a package, inspect it, prove that it loads, and sample from it.

A package is a folder that one line of Python loads, wherever torch and transformers are:
AutoModel.from_pretrained(FOLDER, trust_remote_code=True). Start with:

  gpt2-value create --base openai-community/gpt2 my-model
  gpt2-value verify my-model
  gpt2-value respond my-model "My most favourite movie is"
"""


@command(
    "out",
    option("--base", required=True, help="a GPT-2 checkpoint or a package: a folder, or an id on the Hub"),
    "revision",
    option("--dtype", choices=["float32", "float16", "bfloat16"], help="of the weights; default: the base's"),
    option("--license", help="license identifier for the card, as apache-2.0; none is assumed"),
    "overwrite",
    option("--tokenizer", action=argparse.BooleanOptionalAction, default=True, help="take the base's tokenizer along"),
    "json",
)
def create(
    folder: Path, base: str, revision: str | None, dtype: str | None, tokenizer: bool, json: bool, **options: Any
) -> None:
    """Make a value-head package of a GPT-2 checkpoint.

    The head is new unless the base has one, and starts at zero: every value is exactly 0 until you train it.
    """
    import torch

    from ..convert.convert import load_checkpoint
    from ..package.card import is_hub_id
    from ..package.save import save_package

    loaded = load_checkpoint(base, revision=revision, tokenizer=None if tokenizer else False)
    if tokenizer and loaded.tokenizer is None:
        raise SourceError(f"{base} has no tokenizer", next_step="if it needs none: create --no-tokenizer")
    model = loaded.model if dtype is None else loaded.model.to(getattr(torch, dtype))
    package = save_package(model, folder, loaded.tokenizer, base_model=base if is_hub_id(base) else None, **options)
    console.show(json, asdict(package), str(package), made=folder)


@command(
    "package",
    option("prompts", nargs="+", metavar="PROMPT", help="what to respond to, one text each"),
    "revision",
    option("--max-new-tokens", type=int, default=20, help="length of a response, at most"),
    "temperature",
    "top_k",
    "top_p",
    "seed",
    "reviewed",
    option("--html", type=Path, help="write the responses to this file too, as one page for a browser"),
    "json",
)
def respond(
    package: str,
    prompts: list[str],
    revision: str | None,
    max_new_tokens: int,
    seed: int | None,
    reviewed: list[str],
    html: Path | None,
    json: bool,
    **settings: Any,
) -> None:
    """Respond to prompts, and show each token's log-probability and the value of the state before it.

    The package's code runs only if it is a released version's, or if you say with --reviewed that you have read it.
    """
    from gpt2_value.view import TokenTexts, show
    from sampling_gpt2_value import Sampling

    with as_ours(wrong):
        Sampling(**settings)
    loaded = load(package, revision, reviewed, seed=seed)
    queries = encode(loaded, prompts, package, max_new_tokens)
    settings["max_new_tokens"] = max_new_tokens
    texts = TokenTexts(loaded.tokenizer)
    with as_ours(lambda gist: LoadError(f"{package} draws nothing: {gist}", next_step=f"gpt2-value verify {package}")):
        rollout = loaded.model.rollout(queries, **settings, eos_token_id=loaded.tokenizer.eos_token_id)
    if html is not None:
        with as_ours(wrong):
            show(rollout, loaded.tokenizer, loaded.model).save(html)
    responses, lines = [], []
    for row, prompt in enumerate(prompts):
        drawn = rollout.response_mask[row]
        text = texts.join(rollout.responses[row][drawn].tolist())
        columns = (column[row][drawn].tolist() for column in (rollout.responses, rollout.logprobs, rollout.values))
        tokens = [
            {"id": id, "text": texts[id], "logprob": logprob, "value": value}
            for id, logprob, value in zip(*columns, strict=True)
        ]
        truncated = bool(rollout.truncated[row])
        responses.append({"prompt": prompt, "text": text, "truncated": truncated, "tokens": tokens})
        lines += [console.visible(prompt + text), f"  {'token':<20}  {'log-prob':>8}  {'value':>8}"]
        lines += [*map(console.token_row, tokens), "  stopped at --max-new-tokens\n" if truncated else ""]
    value = {"package": package, **settings, "seed": seed, "responses": responses}
    console.show(json, value, "\n".join(lines))


@command(
    "package",
    "revision",
    flag("--diff", help="show how its code differs from this version's"),
    "json",
)
def inspect(package: str, revision: str | None, diff: bool, json: bool) -> int:
    """Show what is inside a package, without running any of it.

    Reads JSON, hashes code, and of the weights reads the headers, also on the Hub. Pickles are named and never
    opened. Exits with 3 if the package can be read, but verify would refuse it.
    """
    from ..package.inspect import code_differences, inspect_package
    from ..package.record import diff_command, releases
    from ..package.verify import refusals

    if diff:
        lines = list(code_differences(package, revision=revision))
        print("\n".join(lines or [f"all code is version {layout.__version__}'s"]))
        return EXIT_FINDINGS if lines else 0
    report = inspect_package(package, revision=revision)
    findings = [refusal.found for refusal in refusals(report)]
    value = {**report.to_json(), "findings": findings}
    known = report.code in releases().values()
    code = "this version's or a released one's" if known else "NOT a released version's"
    lines = [console.facts({**value, "code": code}), *(f"{digest}  {name}" for name, digest in report.code.items())]
    lines += [] if known else [f"read it: {diff_command(package, report.commit)}"]
    console.show(json, value, "\n".join(lines))
    return EXIT_FINDINGS if findings else 0


@command(
    "package",
    "revision",
    "trust",
    option("--timeout", type=float, default=600, help="seconds that the fresh interpreter may take"),
    "json",
)
def verify(package: str, json: bool, **options: Any) -> None:
    """Prove that a package loads, and computes what it did when it was saved.

    Loads it strictly in a fresh interpreter that has torch and transformers and cannot see this installation,
    and compares logits and values on a probe with those recorded at save time.
    """
    from ..package.verify import verify_package

    report = verify_package(package, **options)
    console.show(json, asdict(report), str(report))


@command(
    option("source", help="a checkpoint: a folder, a weight file, or an id on the Hub"),
    "out",
    "revision",
    option("--config", help="GPT-2's config.json, or its folder, where none is beside the weights"),
    option("--source-format", help="the library that wrote it, where its files do not tell: seed, trl, ..."),
    option("--base", help="for an adapter: its base model, not the one it names"),
    option("--tokenizer", type=Path, help="folder of a tokenizer, instead of the checkpoint's own"),
    option("--summary-first-dropout", type=float, help="dropout before the head in training; TRL does not record it"),
    flag("--init-value-head", help="start a new head, at zero, in the place of any other"),
    "overwrite",
    "json",
)
def convert(source: str, folder: Path, json: bool, **options: Any) -> None:
    """Make a package of another library's checkpoint, an adapter or a reward model. It gives the same numbers as there.

    No code that comes with the checkpoint is run. What could not be kept is listed.
    """
    from ..convert.convert import convert_checkpoint

    made = convert_checkpoint(source, folder, **options)
    console.show(json, asdict(made), made=folder)


@command(
    "package",
    "out",
    option(
        "--as",
        dest="kind",
        choices=["policy", "token-classification", "sequence-classification"],
        default="policy",
        help="the policy, or the critic as a classifier",
    ),
    "revision",
    "overwrite",
    "json",
)
def export(package: str, folder: Path, kind: Any, json: bool, **options: Any) -> None:
    """Write a package's policy as a plain GPT-2 for any runtime, or its critic as a classifier; without code."""
    from ..convert.export import export_critic, export_policy

    if kind == "policy":
        exported = export_policy(package, folder, **options)
    else:
        exported = export_critic(package, folder, head=kind, **options)
    console.show(json, asdict(exported))


@command(
    "package",
    option("repo_id", help="where to: owner/name, or a name in your own account"),
    option("--revision", help="branch to push to; made if there is none"),
    option("--private", action="store_true", default=None, help="make a repository that is created private"),
    option("--public", dest="private", action="store_false", help="make it public"),
    flag("--create-pr", help="open a pull request instead"),
    option("--tag", help="tag for the commit"),
    option("--message", "-m", dest="commit_message", default=argparse.SUPPRESS, help="title of the commit"),
    flag("--dry-run", help="show what would change, and change nothing"),
    "trust",
    "json",
)
def push(package: str, repo_id: str, json: bool, **options: Any) -> None:
    """Verify a package, then push it to the Hub in exactly one commit, and print the lines that load it.

    What the repository has already is not sent again. Faults that pass are retried; a push that failed left the
    branch as it was, and can be run again. The token is the one of hf auth login, or HF_TOKEN.
    """
    from ..publish.push import push_package

    report = push_package(package, repo_id, **options)
    console.show(json, asdict(report), str(report))


@command(
    option("model", help="a package: a folder, or an id on the Hub"),
    option("--compare", help="a second model with the same tokens: a package or a GPT-2"),
    "revision",
    option("--port", type=int, default=7860, help="port on this machine; 0: any that is free"),
    "reviewed",
)
def app(model: str, compare: str | None, revision: str | None, port: int, reviewed: list[str]) -> None:
    """See a model in the browser: draw responses, and look at every token's value, log-probability and alternatives.

    With --compare a second model scores the same tokens. Only this machine is served, and only who knows the address
    that is printed. Needs gradio: pip install gradio
    """
    from ..app import listen, serve

    with listen(port) as place:
        mine = load(model, revision, reviewed, plain=True)
        other = None if compare is None else load(compare, plain=True).model
        serve(place, mine.model, mine.tokenizer, other, say=lambda address: print(address, flush=True))


@command()
def ppo() -> None:
    """Train a GPT-2 by PPO on your prompts and your reward; `gpt2-value ppo --help` lists its options."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; always ends in `SystemExit` with one of the documented statuses."""
    for stream in (sys.stdout, sys.stderr):  # a terminal or a file that cannot show a letter gets its escape
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["ppo"]:  # which has a parser of its own
        from gpt2_value.ppo import main as run

        raise SystemExit(run(words[1:], "gpt2-value ppo"))
    options = vars(parser.parse_args(words))
    function = options.pop("function")
    if function is not inspect:  # which needs no transformers
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
    try:
        raise SystemExit(function(**options))
    except GPT2ValueHubError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(EXIT_USAGE if isinstance(error, OptionsError) else EXIT_REFUSED) from None


if __name__ == "__main__":
    main()
