"""Answer requests of an Inference Endpoint by the package's own sampler.

Text comes in; text with log-probabilities and values goes out. To use it, upload it to the package's repository:

    hf upload OWNER/NAME examples/handler.py handler.py

The endpoint imports it from there, and so runs the model's code that lies beside it. It imports only torch and
transformers. Background: https://huggingface.co/docs/inference-endpoints/engines/toolkit
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

SETTINGS = ("max_new_tokens", "min_new_tokens", "temperature", "top_k", "top_p", "num_return_sequences", "seed")
ROWS = 64  # responses to one request


class EndpointHandler:
    """What the endpoint builds once, with the folder of the package, and then calls for each request."""

    def __init__(self, path: str = "") -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
        self.model: Any = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
        self.model.eval().to("cuda" if torch.cuda.is_available() else "cpu")

    def __call__(self, data: dict[str, Any]) -> list[dict[str, Any]]:
        """Draw responses.

        Args:
            data: `inputs`, a text or a list of texts; and perhaps `parameters`, some of `SETTINGS`, which are those of
                `rollout`. A `seed` repeats the answer.

        Returns one record for each response, those to one text together: `generated_text`; of its T drawn tokens
        `token_ids`, natural `logprobs` and `values` of the state before each; and `truncated`, it ran out of tokens
        before an end-of-text token was drawn. Raises ValueError for what `rollout` refuses, other parameters, or
        more than 64 responses.
        """
        texts, settings = _read(data)
        generator = None
        if "seed" in settings:
            generator = torch.Generator().manual_seed(settings.pop("seed"))
        prompts = [self.tokenizer(text, return_tensors="pt").input_ids[0] for text in texts]
        end = self.tokenizer.eos_token_id
        rollout = self.model.rollout(prompts, eos_token_id=end, generator=generator, **settings)
        return [self._record(rollout, row) for row in range(len(rollout))]

    def _record(self, rollout: Any, row: int) -> dict[str, Any]:
        drawn = rollout.response_mask[row]
        tokens = rollout.responses[row][drawn].tolist()
        return {
            "generated_text": self.tokenizer.decode(tokens, skip_special_tokens=True),
            "token_ids": tokens,
            "logprobs": rollout.logprobs[row][drawn].tolist(),
            "values": rollout.values[row][drawn].tolist(),
            "truncated": bool(rollout.truncated[row]),
        }


def _read(data: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """The texts and the settings of a request, of the right types; how large the numbers may be, `rollout` knows."""
    texts, settings = data.get("inputs"), dict(data.get("parameters") or {})
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
        raise ValueError('inputs is not what can be answered; expected {"inputs": "a text"}, or a list of texts.')
    unknown = sorted(set(settings) - set(SETTINGS))
    if unknown:
        raise ValueError(f"parameters has {unknown[0]!r}; expected some of {', '.join(SETTINGS)}.")
    copies, seed = settings.get("num_return_sequences", 1), settings.get("seed", 0)
    if type(copies) is not int or not 1 <= copies * len(texts) <= ROWS:
        raise ValueError(f"{len(texts)} texts and num_return_sequences={copies!r}; expected at most {ROWS} responses.")
    if type(seed) is not int or not 0 <= seed < 1 << 63:
        raise ValueError(f"seed={seed!r}; expected an int >= 0.")
    return texts, settings
