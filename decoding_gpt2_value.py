"""Running a causal language model as it is scored: without dropout, at positions that count its own tokens, by step.

Remote code, which imports only torch and transformers. It never writes to a module: other threads may train, sample or
score the same model meanwhile.
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

# What `GPT2Decoder` computes itself. A subclass (an adapter, a quantised or parametrised layer) does something else.
PLAIN = {GPT2Model, GPT2Block, GPT2Attention, GPT2MLP, Conv1D, nn.Linear, nn.Embedding, nn.LayerNorm, nn.Dropout}
# Their wrappers and hooks hand arguments and outputs through; transformers 5 leaves hooks on every model.
LIBRARIES = ("torch.", "transformers.", "accelerate.", "peft.")


def unwrapped(model):
    """The model and what it wraps, outermost first; TypeError where there is nothing that can be sampled and scored."""
    models = [model]
    while True:
        children = getattr(models[-1], "_modules", {})
        if (name := type(models[-1]).__name__) in ("DataParallel", "FullyShardedDataParallel"):
            raise TypeError(f"got a {name}: use DistributedDataParallel or FSDP2; of DataParallel, pass model.module.")
        if "_orig_mod" in children or "module" in children:
            models.append(children.get("_orig_mod", children.get("module")))
        elif hasattr(models[-1], "get_base_model"):
            adapter = models[-1].active_peft_config
            if adapter.is_prompt_learning:
                what = f"the virtual tokens of a {type(adapter).__name__} are not part of a rollout"
                raise TypeError(f"{what}; pass a model whose adapter changes weights, such as LoRA.")
            models.append(models[-1].get_base_model())
        elif hasattr(models[-1], "get_input_embeddings"):
            return models
        else:
            raise TypeError(f"got a {type(model).__name__}; expected a causal language model, or a wrapper of one.")


def innermost(model):
    """The model to run where no gradient is wanted: without wrappers that then change nothing (no hook, no FSDP2)."""
    for outer in unwrapped(model):
        thin = isinstance(outer, nn.parallel.DistributedDataParallel) or hasattr(outer, "get_base_model")
        if hasattr(outer, "unshard") or not (thin or "_orig_mod" in outer._modules) or _is_altered(outer, LIBRARIES):
            return outer


def check_tokens(model, tokens, mask, new_tokens=0):
    """The size of the model's vocabulary. TypeError or ValueError where it cannot run on `tokens`, `mask [B, P]`."""
    model = unwrapped(model)[-1]
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if not are_ids(tokens):
        raise TypeError(f"tokens are {tokens.dtype}; expected token ids, an integer dtype: try .long().")
    lengths = mask.sum(1)
    if len(tokens) == 0 or not lengths.all():
        which = f"row {int(lengths.argmin())} has no tokens" if len(tokens) else "there are no rows"
        raise ValueError(f"{which}; expected at least one token in each, such as the end-of-text token.")
    for row, column in (((tokens < 0) | (tokens >= vocabulary)) & mask.bool()).nonzero().tolist():
        what = f"row {row} holds the id {int(tokens[row, column])}, outside the vocabulary of {vocabulary} tokens"
        raise ValueError(f"{what}; was it made by this model's tokenizer? Padding needs an attention_mask.")
    positions = getattr(model.config, "max_position_embeddings", None)
    longest = int(lengths.max()) + new_tokens
    if positions is not None and longest > positions:
        what = f"the longest row, new tokens included, has {longest} tokens, this model's positions end at {positions}"
        raise ValueError(f"{what}; shorten the prompts, or draw fewer tokens (max_new_tokens).")
    return vocabulary


def are_ids(tokens):
    """Whether a tensor's dtype is one of token ids."""
    return not (tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool)


def run(model, tokens, mask, columns, *, logits_to_keep=None, **kwargs):
    """Run the model on a slice of the columns of `tokens [B, P+T]`: its output, and `[B, columns]` values or None."""
    inner = unwrapped(model)[-1]
    accepted, vocabulary = _forward_parameters(inner), inner.get_input_embeddings().weight.shape[0]
    if "position_ids" in accepted:
        kwargs["position_ids"] = positions(mask)[:, columns]
    if "logits_to_keep" in accepted and logits_to_keep is not None:
        kwargs["logits_to_keep"] = logits_to_keep
    output = model(input_ids=tokens[:, columns], attention_mask=mask[:, : columns.stop], return_dict=True, **kwargs)
    if logits_to_keep is not None and getattr(output, "logits", tokens[..., :0]).shape[-1] != vocabulary:
        raise TypeError(f"a {type(model).__name__} gives no logits over its vocabulary; expected a causal LM.")
    values = getattr(output, "value", None)
    return output, None if values is None else as_scalars(values)


def inputs_and_head(model, tokens, mask, columns, T):
    """Inputs `[B, T, ...]` of an output layer for the last T columns of `run`, that layer, and values or None.

    A plain GPT-2's inputs are its hidden states, so that nobody has to hold all logits; any other's are the logits.
    """
    quiet = without_dropout(model, checkpointing=True)
    if is_unaltered(model) and type(model.lm_head) is nn.Linear:
        body, _ = run(quiet.transformer, tokens, mask, columns, use_cache=False)
        return body.last_hidden_state[:, -T:], quiet.lm_head, None
    output, values = run(quiet, tokens, mask, columns, logits_to_keep=T, use_cache=False)
    return output.logits[:, -T:], nn.Identity(), None if values is None else values[:, -T:]


def _forward_parameters(model):
    """Names that the forward of the model's class takes, those included that its `**kwargs` hand to a base class."""
    names: set = set()
    for kind in type(model).__mro__:
        if "forward" in vars(kind):
            parameters = inspect.signature(vars(kind)["forward"]).parameters
            names |= {"position_ids"} if kind is nn.Module else parameters.keys()  # all classes handed **kwargs on
            if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
                break
    return names


def positions(mask):
    """Positions `[B, columns]` that count the tokens of `mask [B, columns]`, so that padding changes nothing."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def as_scalars(values):
    """`values [B, columns]` as float32 at least. Raises ValueError where there are several for each token."""
    if values.dim() != 2:
        what = f"this model's value has the shape {list(values.shape)}; expected one scalar for each token"
        raise ValueError(f"{what}, [batch, tokens]: set summary_use_proj and summary_proj_to_labels in its config.")
    return values.to(torch.promote_types(values.dtype, torch.float32))


def takes_requests(model):
    """Whether a call of the model reaches `GPT2ValueModel.forward` with its `score`, and nobody changes its output."""
    *wrappers, inner = unwrapped(model)
    known = hasattr(inner, "own_forward") and is_unaltered(inner, but_by=LIBRARIES)
    return known and not any(_is_altered(wrapper, LIBRARIES) for wrapper in wrappers)


def is_unaltered(model, *, but_by=("transformers.",)):
    """Whether calling the model runs the forward of GPT2LMHeadModel or GPT2ValueModel, and nothing else."""
    own = type(model).forward is getattr(type(model), "own_forward", GPT2LMHeadModel.forward)
    return own and not _is_altered(model, but_by)


def _is_altered(module, but_by=("transformers.",)):
    """Whether a hook, or a function put on the module or its class, changes what a call does; but these libraries'."""
    own = getattr(type(module), "own_forward", None)
    found = [vars(module).get(name) for name in ("forward", "_original_forward")]  # Accelerate keeps what it wraps
    found = [f for f in found if f is not None and getattr(f, "__func__", None) is not type(module).forward]
    hooks = [module._forward_pre_hooks, module._forward_hooks]  # and those of all modules
    hooks += [nn.modules.module._global_forward_pre_hooks, nn.modules.module._global_forward_hooks]
    functions = [(function, but_by) for function in (*found, *(hook for group in hooks for hook in group.values()))]
    for function, libraries in (*functions, (type(module).__call__, LIBRARIES), (type(module).forward, LIBRARIES)):
        # The module in which its code stands tells; where a library's decorator wraps a function, both must pass.
        for f in (getattr(function, "__func__", function), inspect.unwrap(function)):
            if f is not own and not getattr(f, "__globals__", {}).get("__name__", "").startswith(libraries):
                return True
    return False


def without_dropout(model, *, checkpointing=False):
    """The model as `eval()` leaves it, without writing to it: copies of its modules, which share weights and hooks.

    With `checkpointing`, layers whose activations are checkpointed still are; without, they can use a cache. Raises
    TypeError where there is dropout that the copy cannot reach.
    """
    if not any(module.training for module in model.modules()):
        return model
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise TypeError("the dropout inside DistributedDataParallel cannot be switched off: call model.eval() first.")
    copies = {module: object.__new__(type(module)) for module in model.modules()}
    for module, copied in copies.items():
        copied.__dict__ = fields = dict(vars(module))
        fields["_modules"] = {name: copies.get(child) for name, child in module._modules.items()}
        # transformers checkpoints a layer in training mode only, so there its own dropouts are set to 0 instead.
        fields["training"] = module.training and checkpointing and bool(fields.get("gradient_checkpointing"))
        fields |= {**dict.fromkeys(_dropouts(module), 0.0), "_compiled_call_impl": None}  # that is bound to the module
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
    if any(child.training and any(_dropouts(child)) for child in module.modules()):
        what = f"the forward of a {type(module).__name__} was replaced by a function whose dropout"
        raise TypeError(f"{what} cannot be switched off from outside: call model.eval() first.")
    return function


def _dropouts(module):
    """Names of a module's own dropout probabilities above 0: `nn.Dropout.p`, and numbers kept for `F.dropout`."""
    is_dropout = isinstance(module, nn.modules.dropout._DropoutNd)
    for name, value in vars(module).items():
        if type(value) in (int, float) and value > 0 and ("drop" in name or (is_dropout and name == "p")):
            yield name


class Decoder:
    """Logits and values for one more column at a time, by any causal language model's own forward pass and cache."""

    def __init__(self, model, tokens, mask):
        self.model, self.tokens, self.mask = without_dropout(model), tokens, mask  # the caller fills both [B, P+T]
        self.rows = torch.arange(len(tokens), device=tokens.device)  # those that are still computed, b of B
        self.cache: Any = None

    def logits_and_values(self, columns):
        """Logits `[b, V]` and values `[b]` or None after so many columns, of the current rows."""
        self.keep_pace(ended=False)
        new = slice(0 if self.cache is None else columns - 1, columns)
        settings = {"logits_to_keep": 1, "past_key_values": self.cache, "use_cache": True}
        output, values = run(self.model, self.tokens[self.rows], self.mask[self.rows], new, **settings)
        self.cache = getattr(output, "past_key_values", None)  # without one, all columns are run again
        return output.logits[:, -1], None if values is None else values[:, -1]

    def keep_pace(self, *, ended):
        """Run a sharded model whenever the processes that hold its other parts do: on one token once it has `ended`."""
        for part in [weight for weight in self.model.parameters() if hasattr(weight, "device_mesh")][:1]:
            runs = torch.full([1] * part.dim(), not ended, device=part.device)
            while part.from_local(runs, part.device_mesh, part.placements).full_tensor().any() and ended:
                self.model(self.tokens[:1, :1])

    def keep(self, rows):
        """Go on with these of the current rows only, a 1-D tensor of indices, where the cache can do so."""
        if hasattr(self.cache, "batch_select_indices"):
            self.cache.batch_select_indices(rows)
            self.rows = self.rows[rows]


class GPT2Decoder(Decoder):
    """For a plain GPT-2: keys and values are written into storage of their final size.

    On a CPU the products are oneDNN's, in about half the time of torch's default. Where a rollout begins with several
    rows, weights are packed for it, and so are never older than the model's.
    """

    def __init__(self, model, tokens, mask):
        super().__init__(model, tokens, mask)
        config, on_cpu = model.config, tokens.device.type == "cpu"
        shape = (len(model.transformer.h), 2, len(mask), config.n_head, mask.shape[1], config.n_embd // config.n_head)
        # Zeros and not empty: what is masked is still multiplied by 0, and must not be NaN.
        # On a CPU attention is faster in float32, whatever the weights are.
        dtype = torch.promote_types(model.dtype, torch.float32) if on_cpu else model.dtype
        self.past = torch.zeros(shape, dtype=dtype, device=tokens.device)
        self.seen = 0
        # A processor without products of bfloat16 or float16 takes float32's, which round the same sums.
        candidates = (model.dtype, dtype) if on_cpu and torch.backends.mkldnn.enabled else ()
        self.product_dtype = next(filter(_can_pack, candidates), None)  # None: each layer is called as it is
        self.packed: dict = {}
        gelu = config.activation_function == "gelu_new"  # transformers computes it in eight steps
        self.activation = nn.GELU(approximate="tanh") if gelu else model.transformer.h[0].mlp.act

    def keep(self, rows):
        self.past, self.rows = self.past[:, :, rows], self.rows[rows]

    def logits_and_values(self, columns):
        new, self.seen = slice(self.seen, columns), columns
        body, mask = self.model.transformer, self.mask[self.rows, :columns]
        x = body.wte(self.tokens[self.rows, new]) + body.wpe(positions(mask)[:, new])  # [b, n, n_embd]
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
        head = getattr(self.model, "v_head", None)
        value = None if head is None else as_scalars(head(last[:, None]).squeeze(-1))[:, 0]  # [b]
        return self._linear(last, self.model.lm_head), value

    def _linear(self, x, layer, activation=None):
        if self.product_dtype is None:
            return layer(x) if activation is None else activation(layer(x))
        if layer not in self.packed:  # Conv1D keeps its weight as [in, out]; oneDNN wants [out, in]
            weight = layer.weight.t() if isinstance(layer, Conv1D) else layer.weight
            weight, bias = (w if w is None else w.to(self.product_dtype) for w in (weight, layer.bias))
            if len(x) > 1:  # one row is multiplied as fast by a weight as it is
                weight = torch.ops.mkldnn._reorder_linear_weight(weight, len(x))
            self.packed[layer] = weight, bias
        fuses = isinstance(activation, nn.GELU)
        how: tuple = ("gelu", [], "tanh") if fuses else ("none", [], "")
        x = torch.ops.mkldnn._linear_pointwise(x.to(self.product_dtype), *self.packed[layer], *how).to(x.dtype)
        return x if activation is None or fuses else activation(x)


@functools.lru_cache
def _can_pack(dtype):
    """Whether this torch has oneDNN's packed linear layers, which its own inductor calls, and they compute the same."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    x, weight = (torch.arange(2048.0).view(32, 64).mul(scale).sin().to(dtype) for scale in (0.7, 1.3))
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, len(x))
        pairs = (x, packed), (x[:1], weight.t().contiguous().t())  # one row by a weight as Conv1D has it
        found = [torch.ops.mkldnn._linear_pointwise(*pair, None, "none", [], "") for pair in pairs]
    except RuntimeError:  # a dtype that this processor has no products for
        return False
    expected, bound = F.linear(x, weight), 64 * torch.finfo(dtype).eps
    return all(torch.allclose(product, expected[: len(product)], rtol=0, atol=bound) for product in found)


def decoder_for(model, tokens, mask):
    """A `GPT2Decoder` where that provably computes what the model's forward does, else a `Decoder`."""
    model = innermost(model)
    plain = is_unaltered(model) and not torch.is_autocast_enabled(model.device.type)
    if plain:
        config, modules = model.config, [model.lm_head, *model.transformer.modules()]
        odd = config.scale_attn_by_inverse_layer_idx, config.reorder_and_upcast_attn, config.add_cross_attention
        known = PLAIN | {nn.ModuleList, type(ACT2FN[config.activation_function])}
        plain = not any(odd) and config.scale_attn_weights and config._attn_implementation in ("eager", "sdpa")
        plain &= all(type(module) in known and not _is_altered(module) for module in modules)
        # Quantised weights, sharded ones and pruned heads are of another class or shape.
        plain &= all(type(weight) is nn.Parameter for module in modules for weight in module.parameters(recurse=False))
        plain &= all(block.attn.c_attn.weight.shape[1] == 3 * config.n_embd for block in model.transformer.h)
    return (GPT2Decoder if plain else Decoder)(model, tokens, mask)
