"""`gpt2-value audit`: is a sampler honest? Draws from a package, and tests the draws with `sampler_audit`.

Imports typer, of hub_tools the command's loading and showing, and, inside the functions, torch and the app's audits.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from ..errors import OptionsError
from ..library_errors import as_ours
from . import console
from .loading import MAX_SEED, Json, Reviewed, encode, load_sampler

if TYPE_CHECKING:
    from ..app.page.audits import Draw

EXIT_DISHONEST = 1
NEW_TOKENS = 32  # of a response, as in the app's audits, which import torch and are imported later


def audit(
    package: Annotated[str, typer.Argument(help="A package or a GPT-2: a folder, or an id on the Hub.")],
    prompts: Annotated[
        Optional[list[str]], typer.Argument(metavar="[PROMPT...]", help="Texts to go on from; default: end-of-text.")
    ] = None,
    generate: Annotated[
        Optional[list[str]],
        typer.Option(
            metavar="KEY=VALUE",
            help="Draw with generate(KEY=VALUE) instead of with rollout; repeat it for more keys. do_sample is true, "
            f"max_new_tokens {NEW_TOKENS}, all else as generate() and the package's generation_config have it.",
        ),
    ] = None,
    temperature: Annotated[float, typer.Option(help="The claim: temperature.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="The claim: top-k; 0 is off.")] = 0,
    top_p: Annotated[float, typer.Option(help="The claim: top-p; 1 is off.")] = 1.0,
    min_new_tokens: Annotated[int, typer.Option(min=0, help="The claim: no end-of-text before so many tokens.")] = 0,
    score_padding: Annotated[
        bool, typer.Option("--score-padding", help="The claim: what follows a first end-of-text was drawn too.")
    ] = False,
    tokens: Annotated[int, typer.Option(min=50, help="How many to draw, at least.")] = 4000,
    alpha: Annotated[
        float, typer.Option(help="Level of the verdict: honest samplers wrongly called dishonest.")
    ] = 1e-3,
    seed: Annotated[Optional[int], typer.Option(min=0, max=MAX_SEED, help="Makes the draw repeatable.")] = None,
    revision: Annotated[Optional[str], typer.Option(help="Branch, tag or commit of a package on the Hub.")] = None,
    plot: Annotated[Optional[Path], typer.Option(help="Write the histogram to this file, a PNG, SVG or PDF.")] = None,
    reviewed: Reviewed = None,
    json: Json = False,
) -> None:
    """Test whether tokens are draws from the distribution that they would be scored by.

    The claim is the model's own distribution, or what --temperature, --top-k, --top-p and --min-new-tokens make of
    it. Without --generate the tokens are this project's own rollout, by the claim. Exits with 1 if the sampler is
    dishonest, and with 0 if it passes.

      gpt2-value audit my-model --generate max_new_tokens=32

      gpt2-value audit my-model --generate top_k=0 --generate temperature=0.7 --temperature 0.7
    """
    import torch

    from generation_gpt2_value import Sampling

    from ..app.page.audits import audit_rows, by_generate, by_rollout, drawn_rows, options_of

    try:
        options = options_of(generate) if generate else None
    except ValueError as error:
        raise typer.BadParameter(f"--generate {error}") from error
    if plot is not None and not plot.absolute().parent.is_dir():  # said now, and not after minutes of drawing
        raise typer.BadParameter(f"--plot {plot}: there is no folder {plot.absolute().parent}")
    with console.working(f"loading {package}"):
        loaded = load_sampler(package, revision=revision, reviewed=reviewed)
    model = loaded.model
    if prompts:
        queries = encode(loaded.tokenizer, prompts, package)
    else:
        start = model.config.bos_token_id if model.config.bos_token_id is not None else model.config.eos_token_id
        queries = [torch.tensor([0 if start is None else start])]
    end = (options or {}).get("eos_token_id", model.generation_config.eos_token_id)
    torch.manual_seed(torch.seed() if seed is None else seed)
    try:
        claim = Sampling(temperature, top_k, top_p, min_new_tokens, end)
        with console.working("drawing"):
            draw = by_rollout(model, claim)
            if options is not None:
                draw = _reported(by_generate(model, claim, options), options)
            *_, rows = drawn_rows(queries, claim, draw, tokens)
        with console.working("auditing"):
            found = audit_rows(model, rows, claim, alpha=alpha, score_padding=score_padding)
        if plot is not None:
            found.plot(plot)
    except OptionsError as error:
        raise typer.BadParameter(error.found) from error
    except (TypeError, ValueError, ImportError, OSError) as error:  # every argument above is the user's
        raise typer.BadParameter(str(error)) from error
    sampler = "rollout" if options is None else f"generate({', '.join(f'{k}={v!r}' for k, v in options.items())})"
    if json:
        console.show_json(
            {
                "package": package,
                "sampler": sampler,
                "claim": {**asdict(claim), "score_padding": score_padding},
                **found.to_json(),
            }
        )
    else:
        settings = ", ".join(f"{name}={value}" for name, value in asdict(claim).items())
        console.show_audit(found, sampler=sampler, claim=settings + (", padding was drawn" if score_padding else ""))
    if not found.honest:
        raise typer.Exit(EXIT_DISHONEST)


def _not_generated(options: str, gist: str) -> OptionsError:
    return OptionsError(
        f"generate({options}) fails: {gist}",
        expected="arguments of transformers' generate()",
        next_step="correct --generate KEY=VALUE",
    )


def _reported(draw: Draw, options: dict[str, Any]) -> Draw:
    """The same, with what `generate()` says of its arguments as an error of ours: every one of them is the user's."""
    given = ", ".join(f"{name}={value!r}" for name, value in options.items())

    def drawn(prompts: Any, mask: Any) -> Any:
        with as_ours(partial(_not_generated, given)):
            return draw(prompts, mask)

    return drawn
