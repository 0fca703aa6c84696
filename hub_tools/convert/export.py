"""The policy alone, or the critic alone, as a plain GPT-2 or a classifier of transformers, without any code of ours.

What other trainers read of a critic, from their sources: verl takes a `GPT2ForTokenClassification`,
`logits.squeeze(-1)` and `config.num_key_value_heads` (`verl/workers/critic/dp_critic.py`); TRL's PPOTrainer applies
`model.score` to the hidden states of the body (`trl/trainer/utils.py`, `get_reward`); OpenRLHF's critic has the same
layout.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2PreTrainedModel,
    PreTrainedTokenizerBase,
)

from modeling_gpt2_value import GPT2ValueModel

from ..errors import ConversionError, OptionsError, UnsavableModelError, as_ours
from ..layout import HEAD_PREFIX, kind_of
from ..package.replace import check_target, replacing
from .convert import load_checkpoint

CriticHead = Literal["token-classification", "sequence-classification"]
LAST_BIAS = "transformer.ln_f.bias"
CLASSES: dict[CriticHead | None, type[GPT2PreTrainedModel]] = {
    None: GPT2LMHeadModel,
    "token-classification": GPT2ForTokenClassification,
    "sequence-classification": GPT2ForSequenceClassification,
}
# Fields of a package's config.json that GPT-2's own does not have, or that say which class it is for.
NOT_GPT2 = {
    "_name_or_path", "architectures", "auto_map", "detach_value_head", "id2label", "label2id", "model_type",
    "num_labels", "summary_last_dropout", "transformers_version", "value_head_initializer_range",
}  # fmt: skip


@dataclass(frozen=True)
class ExportedPolicy:
    """A plain GPT-2 that was written to the disk."""

    architecture: str  # its class
    folder: Path
    files: dict[str, int]  # name -> bytes
    dtype: torch.dtype


def export_policy(
    model: GPT2ValueModel | str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    revision: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
) -> ExportedPolicy:
    """Write the policy alone, as a `GPT2LMHeadModel` that any GPT-2 runtime loads: no head, and no code.

    The weights are unchanged, so the logits are equal bit for bit. As with `save_package`, a process that is killed
    leaves the old folder or the complete new one. The model is not changed.

    Args:
        model: a `GPT2ValueModel`, or a package: its folder or its repository on the Hub. None of its code is run.
        revision: branch, tag or commit of the repository.
        folder: where to: a new folder, or an empty one.
        tokenizer: travels with the model; for a package, by default, its own.
        overwrite: also replace a folder that holds a plain GPT-2 and nothing else.

    Raises:
        UnsavableModelError: `model` is not a value-head model, or its config or generation_config is not valid.
        FolderRefusedError: `folder` holds something that must not be lost.
        SaveFailedError: the system refused a write. What was in `folder` is untouched.
        And what `convert_checkpoint` raises for a package that is not whole.
    """
    return _write(model, folder, revision, tokenizer, overwrite, None)


def export_critic(
    model: GPT2ValueModel | str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    head: CriticHead = "token-classification",
    revision: str | None = None,
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
        head: which classifier.
        model, folder, revision, tokenizer, overwrite: as for `export_policy`.

    Raises:
        OptionsError: `head` is neither of the two.
        ConversionError: the head is more than one linear layer to one value, or is a bias alone.
        MissingHeadError: the package has no value head.
        And what `export_policy` raises.
    """
    if head is None or head not in CLASSES:
        raise OptionsError(
            f"head={head!r}",
            expected="token-classification or sequence-classification",
            next_step="for verl the first, for TRL and OpenRLHF the second",
        )
    return _write(model, folder, revision, tokenizer, overwrite, head)


def _write(
    model: GPT2ValueModel | str | os.PathLike[str],
    folder: str | os.PathLike[str],
    revision: str | None,
    tokenizer: PreTrainedTokenizerBase | None,
    overwrite: bool,
    head: CriticHead | None,
) -> ExportedPolicy:
    """Write the policy, or the critic with that head, and the tokenizer."""
    target = check_target(
        folder,
        overwrite=overwrite,
        model_type=GPT2Config.model_type,
        may_replace=lambda name: kind_of(name) in ("config", "weights", "tokenizer"),
    )
    if isinstance(model, (str, os.PathLike)):
        # a package without its head still has its policy
        new = False if head else None
        loaded = load_checkpoint(model, revision=revision, tokenizer=tokenizer, init_value_head=new)
        model, tokenizer = loaded.model, loaded.tokenizer
    elif revision is not None:
        raise OptionsError(f"revision={revision!r} for a model in memory", next_step="leave revision out")
    if not isinstance(model, GPT2ValueModel):
        raise UnsavableModelError(
            f"a {type(model).__name__}",
            expected="a GPT2ValueModel, unwrapped, or a package",
            next_step="save it with save_package, and export that folder",
        )

    def invalid(gist: str) -> UnsavableModelError:
        return UnsavableModelError(
            f"the model's config or generation_config is not valid: {gist}",
            next_step="correct the field in model.config or model.generation_config, and export again",
        )

    with as_ours(invalid), replacing(target) as staging:
        plain = _as_plain(model, head)
        plain.save_pretrained(staging)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        files = {path.name: path.stat().st_size for path in sorted(staging.iterdir())}
    return ExportedPolicy(
        architecture=type(plain).__name__,
        folder=target,
        files=files,
        dtype=plain.dtype,
    )


def _as_plain(model: GPT2ValueModel, head: CriticHead | None) -> GPT2PreTrainedModel:
    """A model of transformers' own that shares the model's weights if they are on the CPU, or else has copies.

    It can only be saved, not run: buffers that are not in the state dict stay on the meta device.
    """
    config = model.config
    fields = {name: value for name, value in config.to_dict().items() if name not in NOT_GPT2}
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    weight, bias = (state.pop(f"{HEAD_PREFIX}summary.{part}", None) for part in ("weight", "bias"))
    if head is not None:
        if weight is None or not config.summary_proj_to_labels or config.summary_activation is not None:
            raise ConversionError(
                f"a value head with summary_use_proj={config.summary_use_proj}, summary_proj_to_labels="
                f"{config.summary_proj_to_labels}, summary_activation={config.summary_activation!r}",
                expected="one linear layer to one value: that is all that a classifier's head can express",
                next_step="load the package itself, with trust_remote_code=True",
            )
        del state["lm_head.weight"]
        dropout = config.summary_first_dropout
        fields |= {"num_labels": 1, "classifier_dropout": dropout, "num_key_value_heads": config.n_head}
        weight, bias = weight.to(model.dtype), bias.to(model.dtype)
        if head == "token-classification":
            state |= {"classifier.weight": weight, "classifier.bias": bias}
        else:
            state |= {"score.weight": weight, LAST_BIAS: _shifted(state[LAST_BIAS], weight[0].double(), bias.double())}
    with torch.device("meta"):
        plain = CLASSES[head](GPT2Config.from_dict(fields))
    plain.load_state_dict(state, assign=True)
    plain.tie_weights()
    if head is None and model.generation_config is not None:
        plain.generation_config = model.generation_config
    return plain


def _shifted(last: torch.Tensor, direction: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The last layer norm's bias `[n_embd]`, by which the head's weights `[n_embd]` alone add the head's `bias [1]`."""
    if not bias:
        return last
    if not direction.any():
        raise ConversionError(
            f"a value head whose weights are all 0, with the bias {bias.item():.3g}",
            expected="weights, into whose direction the bias can go: score has no bias",
            next_step='export it with head="token-classification"',
        )
    return (last.double() + bias * direction / direction.square().sum()).to(last.dtype)
