"""`gpt2-value audit`: is a sampler honest? Draws from a package, and tests the draws with `sampler_audit`."""

from __future__ import annotations

import itertools
import json as json_library
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..errors import as_ours
from ..package.config import GENERATION, fits
from . import console
from .options import command, encode, load, option, wrong

EXIT_DISHONEST = 1
NEW_TOKENS = 32  # of a response, where nothing else is said
ROWS = 64  # drawn at a time


@command(
    "package",
    option("prompts", nargs="*", metavar="PROMPT", help="texts to go on from; default: end-of-text"),
    option(
        "--generate",
        action="append",
        metavar="KEY=VALUE",
        help="draw with generate(KEY=VALUE) instead of with rollout; repeat it for more keys. do_sample is true, "
        f"max_new_tokens {NEW_TOKENS}, all else as generate() and the package's generation_config have it",
    ),
    "temperature",
    "top_k",
    "top_p",
    option("--min-new-tokens", type=int, default=0, help="no end-of-text before so many tokens"),
    option("--tokens", type=int, default=4000, help="how many to draw, at least"),
    "seed",
    "revision",
    option("--plot", type=Path, help="write the histogram to this file, a PNG, SVG or PDF"),
    "reviewed",
    "json",
)
def audit(
    package: str,
    prompts: list[str],
    generate: list[str] | None,
    tokens: int,
    seed: int | None,
    revision: str | None,
    plot: Path | None,
    reviewed: list[str],
    json: bool,
    **claimed: Any,
) -> int:
    """Test whether tokens are draws from the distribution that they would be scored by.

    The claim is the model's own distribution, or what --temperature, --top-k, --top-p and --min-new-tokens make of
    it. Without --generate the tokens are this project's own rollout, by the claim. Exits with 1 if the sampler is
    dishonest, and with 0 if it passes.

      gpt2-value audit my-model --generate max_new_tokens=32

      gpt2-value audit my-model --generate top_k=0 --generate temperature=0.7 --temperature 0.7
    """
    import torch

    from generation_gpt2_value import rollout
    from sampler_audit import audit_sampler, rollout_from_tokens
    from sampling_gpt2_value import Sampling

    options = dict(map(_setting, generate or []))
    loaded = load(package, revision, reviewed, seed=seed, plain=True)
    model = loaded.model
    queries = encode(loaded, prompts, package, 1) if prompts else [torch.tensor([model.config.bos_token_id or 0])]
    rows = ROWS
    starts: list[torch.Tensor] = []
    responses: list[list[int]] = []
    with as_ours(wrong):  # every argument is the user's
        claim = Sampling(**claimed, eos_token_id=options.get("eos_token_id", model.generation_config.eos_token_id))
        if generate is not None:  # which computes so many rows for each prompt
            names = ("num_beams", "num_return_sequences")
            rows //= max(options.get(name, getattr(model.generation_config, name, None)) or 1 for name in names)
            options = {"do_sample": True, "max_new_tokens": NEW_TOKENS, "return_dict_in_generate": False, **options}
            options.setdefault("pad_token_id", (*claim.eos_token_id, 0)[0])
        for turn, query in enumerate(itertools.cycle(queries)):
            if turn >= len(queries) and sum(map(len, responses)) >= tokens:
                break
            batch = query.repeat(rows, 1)
            if generate is None:
                drawn = rollout(model, batch, max_new_tokens=NEW_TOKENS, **asdict(claim)).sequences
            else:
                drawn = model.generate(batch, attention_mask=torch.ones_like(batch), **options)
            for ids in drawn[:, len(query) :].tolist():
                end = next((place + 1 for place, token in enumerate(ids) if token in claim.eos_token_id), len(ids))
                starts.append(query)
                responses.append(ids[:end])
        ends = Sampling(eos_token_id=claim.eos_token_id)
        given = replace(rollout_from_tokens(starts, responses, sampling=ends), sampling=claim)
        found = audit_sampler(model, given)
        if plot is not None:
            found.plot(plot)
    sampler = "rollout" if generate is None else f"generate({', '.join(generate)})"
    facts = {"package": package, "sampler": sampler, "claim": asdict(claim)}
    console.show(json, {**facts, **found.to_json()}, f"{found}\n{console.facts(facts)}")
    return 0 if found.honest else EXIT_DISHONEST


def _setting(pair: str) -> tuple[str, Any]:
    """`top_k=50` as a name and a value, which is read as JSON, and is one that a generation config may hold."""
    name, _, value = pair.partition("=")
    expected = "KEY=VALUE, a setting of generate() and a value of its type, as JSON writes it: 0.7, false, null, [1, 2]"
    with as_ours(lambda _: wrong(f"--generate {pair}; expected {expected}")):
        allowed, found = GENERATION[name], json_library.loads(value)
        if found is not None and not fits(found, allowed):
            raise ValueError(name)
    return name, found
