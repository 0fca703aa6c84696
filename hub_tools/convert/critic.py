"""The critic alone, as a classifier of transformers that other trainers load without remote code.

Imports torch, transformers, the model, and of hub_tools `errors`, `layout` and what writes a plain GPT-2. What the
other trainers read, from their sources: verl takes a `GPT2ForTokenClassification`, `logits.squeeze(-1)` and
`config.num_key_value_heads` (`verl/workers/critic/dp_critic.py`); TRL's PPOTrainer applies `model.score` to the hidden
states of the body (`trl/trainer/utils.py`, `get_reward`); OpenRLHF's critic has the same layout.
"""

from __future__ import annotations

import os
from typing import Literal

import torch
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    PreTrainedTokenizerBase,
)

from modeling_gpt2_value import GPT2ValueModel

from ..errors import ConversionError, OptionsError
from ..layout import HEAD_PREFIX
from .export import ExportedPolicy, gpt2_fields, write_plain

CriticHead = Literal["token-classification", "sequence-classification"]
LAST_BIAS = "transformer.ln_f.bias"


def export_critic(
    model: GPT2ValueModel | str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    head: CriticHead = "token-classification",
    tokenizer: PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
) -> ExportedPolicy:
    """Write the critic alone: the body with the value head as a classifier with one label, and no code.

    `"token-classification"` is a `GPT2ForTokenClassification`: its `logits [batch, tokens, 1]` are the values.
    `"sequence-classification"` is a `GPT2ForSequenceClassification`, whose `score` has no bias. The head's bias b is
    therefore moved into the bias of the last layer norm, to which b * w / (w . w) is added, for the head's weights w.
    This keeps the values. It would change the logits of a language-model head, but the critic has none.

    In float32, values equal the model's to 1e-6. In bfloat16 and float16, the classifier computes in that type, whereas
    the value head computes in float32.

    `convert_checkpoint` can make a package of such a critic again. Its logits are then those of the changed body.

    Args:
        model: a `GPT2ValueModel`, or the folder of a package (none of whose code is run).
        folder: where to: a new folder, or an empty one.
        head: which classifier.
        tokenizer: travels with the model; for a package, by default, its own.
        overwrite: also replace a folder that holds a plain GPT-2 and nothing else.

    Raises:
        OptionsError: `head` is neither of the two.
        ConversionError: the head is more than one linear layer to one value, or is a bias alone.
        MissingHeadError: the package has no value head.
        And what `export_policy` raises.
    """
    if head not in ("token-classification", "sequence-classification"):
        raise OptionsError(
            f"head={head!r}",
            expected="token-classification or sequence-classification",
            next_step="for verl the first, for TRL and OpenRLHF the second",
        )
    make = _token_classifier if head == "token-classification" else _sequence_classifier
    return write_plain(make, model, folder, tokenizer=tokenizer, overwrite=overwrite, needs_head=True)


def _token_classifier(model: GPT2ValueModel) -> GPT2ForTokenClassification:
    weight, bias = _linear_head(model)
    state = {**_body(model), "classifier.weight": weight, "classifier.bias": bias}
    with torch.device("meta"):
        plain = GPT2ForTokenClassification(_config(model))
    plain.load_state_dict(state, assign=True)
    return plain


def _sequence_classifier(model: GPT2ValueModel) -> GPT2ForSequenceClassification:
    weight, bias = _linear_head(model)
    state = {**_body(model), "score.weight": weight}
    if bias:
        direction, last_bias = weight[0].double(), state[LAST_BIAS]
        if not direction.any():
            raise ConversionError(
                f"a value head whose weights are all 0, with the bias {bias.item():.3g}",
                expected="weights, into whose direction the bias can go: score has no bias",
                next_step='export it with head="token-classification"',
            )
        shift = bias.double() * direction / direction.square().sum()
        state[LAST_BIAS] = (last_bias.double() + shift).to(last_bias.dtype)
    with torch.device("meta"):
        plain = GPT2ForSequenceClassification(_config(model))
    plain.load_state_dict(state, assign=True)
    return plain


def _linear_head(model: GPT2ValueModel) -> tuple[torch.Tensor, torch.Tensor]:
    """The head's weight `[1, n_embd]` and bias `[1]`, in the dtype of the body."""
    config = model.config
    if not (config.summary_use_proj and config.summary_proj_to_labels) or config.summary_activation is not None:
        raise ConversionError(
            f"a value head with summary_use_proj={config.summary_use_proj}, summary_proj_to_labels="
            f"{config.summary_proj_to_labels}, summary_activation={config.summary_activation!r}",
            expected="one linear layer to one value: that is all that a classifier's head can express",
            next_step="load the package itself, with trust_remote_code=True",
        )
    state = {name: model.state_dict()[f"{HEAD_PREFIX}summary.{name}"] for name in ("weight", "bias")}
    weight, bias = (tensor.detach().cpu().to(model.dtype) for tensor in state.values())
    return weight, bias


def _body(model: GPT2ValueModel) -> dict[str, torch.Tensor]:
    return {
        name: tensor.detach().cpu() for name, tensor in model.state_dict().items() if name.startswith("transformer.")
    }


def _config(model: GPT2ValueModel) -> GPT2Config:
    dropout = model.config.summary_first_dropout
    fields = {"num_labels": 1, "classifier_dropout": dropout, "num_key_value_heads": model.config.n_head}
    return GPT2Config.from_dict({**gpt2_fields(model), **fields})
