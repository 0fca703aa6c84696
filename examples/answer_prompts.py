"""Answer prompts with a value-head package, knowing nothing but its folder.

    python examples/answer_prompts.py demo/package "My most favourite movie is" --out answers.json

Imports only the standard library, torch and transformers: the demo runs this file in a fresh, isolated interpreter.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def answer(folder: str, prompts: list[str], *, max_new_tokens: int, seed: int) -> dict[str, Any]:
    """For each prompt its tokens, those of the response with log-probability and value.

    `value` is of the state after the token, `value_before` (of the rollout) of the state that it was drawn in.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    rollout = model.rollout(
        [torch.tensor(tokenizer(prompt)["input_ids"]) for prompt in prompts],
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        generator=torch.Generator().manual_seed(seed),
    )
    with torch.no_grad():
        values = model(rollout.sequences, attention_mask=rollout.attention_mask).value  # [B, P+T]
    P = rollout.sequences.shape[1] - rollout.responses.shape[1]
    answers = []
    for row, ids in enumerate(rollout.sequences):
        tokens = []
        for column in rollout.attention_mask[row].nonzero().squeeze(-1).tolist():
            token = {"text": tokenizer.decode([int(ids[column])]), "value": float(values[row, column])}
            if column >= P:
                token["logprob"] = float(rollout.logprobs[row, column - P])
                token["value_before"] = float(rollout.values[row, column - P])
            tokens.append(token)
        answers.append(tokens)
    return {"answers": answers, "class": f"{type(model).__module__}.{type(model).__qualname__}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("package", help="its folder")
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--out", type=Path, required=True, help="file for the answers, JSON")
    parser.add_argument("--max-new-tokens", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hide", nargs="*", default=[], help="modules that cannot be imported while this runs")
    given = parser.parse_args()
    for name in given.hide:  # an installed copy of the project must not stand in for the package's code
        sys.modules[name] = None  # type: ignore[assignment]
    answers = answer(given.package, given.prompts, max_new_tokens=given.max_new_tokens, seed=given.seed)
    given.out.write_text(json.dumps(answers), encoding="utf-8")


if __name__ == "__main__":
    main()
