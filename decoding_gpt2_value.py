"""Running a causal language model as it is scored: without dropout, and at positions that count its own tokens.

Remote code: this file is copied into every package, so it imports only torch and transformers.
"""

import contextlib
import inspect
from typing import Any, NamedTuple, Optional

import torch
from torch import nn
from torch.nn import functional as F
from transformers import GPT2LMHeadModel, GPT2Model
from transformers.activations import ACT2FN
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Attention, GPT2Block
from transformers.pytorch_utils import Conv1D

# The modules that `GPT2Decoder` computes itself, by their weights. A subclass (an adapter, a quantised or parametrised
# layer) computes something else.
PLAIN = {GPT2Model, GPT2Block, GPT2Attention, GPT2MLP, Conv1D, nn.Linear, nn.Embedding, nn.LayerNorm, nn.Dropout}


class States(NamedTuple):
    """What a model knows before each of T tokens: `head(inputs[:, t])` are the logits that token t is drawn from.

    `inputs [B, T, ...]` are hidden states and `head` the output layer, where the two can be told apart (a GPT-2);
    else the logits themselves and the identity. `values [B, T]` float32, or None without a value head.
    """

    inputs: torch.Tensor
    head: nn.Module
    values: Optional[torch.Tensor]


def decoder_for(model, tokens, mask):
    """What gives logits and values for one more column of a batch at a time, with keys and values cached.

    The columns are those of `tokens [B, P+T]` and `mask [B, P+T]`, which the caller fills as it goes.
    """
    return (GPT2Decoder if _is_plain_gpt2(model) else Decoder)(model, tokens, mask)


class Decoder:
    """For any causal language model: its own forward pass, and its own cache."""

    fixed_shapes = False

    def __init__(self, model, tokens, mask):
        self.model, self.tokens, self.mask = model, tokens, mask
        self.rows = slice(None)
        self.cache: Any = None

    def logits_and_values(self, columns):
        """After so many columns, of the current rows: logits `[b, V]`, and values `[b]` float32 or None."""
        at = slice(0 if self.cache is None else columns - 1, columns)
        tokens, mask = self.tokens[self.rows], self.mask[self.rows]
        output = _call(self.model, tokens, mask, at, last=1, past_key_values=self.cache)
        self.cache = output.past_key_values
        values = _values(output)
        return output.logits[:, -1], None if values is None else values[:, -1]

    def keep(self, rows):
        """Go on with these of the current rows only, a 1-D tensor of indices; False if the cache cannot do it."""
        if not hasattr(self.cache, "batch_select_indices"):
            return False
        self.cache.batch_select_indices(rows)
        self.rows = rows if isinstance(self.rows, slice) else self.rows[rows]
        return True


class GPT2Decoder(Decoder):
    """For a plain GPT-2: keys and values are written into storage of their final size.

    On a GPU a step has fixed shapes, so it is recorded once as a CUDA graph and replayed: the cost of a small step is
    its launches. On a CPU in float32 the products go through oneDNN, which takes about half the time of torch's default
    for so few rows; its copies of the weights are made anew at each rollout, and so are never older than the model's.
    """

    def __init__(self, model, tokens, mask):
        super().__init__(model, tokens, mask)
        config = model.config
        width = config.n_embd // config.n_head
        shape = (config.n_layer, 2, tokens.shape[0], config.n_head, tokens.shape[1], width)
        # Zeros and not empty: what is masked is still multiplied by 0, and must not be NaN.
        self.past = torch.zeros(shape, dtype=model.dtype, device=tokens.device)
        self.seen = 0
        self.onednn = tokens.device.type == "cpu" and model.dtype == torch.float32 and _has_onednn()
        self.weights = {}
        self.fixed_shapes = tokens.device.type == "cuda"
        self.column = torch.zeros(1, dtype=torch.long, device=tokens.device)
        self.graph: Any = None
        gelu = config.activation_function == "gelu_new"  # transformers computes it in eight steps
        self.activation = nn.GELU(approximate="tanh") if gelu else model.transformer.h[0].mlp.act

    def keep(self, rows):
        if self.fixed_shapes:
            return False
        self.past = self.past[:, :, rows]
        self.rows = rows if isinstance(self.rows, slice) else self.rows[rows]
        return True

    def logits_and_values(self, columns):
        prompt, at = self.seen == 0, slice(self.seen, columns)
        self.seen = columns
        if prompt or not self.fixed_shapes:
            return self._run(at, columns)
        self.column.fill_(columns - 1)
        if self.column.device.type != "cuda":
            return self._run(self.column, self.tokens.shape[1])
        if self.graph is None:
            self._record()
        self.graph.replay()
        return self.output

    def _record(self):
        """Record one step over all columns; those that are still empty are masked."""
        warm_up = torch.cuda.Stream()
        warm_up.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm_up):  # libraries allocate their workspaces at first use
            self._run(self.column, self.tokens.shape[1])
        torch.cuda.current_stream().wait_stream(warm_up)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.output = self._run(self.column, self.tokens.shape[1])

    def _run(self, at, end):
        """Logits and values after the columns `at` (a slice, or a tensor of one index), given those before `end`."""
        body = self.model.transformer
        mask = self.mask[self.rows, :end]
        x = body.wte(self.tokens[self.rows, at]) + body.wpe(_positions(mask)[:, at])  # [b, n, n_embd]
        b, n, _ = x.shape
        allowed = mask.bool()[:, None, None]  # [b, 1, 1, end]
        if n > 1:  # padding sees itself: a query without any key is NaN
            causal = torch.ones((n, end), dtype=torch.bool, device=x.device).tril()
            allowed = allowed & causal | torch.eye(n, end, dtype=torch.bool, device=x.device)
        for block, (keys, values) in zip(body.h, self.past, strict=True):
            qkv = self._linear(block.ln_1(x), block.attn.c_attn)
            query, key, value = qkv.view(b, n, 3, -1, keys.shape[-1]).permute(2, 0, 3, 1, 4)  # [b, n_head, n, width]
            keys[:, :, at], values[:, :, at] = key, value
            past = keys[:, :, :end], values[:, :, :end]
            heads = F.scaled_dot_product_attention(query, *past, allowed)
            x = x + self._linear(heads.transpose(1, 2).reshape(b, n, -1), block.attn.c_proj)
            x = x + self._linear(self.activation(self._linear(block.ln_2(x), block.mlp.c_fc)), block.mlp.c_proj)
        last = body.ln_f(x[:, -1])
        value = _scalar(self.model.v_head(last[:, None]).squeeze(-1))[:, 0] if hasattr(self.model, "v_head") else None
        return self._linear(last, self.model.lm_head), value

    def _linear(self, x, layer):
        if not self.onednn:
            return layer(x)
        if layer not in self.weights:  # Conv1D keeps its weight as [in, out], oneDNN wants [out, in]
            weight = layer.weight.t() if isinstance(layer, Conv1D) else layer.weight
            self.weights[layer] = weight.contiguous()
        return F.linear(x.to_mkldnn(), self.weights[layer], layer.bias).to_dense()


def _has_onednn():
    return torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled


def _is_plain_gpt2(model):
    """Whether `GPT2Decoder` computes what this model's own forward pass does."""
    if not isinstance(model, GPT2LMHeadModel) or torch.is_autocast_enabled(model.device.type):
        return False
    config = model.config
    unusual = config.scale_attn_by_inverse_layer_idx, config.reorder_and_upcast_attn, config.add_cross_attention
    if any(unusual) or not config.scale_attn_weights:
        return False
    known = PLAIN | {nn.ModuleList, type(ACT2FN[config.activation_function])}
    plain = [type(module) in known for module in (model.lm_head, *model.transformer.modules())]
    whole = [block.attn.c_attn.weight.shape == (config.n_embd, 3 * config.n_embd) for block in model.transformer.h]
    altered = [is_altered(module) for module in (model, model.lm_head, *model.transformer.modules())]
    return all(plain) and all(whole) and not any(altered)


def is_altered(module):
    """Whether calling the module does more than its class says: a hook, or a forward of its own (accelerate's)."""
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    # transformers 5 leaves hooks that record hidden states, and change nothing, behind a call that asked for them.
    foreign = [hook for hook in hooks if not getattr(hook, "__module__", "").startswith("transformers.")]
    return bool(foreign) or getattr(module.forward, "__func__", None) is not type(module).forward


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
