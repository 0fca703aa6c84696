"""Running a causal language model as it is scored: without dropout, at positions that count its own tokens, by step.

Remote code: this file is copied into every package, so it imports only torch and transformers. It never writes to a
module: other threads may train, sample or score the same model meanwhile.
"""

import functools
import inspect
from types import MethodType
from typing import Any

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
# Their wrappers and hooks hand arguments and outputs through.
LIBRARIES = ("torch.", "transformers.", "accelerate.", "peft.")


def unwrapped(model):
    """The model and what it wraps, outermost first: `torch.compile`, DistributedDataParallel, FSDP, DeepSpeed, peft.

    Raises:
        TypeError: there is no causal language model inside, or it cannot be sampled and scored through its wrapper.
    """
    models = [model]
    while True:
        children = getattr(models[-1], "_modules", {})
        if isinstance(models[-1], nn.DataParallel):
            raise TypeError(
                "DataParallel splits a batch, and not what rescore() asks about it. Wrap the model in "
                "DistributedDataParallel, or pass the model inside it: model.module"
            )
        if "_orig_mod" in children or "module" in children:
            models.append(children.get("_orig_mod", children.get("module")))
        elif hasattr(models[-1], "get_base_model"):
            adapter = models[-1].active_peft_config
            if adapter.is_prompt_learning:
                raise TypeError(
                    f"the virtual tokens of a {type(adapter).__name__} are not part of a rollout; pass a model whose "
                    "adapter changes weights, such as LoRA."
                )
            models.append(models[-1].get_base_model())
        elif hasattr(models[-1], "get_input_embeddings"):
            return models
        else:
            raise TypeError(
                f"got a {type(model).__name__}; expected a causal language model of transformers. If this is a "
                "wrapper, pass the model inside it."
            )


def innermost(model):
    """The model to run where no gradient is wanted: without the wrappers that then change nothing, unless hooked."""
    for wrapper in unwrapped(model):
        is_wrapper = isinstance(wrapper, nn.parallel.DistributedDataParallel) or hasattr(wrapper, "get_base_model")
        if not (is_wrapper or "_orig_mod" in wrapper._modules) or _is_hooked(wrapper, LIBRARIES):
            return wrapper


def check_tokens(model, tokens, mask, new_tokens=0):
    """Raise TypeError or ValueError where the model cannot run on `tokens [B, P]` under `mask [B, P]`.

    Returns:
        How many tokens its vocabulary has.
    """
    model = unwrapped(model)[-1]
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if not are_ids(tokens):
        raise TypeError(f"queries are {tokens.dtype}; expected token ids, an integer dtype: try queries.long().")
    lengths = mask.sum(1)
    if len(tokens) == 0 or (lengths == 0).any():
        row = int((lengths == 0).nonzero()[0]) if len(tokens) else 0
        raise ValueError(f"prompt {row} is empty; expected at least one token, such as the end-of-text token.")
    outside = ((tokens < 0) | (tokens >= vocabulary)) & mask.bool()
    if outside.any():
        row, column = outside.nonzero()[0].tolist()
        raise ValueError(
            f"prompt {row} holds the id {int(tokens[row, column])}, outside the vocabulary of {vocabulary} tokens; "
            "was it made by this model's tokenizer? Padding needs an attention_mask."
        )
    positions = getattr(model.config, "max_position_embeddings", None)
    longest = int(lengths.max()) + new_tokens
    if positions is not None and longest > positions:
        raise ValueError(
            f"the longest prompt with its new tokens has {longest} tokens, this model's positions end at {positions}; "
            "shorten the prompts, or lower max_new_tokens."
        )
    return vocabulary


def are_ids(tokens):
    """Whether a tensor's dtype is one of token ids."""
    return not (tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool)


def run(model, tokens, mask, columns, *, logits_to_keep=None, **kwargs):
    """Run the model on these columns (a slice) of `tokens [B, P+T]`, given all columns up to their end.

    Returns:
        its output, and the values in it `[B, columns]`, float32 at least, or None without a value head.
    """
    accepted = _forward_parameters(unwrapped(model)[-1])
    if "position_ids" in accepted:
        kwargs["position_ids"] = _positions(mask)[:, columns]
    if "logits_to_keep" in accepted and logits_to_keep is not None:
        kwargs["logits_to_keep"] = logits_to_keep
    output = model(input_ids=tokens[:, columns], attention_mask=mask[:, : columns.stop], return_dict=True, **kwargs)
    values = getattr(output, "value", None)
    return output, None if values is None else as_scalars(values)


def _forward_parameters(model):
    """Names that the forward of the model's class takes, those included that its `**kwargs` hand to a base class."""
    names = set()
    for kind in type(model).__mro__:
        if "forward" in vars(kind):
            parameters = inspect.signature(vars(kind)["forward"]).parameters.values()
            names |= {parameter.name for parameter in parameters}
            if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
                break
    return names


def _positions(mask):
    """Positions `[B, columns]` that count the tokens of `mask [B, columns]`, so that padding changes nothing."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def as_scalars(values):
    """`values [B, columns]` as float32 at least. Raises ValueError where there are several for each token."""
    if values.dim() != 2:
        raise ValueError(
            f"this model's value has the shape {list(values.shape)}; expected [batch, tokens], one scalar for each "
            "token: set summary_use_proj and summary_proj_to_labels in its config."
        )
    return values.to(torch.promote_types(values.dtype, torch.float32))


def takes_requests(model):
    """Whether a call of the model reaches `GPT2ValueModel.forward` with its `score`, and nobody changes its output."""
    models = unwrapped(model)
    known = hasattr(models[-1], "own_forward") and is_unaltered(models[-1], but_by=LIBRARIES)
    return known and not any(_is_hooked(wrapper, LIBRARIES) for wrapper in models)


def is_unaltered(model, *, but_by=("transformers.",)):
    """Whether calling the model runs the forward of GPT2LMHeadModel or GPT2ValueModel, and nothing else."""
    own = type(model).forward is getattr(type(model), "own_forward", GPT2LMHeadModel.forward)
    return own and not _is_altered(model, but_by)


def _is_altered(module, but_by):
    """Whether calling the module does more than its class says: a hook, or a forward that was put on the module."""
    found = [vars(module).get(name) for name in ("forward", "_original_forward")]  # Accelerate keeps what it wraps
    replaced = [f for f in found if f is not None and getattr(f, "__func__", None) is not type(module).forward]
    return _is_hooked(module, but_by) or not all(_is_written_in(f, but_by) for f in replaced)


def _is_hooked(module, but_by):
    """Whether a hook of others may change what the module takes or returns. (transformers 5 leaves recorders behind.)"""
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    return not all(_is_written_in(hook, but_by) for hook in hooks)


def _is_written_in(function, libraries):
    """Where the code of a function stands; its `__module__` may be that of a function which it wraps."""
    return getattr(getattr(function, "__func__", function), "__globals__", {}).get("__name__", "").startswith(libraries)


def without_dropout(model, *, checkpointing=False):
    """The model as `eval()` leaves it, without writing to it: its modules are copied, their weights and hooks shared.

    (`nn.Module._replicate_for_data_parallel` copies in this way.) A model that has nothing to switch off is returned as
    it is. With `checkpointing`, layers whose activations are checkpointed still are; without, they can use a cache.

    Raises:
        TypeError: there is dropout where the copy cannot reach it.
    """
    if not (_has_dropout(model) if checkpointing else any(module.training for module in model.modules())):
        return model
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise TypeError("the dropout inside DistributedDataParallel cannot be switched off: call model.eval() first.")
    copies = {module: object.__new__(type(module)) for module in model.modules()}
    for module, copied in copies.items():
        copied.__dict__ = fields = dict(vars(module))
        fields["_modules"] = {name: copies.get(child) for name, child in module._modules.items()}
        # transformers checkpoints a layer in training mode only, so there its own dropouts are set to 0 instead.
        fields["training"] = module.training and checkpointing and bool(fields.get("gradient_checkpointing"))
        fields.update(dict.fromkeys(_dropouts(module), 0.0))
        for name in {"forward", "_old_forward", "_original_forward"} & set(fields):  # Accelerate's
            fields[name] = _bound_to_copies(fields[name], copies, module)
    return copies[model]


def _bound_to_copies(function, copies, module):
    """A function that was put on a module, for the module's copy."""
    if isinstance(function, functools.partial):
        arguments = [copies.get(argument, argument) for argument in function.args]
        return functools.partial(function.func, *arguments, **function.keywords)
    if isinstance(function, MethodType) and function.__self__ in copies:
        return MethodType(function.__func__, copies[function.__self__])
    if _has_dropout(module):
        raise TypeError(
            f"the forward of a {type(module).__name__} was replaced by a function whose dropout cannot be switched off "
            "from outside: call model.eval() first."
        )
    return function


def _has_dropout(model):
    """Whether the model, in the mode that it is in, drops anything at random."""
    return any(module.training and any(_dropouts(module)) for module in model.modules())


def _dropouts(module):
    """Names of a module's own dropout probabilities above 0: `nn.Dropout.p`, and numbers kept for `F.dropout`."""
    is_dropout = isinstance(module, nn.modules.dropout._DropoutNd)
    for name, value in vars(module).items():
        if type(value) in (int, float) and value > 0 and ("drop" in name or (is_dropout and name == "p")):
            yield name


def decoder_for(model, tokens, mask):
    """A decoder of the columns of `tokens [B, P+T]` and `mask [B, P+T]`, which the caller fills as it goes.

    A `GPT2Decoder` where that is provably the same function as the model's forward, else a `Decoder`.
    """
    model = innermost(model)
    return (GPT2Decoder if _is_plain_gpt2(model) else Decoder)(model, tokens, mask)


class Decoder:
    """Logits and values for one more column at a time, by any causal language model's own forward pass and cache."""

    def __init__(self, model, tokens, mask):
        self.model, self.tokens, self.mask = without_dropout(model), tokens, mask
        self.rows = slice(None)
        self.cache: Any = None

    def logits_and_values(self, columns):
        """After so many columns, of the current rows: logits `[b, V]`, and values `[b]` or None."""
        new = slice(0 if self.cache is None else columns - 1, columns)
        settings = {"logits_to_keep": 1, "past_key_values": self.cache, "use_cache": True}
        output, values = run(self.model, self.tokens[self.rows], self.mask[self.rows], new, **settings)
        self.cache = output.past_key_values
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

    On a CPU the products go through oneDNN's packed weights, which takes about half the time of torch's default for so
    few rows. They are packed anew for each rollout, and so are never older than the model's.
    """

    def __init__(self, model, tokens, mask):
        self.model, self.tokens, self.mask = model, tokens, mask
        self.rows = slice(None)
        config = model.config
        shape = (config.n_layer, 2, len(tokens), config.n_head, tokens.shape[1], config.n_embd // config.n_head)
        # Zeros and not empty: what is masked is still multiplied by 0, and must not be NaN.
        # On a CPU attention is faster in float32, whatever the weights are.
        on_cpu = tokens.device.type == "cpu"
        dtype = torch.promote_types(model.dtype, torch.float32) if on_cpu else model.dtype
        self.past = torch.zeros(shape, dtype=dtype, device=tokens.device)
        self.seen = 0
        self.packs = on_cpu and torch.backends.mkldnn.enabled and _can_pack(model.dtype)
        self.packed: dict = {}
        gelu = config.activation_function == "gelu_new"  # transformers computes it in eight steps
        self.activation = nn.GELU(approximate="tanh") if gelu else model.transformer.h[0].mlp.act
        self.v_head = without_dropout(model.v_head) if hasattr(model, "v_head") else None

    def keep(self, rows):
        self.past = self.past[:, :, rows]
        self.rows = rows if isinstance(self.rows, slice) else self.rows[rows]
        return True

    def logits_and_values(self, columns):
        new, self.seen = slice(self.seen, columns), columns
        body, mask = self.model.transformer, self.mask[self.rows, :columns]
        x = body.wte(self.tokens[self.rows, new]) + body.wpe(_positions(mask)[:, new])  # [b, n, n_embd]
        b, n, _ = x.shape
        allowed = mask.bool()[:, None, None]  # [b, 1, 1, columns]
        if n > 1:  # padding sees itself: a query without any key is NaN
            causal = torch.ones((n, columns), dtype=torch.bool, device=x.device).tril()
            allowed = allowed & causal | torch.eye(n, columns, dtype=torch.bool, device=x.device)
        for block, (keys, values) in zip(body.h, self.past, strict=True):
            qkv = self._linear(block.ln_1(x), block.attn.c_attn)  # [b, n, 3 * n_embd]
            query, key, value = qkv.view(b, n, 3, -1, keys.shape[-1]).permute(2, 0, 3, 1, 4)  # [b, n_head, n, width]
            keys[:, :, new], values[:, :, new] = key, value
            past = keys[:, :, :columns], values[:, :, :columns]
            heads = F.scaled_dot_product_attention(query.to(keys.dtype), *past, allowed).to(x.dtype)
            x = x + self._linear(heads.transpose(1, 2).reshape(b, n, -1), block.attn.c_proj)
            x = x + self._linear(self._linear(block.ln_2(x), block.mlp.c_fc, self.activation), block.mlp.c_proj)
        last = body.ln_f(x[:, -1])  # [b, n_embd]
        value = None if self.v_head is None else as_scalars(self.v_head(last[:, None]).squeeze(-1))[:, 0]
        return self._linear(last, self.model.lm_head), value

    def _linear(self, x, layer, activation=None):
        if not self.packs:
            return layer(x) if activation is None else activation(layer(x))
        if layer not in self.packed:  # Conv1D keeps its weight as [in, out]; oneDNN wants [out, in]
            weight = layer.weight.t() if isinstance(layer, Conv1D) else layer.weight
            self.packed[layer] = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), len(x))
        fused = ("gelu", [], "tanh") if isinstance(activation, nn.GELU) else ("none", [], "")
        x = torch.ops.mkldnn._linear_pointwise(x, self.packed[layer], layer.bias, *fused)
        return x if activation is None or fused[0] == "gelu" else activation(x)


@functools.lru_cache
def _can_pack(dtype):
    """Whether this torch has oneDNN's packed linear layers, which its own inductor calls, and they compute the same."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    x, weight = (torch.arange(2048.0).view(32, 64).mul(scale).sin().to(dtype) for scale in (0.7, 1.3))
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, len(x))
        found = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    except RuntimeError:  # a dtype that this processor has no products for
        return False
    return torch.allclose(found, F.linear(x, weight), rtol=0, atol=64 * torch.finfo(dtype).eps)


def _is_plain_gpt2(model):
    """Whether `GPT2Decoder` computes what this model's own forward pass does."""
    if not is_unaltered(model) or torch.is_autocast_enabled(model.device.type):
        return False
    config = model.config
    unusual = config.scale_attn_by_inverse_layer_idx, config.reorder_and_upcast_attn, config.add_cross_attention
    if any(unusual) or not config.scale_attn_weights:
        return False
    known = PLAIN | {nn.ModuleList, type(ACT2FN[config.activation_function])}
    modules = [model.lm_head, *model.transformer.modules()]
    plain = [type(module) in known and not _is_altered(module, ("transformers.",)) for module in modules]
    plain += [type(weight) is nn.Parameter for module in modules for weight in module.parameters(recurse=False)]
    whole = [block.attn.c_attn.weight.shape == (config.n_embd, 3 * config.n_embd) for block in model.transformer.h]
    return all(plain) and all(whole)
