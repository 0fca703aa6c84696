"""`gpt2-value respond`: let a package answer, and show each token's log-probability and value.

Imports typer, of hub_tools the command's loading and showing and the app's page, and, inside the functions, torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from ..errors import SaveFailedError
from . import console
from .loading import MAX_SEED, Json, Loaded, Reviewed, encode, load_reviewed


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

    if html is not None and not html.absolute().parent.is_dir():
        raise typer.BadParameter(f"--html {html}: there is no folder {html.absolute().parent}")
    with console.working(f"loading {package}"):
        loaded = load_reviewed(package, revision=revision, reviewed=reviewed)
    model, tokenizer = loaded.model, loaded.tokenizer
    queries = encode(tokenizer, prompts, package)
    generator = torch.Generator()
    if seed is not None:
        generator.manual_seed(seed)
    else:
        generator.seed()
    try:
        rollout = model.rollout(
            queries,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            eos_token_id=tokenizer.eos_token_id,
            generator=generator,
        )
    except (TypeError, ValueError) as error:  # every argument of the rollout is the user's
        raise typer.BadParameter(str(error)) from error
    settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    if html is not None:
        _write_page(html, loaded, rollout, package, {**settings, "seed": seed})
    responses = [_response(tokenizer, prompt, rollout[[row]]) for row, prompt in enumerate(prompts)]
    if json:
        console.show_json({"package": package, **settings, "seed": seed, "responses": responses})
    else:
        console.show_responses(responses)


def _response(tokenizer: Any, prompt: str, rollout: Any) -> dict[str, Any]:
    """One row of a rollout, as plain values."""
    drawn = rollout.response_mask[0]
    ids = rollout.responses[0][drawn].tolist()
    logprobs = rollout.logprobs[0][drawn].tolist()
    values = [None] * len(ids) if rollout.values is None else rollout.values[0][drawn].tolist()
    return {
        "prompt": prompt,
        "text": tokenizer.decode(ids),
        "truncated": bool(rollout.truncated[0]),
        "tokens": [
            {"id": id, "text": tokenizer.decode([id]), "logprob": logprob, "value": value}
            for id, logprob, value in zip(ids, logprobs, values, strict=True)
        ],
    }


def _write_page(file: Path, loaded: Loaded, rollout: Any, package: str, settings: dict[str, Any]) -> None:
    """Write the responses as one page of HTML, which needs no server and no network.

    Raises:
        SaveFailedError: the file cannot be written.
    """
    from ..app.page.document import document
    from ..app.page.records import records

    drawn_by = ", ".join(f"{name}={value}" for name, value in settings.items() if value is not None)
    found = records(loaded.model, loaded.tokenizer, rollout)
    page = document(found, title=f"Responses of {package}", facts=f"Drawn with {drawn_by}.", names=(package, None))
    try:
        file.write_text(page, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise SaveFailedError(
            f"{file} cannot be written: {error}",
            expected="a file in a folder that can be written",
            next_step="name another: --html FILE",
        ) from error
