"""`gpt2-value audit`: is a sampler honest? Draws from a package, and tests the draws with `sampler_audit`."""

from __future__ import annotations

import json as json_library
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from ..errors import OptionsError, as_ours
from . import console
from .options import Json, Package, Reviewed, Revision, Seed, encode, load, nothing_drawn

if TYPE_CHECKING:
    import torch

    from sampling_gpt2_value import Sampling

Draw = Callable[[Any], Any]  # one prompt, `[1, P]`, to `[rows, P+T]`

EXIT_DISHONEST = 1
NEW_TOKENS = 32  # of a response, where nothing else is said
ROWS = 64  # drawn at a time
# Numbers and switches of generate() that change what is drawn. Nothing here loads a file or runs code.
OPTIONS = (
    *("do_sample", "early_stopping", "encoder_no_repeat_ngram_size", "eos_token_id", "epsilon_cutoff", "eta_cutoff"),
    *("exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id", "length_penalty"),
    *("max_new_tokens", "min_length", "min_new_tokens", "min_p", "no_repeat_ngram_size", "num_beams"),
    *("num_return_sequences", "pad_token_id", "remove_invalid_values", "renormalize_logits", "repetition_penalty"),
    *("suppress_tokens", "temperature", "top_k", "top_p", "typical_p"),
)
# What a generation_config may ask for, and nobody sees here: it only costs memory.
NO_EXTRAS = dict.fromkeys(
    ("output_attentions", "output_hidden_states", "output_logits", "output_scores", "return_dict_in_generate"), False
)


def audit(
    package: Package,
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
    seed: Seed = None,
    revision: Revision = None,
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

    from sampler_audit import audit_sampler, rollout_from_tokens
    from sampling_gpt2_value import Sampling

    options = None if generate is None else _options_of(generate)
    if plot is not None and not plot.absolute().parent.is_dir():  # said now, and not after minutes of drawing
        raise typer.BadParameter(f"--plot {plot}: there is no folder {plot.absolute().parent}")
    console.working(f"loading {package}")
    loaded = load(package, revision=revision, reviewed=reviewed, plain=True)
    model = loaded.model
    if prompts:
        queries = encode(loaded, prompts, package, 1)
    else:
        start = model.config.bos_token_id if model.config.bos_token_id is not None else model.config.eos_token_id
        queries = [torch.tensor([0 if start is None else start])]
    with torch.no_grad():
        if not model(queries[0][None]).logits.isfinite().all():
            raise nothing_drawn(package, "its logits are not finite")
    end = (options or {}).get("eos_token_id", model.generation_config.eos_token_id)
    torch.manual_seed(torch.seed() if seed is None else seed)
    try:
        claim = Sampling(temperature, top_k, top_p, min_new_tokens, end)
        console.working("drawing")
        draw = _by_rollout(model, claim) if options is None else _by_generate(model, claim, options)
        ends = () if score_padding else claim.eos_token_id
        starts, responses = _drawn(draw, queries, ends, tokens)
        drawn = replace(rollout_from_tokens(starts, responses, sampling=Sampling(eos_token_id=ends)), sampling=claim)
        console.working("auditing")
        found = audit_sampler(model, drawn, alpha=alpha)
        if plot is not None:
            found.plot(plot)
    except OptionsError as error:
        raise typer.BadParameter(error.found) from error
    except (TypeError, ValueError, ImportError, OSError) as error:  # every argument above is the user's
        raise typer.BadParameter(console.visible(str(error))) from error
    facts = {
        "package": package,
        "sampler": "rollout" if options is None else f"generate({_shown(options)})",
        "claim": {**asdict(claim), "score_padding": score_padding},
    }
    console.show(json, {**facts, **found.to_json()}, f"{found}\n{console.facts(facts)}")
    if not found.honest:
        raise typer.Exit(EXIT_DISHONEST)


def _options_of(pairs: Sequence[str]) -> dict[str, Any]:
    """`["top_k=50"]` as `{"top_k": 50}`: values are read as JSON."""
    options: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or name not in OPTIONS:
            raise typer.BadParameter(f"--generate {pair}: expected KEY=VALUE, with one of {', '.join(OPTIONS)}")
        try:
            options[name] = json_library.loads(value)
        except (ValueError, RecursionError) as error:
            raise typer.BadParameter(
                f"--generate {pair}: write it as JSON does: a number, a list, true, false, null"
            ) from error
    return options


def _by_rollout(model: Any, claim: Sampling) -> Draw:
    from generation_gpt2_value import rollout

    settings = {**asdict(claim), "max_new_tokens": NEW_TOKENS, "num_return_sequences": ROWS}
    return lambda prompt: rollout(model, prompt, **settings).sequences


def _by_generate(model: Any, claim: Sampling, options: dict[str, Any]) -> Draw:
    """Sample with transformers' `generate()`, no more than `ROWS` at a time.

    Raises:
        OptionsError: it computes more rows for one prompt, or says so of one of its arguments when it draws.
    """
    copies = 1
    for name in ("num_beams", "num_return_sequences"):
        number = options.get(name, getattr(model.generation_config, name, None)) or 1
        if not isinstance(number, int) or not 1 <= number <= ROWS:
            raise OptionsError(f"{name}={number}; expected 1 to {ROWS}", next_step=f"--generate {name}=1")
        copies = max(copies, number)
    settings = {"do_sample": True, "max_new_tokens": NEW_TOKENS, "pad_token_id": (*claim.eos_token_id, 0)[0]}
    settings |= {**options, **NO_EXTRAS, "trust_remote_code": False}

    def fails(gist: str) -> OptionsError:
        return OptionsError(f"generate({_shown(options)}) fails: {gist}", next_step="correct --generate KEY=VALUE")

    def draw(prompt: torch.Tensor) -> torch.Tensor:
        prompts = prompt.repeat(ROWS // copies, 1)
        with as_ours(fails):
            drawn: torch.Tensor = model.generate(prompts, attention_mask=prompts.new_ones(prompts.shape), **settings)
        return drawn

    return draw


def _drawn(
    draw: Draw, queries: Sequence[torch.Tensor], ends: Sequence[int], tokens: int
) -> tuple[list[torch.Tensor], list[list[int]]]:
    """Draw until there are so many tokens, from one prompt after the other: prompts, and responses up to their ends."""
    starts: list[torch.Tensor] = []
    responses: list[list[int]] = []
    count = turn = 0
    while count < tokens or turn < len(queries):
        query = queries[turn % len(queries)]
        turn += 1
        for sequence in draw(query[None]).tolist():
            ids = sequence[len(query) :]
            end = next((place + 1 for place, token in enumerate(ids) if token in ends), len(ids))
            starts.append(query)
            responses.append(ids[:end])
            count += end
    return starts, responses


def _shown(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in settings.items())
