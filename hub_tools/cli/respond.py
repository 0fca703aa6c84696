"""`gpt2-value respond`: let a package answer, and show each token's log-probability and value."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from ..errors import SaveFailedError, SourceError, as_ours
from . import console
from .loading import MAX_SEED, Json, Reviewed, encode, load_reviewed

if TYPE_CHECKING:
    from gpt2_value.view import TokenTexts


def respond(
    package: Annotated[str, typer.Argument(help="A package: a folder, or an id on the Hub.")],
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="What to respond to, one text each.")],
    revision: Annotated[Optional[str], typer.Option(help="Branch, tag or commit of a package on the Hub.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of a response, at most.")] = 20,
    temperature: Annotated[float, typer.Option(help="Below 1 sharper, above 1 flatter; more than 0.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Draw from the k most probable tokens; 0 is off.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the most probable tokens of this mass; 1 is off.")] = 1.0,
    seed: Annotated[Optional[int], typer.Option(min=0, max=MAX_SEED, help="Makes the draw repeatable.")] = None,
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

    from decoding_gpt2_value import check_tokens
    from gpt2_value.view import TokenTexts, show
    from sampling_gpt2_value import Sampling

    if html is not None and not html.absolute().parent.is_dir():
        raise typer.BadParameter(f"--html {html}: there is no folder {html.absolute().parent}")
    with console.working(f"loading {package}"):
        model, tokenizer = load_reviewed(package, revision=revision, reviewed=reviewed)
    queries = encode(tokenizer, prompts, package)
    settings: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    try:
        Sampling(**settings)
        for query in queries:
            check_tokens(model, query[None], torch.ones_like(query)[None], max_new_tokens)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    settings = {"max_new_tokens": max_new_tokens, **settings}
    generator = torch.Generator()
    if seed is not None:
        generator.manual_seed(seed)
    else:
        generator.seed()
    with as_ours(lambda gist: _does_not_respond(package, gist)):
        rollout = model.rollout(queries, **settings, eos_token_id=tokenizer.eos_token_id, generator=generator)
    if html is not None:
        with as_ours(lambda gist: _does_not_respond(package, gist)):
            page = show(rollout, tokenizer, model)
        try:
            page.save(html)
        except OSError as error:
            raise SaveFailedError(
                f"{html} cannot be written: {error}",
                expected="a file in a folder that can be written",
                next_step="name another: --html FILE",
            ) from error
    texts = TokenTexts(tokenizer)
    responses = [_response(texts, prompt, rollout[[row]]) for row, prompt in enumerate(prompts)]
    if json:
        console.show_json({"package": package, **settings, "seed": seed, "responses": responses})
    else:
        console.show_responses(responses)


def _response(texts: TokenTexts, prompt: str, rollout: Any) -> dict[str, Any]:
    """One row of a rollout, as plain values."""
    drawn = rollout.response_mask[0]
    ids = rollout.responses[0][drawn].tolist()
    logprobs = rollout.logprobs[0][drawn].tolist()
    values = [None] * len(ids) if rollout.values is None else rollout.values[0][drawn].tolist()
    return {
        "prompt": prompt,
        "text": texts.join(ids),
        "truncated": bool(rollout.truncated[0]),
        "tokens": [
            {"id": id, "text": texts[id], "logprob": logprob, "value": value}
            for id, logprob, value in zip(ids, logprobs, values, strict=True)
        ],
    }


def _does_not_respond(package: str, gist: str) -> SourceError:
    return SourceError(
        f"nothing can be drawn from {package}: {gist}",
        expected="a model with finite logits",
        next_step=f"gpt2-value verify {package}",
    )
