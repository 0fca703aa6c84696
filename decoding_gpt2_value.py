"""Running a causal language model as it is scored: without dropout, and at positions that count its own tokens.

Remote code: this file is copied into every package, so it imports only torch and transformers.
"""

import contextlib
import inspect
from typing import NamedTuple, Optional

import torch
from torch import nn
from transformers import GPT2LMHeadModel


class States(NamedTuple):
    """What a model knows before each of T tokens: `head(inputs[:, t])` are the logits that token t is drawn from.

    `inputs [B, T, ...]` are hidden states and `head` the output layer, where the two can be told apart (a GPT-2);
    else the logits themselves and the identity. `values [B, T]` float32, or None without a value head.
    """

    inputs: torch.Tensor
    head: nn.Module
    values: Optional[torch.Tensor]


class Decoder:
    """Logits and values for one more column of a batch at a time, with a key-value cache.

    The columns are those of `tokens [B, P+T]` and `mask [B, P+T]`, which the caller fills as it goes.
    """

    def __init__(self, model, tokens, mask):
        self.model = model
        self.tokens = tokens
        self.mask = mask
        self.cache = None

    def logits_and_values(self, columns):
        """After so many columns: logits `[B, V]`, and values `[B]` float32 or None."""
        seen = 0 if self.cache is None else columns - 1
        output = _call(self.model, self.tokens, self.mask, slice(seen, columns), last=1, past_key_values=self.cache)
        self.cache = output.past_key_values
        values = _values(output)
        return output.logits[:, -1], None if values is None else values[:, -1]


def last_states(model, tokens, mask, T):
    """The `States` before the last T columns of `tokens [B, P+T]`, with gradients if they are enabled."""
    before = tokens.shape[1] - 1
    gpt2 = model
    if hasattr(model, "get_base_model") and not model.active_peft_config.is_prompt_learning:
        gpt2 = model.get_base_model()  # peft's adapters are modules inside it
    with as_scored(model):
        if not isinstance(gpt2, GPT2LMHeadModel):
            output = _call(model, tokens, mask, slice(0, before), last=T, use_cache=False)
            values = _values(output)
            return States(output.logits[:, -T:], nn.Identity(), None if values is None else values[:, -T:])
        body = gpt2.transformer(
            input_ids=tokens[:, :before],
            attention_mask=mask[:, :before],
            position_ids=_positions(mask)[:, :before],
            use_cache=False,
            return_dict=True,
        )
        inputs = body.last_hidden_state[:, -T:]
        values = _scalar(gpt2.v_head(inputs).squeeze(-1)) if hasattr(gpt2, "v_head") else None
        return States(inputs, gpt2.lm_head, values)


def _call(model, tokens, mask, columns, *, last, **kwargs):
    """The model's output for these columns of the batch, given all columns up to them."""
    forward = model.get_base_model().forward if hasattr(model, "get_base_model") else model.forward  # peft
    accepted = inspect.signature(forward).parameters
    if "position_ids" in accepted:
        kwargs["position_ids"] = _positions(mask)[:, columns]
    if "logits_to_keep" in accepted:
        kwargs["logits_to_keep"] = last
    kwargs.setdefault("use_cache", True)
    return model(input_ids=tokens[:, columns], attention_mask=mask[:, : columns.stop], return_dict=True, **kwargs)


def _positions(mask):
    return (mask.cumsum(-1) - 1).clamp(min=0)


def _values(output):
    values = getattr(output, "value", None)
    return None if values is None else _scalar(values)


def _scalar(values):
    if values.dim() != 2:
        raise ValueError(
            f"this model's value has the shape {list(values.shape)}; expected [batch, tokens], one scalar for each "
            "token: set summary_use_proj and summary_proj_to_labels in its config."
        )
    return values


@contextlib.contextmanager
def as_scored(model, *, caching=False):
    """Dropout off by p=0, restored as it was; `eval()` would switch gradient checkpointing off.

    With checkpointing, the backward pass runs the layers again, after this context: there too dropout must be off.
    With a cache, checkpointing itself is off: transformers' checkpointed layers silently ignore the cache.
    """
    changed = []
    for module in model.modules():
        changed += [(module, name, p, type(p)(0)) for name, p in _dropouts(module)]
        if caching and getattr(module, "gradient_checkpointing", False):
            changed.append((module, "gradient_checkpointing", True, False))
        elif function := vars(module).get("_gradient_checkpointing_func"):
            changed.append((module, "_gradient_checkpointing_func", function, without_dropout(module, function)))
    try:
        for module, name, _, scored in changed:
            setattr(module, name, scored)
        yield
    finally:
        for module, name, found, _ in changed:
            setattr(module, name, found)


def without_dropout(layer, checkpoint):
    """A checkpoint function that runs without the layer's dropout, now and when the backward pass runs it again."""

    def run(function, *args, **kwargs):
        def quietly(*args):
            with as_scored(layer, caching=True):
                return function(*args)

        return checkpoint(quietly, *args, **kwargs)

    return run


def _dropouts(module):
    """Names and values of a module's own dropout probabilities: `nn.Dropout.p`, and numbers kept for `F.dropout`."""
    is_dropout = isinstance(module, nn.modules.dropout._DropoutNd)
    for name, value in vars(module).items():
        if type(value) in (int, float) and value > 0 and ("drop" in name or (is_dropout and name == "p")):
            yield name, value
