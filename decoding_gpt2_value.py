"""Running a causal language model as it is scored: without dropout, at positions that count its own tokens, by step.

Remote code, which imports only torch and transformers. The main path comes first: `run` for many columns at once, a
`Decoder` for one column at a time, `GPT2Decoder` for the same by a plain GPT-2 in half the time. Nothing here writes to
a module of the model: other threads may train, sample or score it meanwhile.
"""

import copy
import functools
import inspect
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Cache, DynamicCache, GPT2LMHeadModel, GPT2Model
from transformers.activations import ACT2FN
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Attention, GPT2Block
from transformers.pytorch_utils import Conv1D

CACHE_NAMES = ("cache", "past_key_values")  # of a forward's argument: transformers 5.24 renamed it
CACHE = next(
    name for name in CACHE_NAMES if name in inspect.signature(GPT2LMHeadModel.forward).parameters
)  # what the installed one calls it
# What `GPT2Decoder` computes itself, with the forwards that these classes had when this module was imported.
PARTS: tuple = GPT2Model, GPT2Block, GPT2Attention, GPT2MLP, Conv1D
PARTS += nn.Linear, nn.Embedding, nn.LayerNorm, nn.Dropout, nn.ModuleList
OWN_FORWARDS = {kind: kind.forward for kind in PARTS}
OWN_LM_FORWARD = GPT2LMHeadModel.forward
OWN_SDPA = ALL_ATTENTION_FUNCTIONS["sdpa"]
LIBRARIES = ("torch", "transformers", "accelerate", "peft")  # what they put around a call hands it through


def positions(mask):
    """Positions `[B, columns]` that count the tokens of `mask [B, columns]`, so that padding changes nothing."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def as_scalars(values):
    """`values [B, columns]` as float32 at least. Raises ValueError where there are several for each token."""
    if values.dim() != 2:
        raise ValueError(
            f"this model's value has the shape {list(values.shape)}; expected one scalar for each token, "
            "[batch, tokens]: set summary_use_proj and summary_proj_to_labels in its config."
        )
    return values.to(torch.promote_types(values.dtype, torch.float32))


def run(model, tokens, mask, columns, *, logits_to_keep=None, **arguments):
    """Run the model on a slice of the columns of `tokens [B, P+T]`: its output, and `[B, columns]` values or None."""
    inner = unwrapped(model)[-1]
    accepted = forward_parameters(inner)
    if "position_ids" in accepted:
        arguments["position_ids"] = positions(mask)[:, columns]
    if "logits_to_keep" in accepted and logits_to_keep is not None:
        arguments["logits_to_keep"] = logits_to_keep
    output = model(input_ids=tokens[:, columns], attention_mask=mask[:, : columns.stop], return_dict=True, **arguments)
    if logits_to_keep is not None and getattr(output, "logits", tokens[..., :0]).shape[-1] != vocabulary_of(inner):
        raise TypeError(f"a {type(model).__name__} gives no logits over its vocabulary; expected a causal LM.")
    values = getattr(output, "value", None)
    return output, None if values is None else as_scalars(values)


def logits_alone(model, row, columns):
    """Logits `[columns, V]` for the last columns of one row `[n]`: the model's own call, without padding or cache.

    Nothing but the tokens is passed, so that this is what a user of the model gets. Dropout is off.
    """
    more = {"logits_to_keep": columns} if "logits_to_keep" in forward_parameters(unwrapped(model)[-1]) else {}
    with torch.no_grad():
        output = without_dropout(innermost(model))(input_ids=row[None], use_cache=False, return_dict=True, **more)
    return output.logits[0, -columns:]


def inputs_and_head(model, tokens, mask, columns, T):
    """Inputs `[B, T, ...]` of an output layer for the last T columns of `run`, that layer, and values or None.

    A plain GPT-2's inputs are its hidden states, so that nobody has to hold all logits; any other's are the logits.
    """
    quiet = without_dropout(model, checkpointing=True)
    if runs(model, own_forward(model)) and type(model.lm_head) is nn.Linear:
        body, _ = run(quiet.transformer, tokens, mask, columns, use_cache=False)
        return body.last_hidden_state[:, -T:], quiet.lm_head, None
    output, values = run(quiet, tokens, mask, columns, logits_to_keep=T, use_cache=False)
    return output.logits[:, -T:], nn.Identity(), None if values is None else values[:, -T:]


def decoder_for(model, tokens, mask):
    """A `GPT2Decoder` where the model is a plain GPT-2 that nobody has changed, else a `Decoder`."""
    model = innermost(model)
    return (GPT2Decoder if can_decode_fast(model) else Decoder)(model, tokens, mask)


class Decoder:
    """Logits and values for one more column at a time, by any causal language model's own forward pass and cache."""

    def __init__(self, model, tokens, mask):
        self.model, self.tokens, self.mask = without_dropout(model), tokens, mask  # the caller fills both [B, P+T]
        self.rows = torch.arange(len(tokens), device=tokens.device)  # those that are still computed, b of B
        inner = unwrapped(model)[-1]
        names = [name for name in CACHE_NAMES if name in forward_parameters(inner)]
        # The cache of a recurrent model holds states that run on over padding, and may live in its modules.
        self.cache_name = names[0] if names and not getattr(inner, "_is_stateful", False) else None
        self.cache: Any = None

    def logits_and_values(self, columns):
        """Logits `[b, V]` and values `[b]` or None after so many columns, of the current rows."""
        keep_pace(self.model, self.tokens, ended=False)
        new = slice(0 if self.cache is None else columns - 1, columns)
        cached = {} if self.cache_name is None else {self.cache_name: self.cache}
        tokens = self.tokens[self.rows]
        mask = self.mask[self.rows]
        output, values = run(self.model, tokens, mask, new, logits_to_keep=1, use_cache=bool(cached), **cached)
        cache = None if self.cache_name is None else vars(output).get(self.cache_name)
        self.cache = cache if isinstance(cache, Cache) else None  # without one, all columns are run again
        return output.logits[:, -1], None if values is None else values[:, -1]

    def keep(self, rows):
        """Go on with these of the current rows only, a 1-D tensor of indices, where the cache can drop the others."""
        if self.cache is not None:
            kinds = {type(layer) for layer in getattr(self.cache, "layers", [None])}
            if type(self.cache) is not DynamicCache or not kinds <= {DynamicLayer, DynamicSlidingWindowLayer}:
                return
            self.cache.batch_select_indices(rows)
        self.rows = self.rows[rows]


class GPT2Decoder(Decoder):
    """For a plain GPT-2: keys and values are written into storage of their final size."""

    def __init__(self, model, tokens, mask):
        super().__init__(model, tokens, mask)
        config = model.config
        on_cpu = tokens.device.type == "cpu"
        shape = (len(model.transformer.h), 2, len(mask), config.n_head, mask.shape[1], config.n_embd // config.n_head)
        # Zeros and not empty: what is masked is still multiplied by 0, and must not be NaN.
        # On a CPU attention is faster in float32, whatever the weights are.
        dtype = torch.promote_types(model.dtype, torch.float32) if on_cpu else model.dtype
        self.past = torch.zeros(shape, dtype=dtype, device=tokens.device)
        self.seen = 0  # columns whose keys and values are in `past`
        self.linear = Products(model, tokens.device)
        gelu = config.activation_function == "gelu_new"  # transformers computes it in eight steps
        self.activation = nn.GELU(approximate="tanh") if gelu else model.transformer.h[0].mlp.act

    def keep(self, rows):
        self.past = self.past[:, :, rows]
        self.rows = self.rows[rows]

    def logits_and_values(self, columns):
        new = slice(self.seen, columns)
        self.seen = columns
        body = self.model.transformer
        mask = self.mask[self.rows, :columns]
        x = body.wte(self.tokens[self.rows, new]) + body.wpe(positions(mask)[:, new])  # [b, n, n_embd]
        b, n, _ = x.shape
        allowed = mask.bool()[:, None, None]  # [b, 1, 1, columns]
        if n > 1:  # padding sees itself: a query without any key is NaN
            causal = torch.ones((n, columns), dtype=torch.bool, device=x.device).tril()
            allowed = allowed & causal | torch.eye(n, columns, dtype=torch.bool, device=x.device)
        for block, (keys, values) in zip(body.h, self.past, strict=True):
            qkv = self.linear(block.ln_1(x), block.attn.c_attn)  # [b, n, 3 * n_embd]
            query, key, value = qkv.view(b, n, 3, -1, keys.shape[-1]).permute(2, 0, 3, 1, 4)  # [b, n_head, n, width]
            keys[:, :, new], values[:, :, new] = key, value
            past = keys[:, :, :columns], values[:, :, :columns]
            heads = F.scaled_dot_product_attention(query.to(keys.dtype), *past, allowed).to(x.dtype)
            x = x + self.linear(heads.transpose(1, 2).reshape(b, n, -1), block.attn.c_proj)
            x = x + self.linear(self.linear(block.ln_2(x), block.mlp.c_fc, self.activation), block.mlp.c_proj)
        last = body.ln_f(x[:, -1])  # [b, n_embd]
        head = getattr(self.model, "v_head", None)
        value = None if head is None else as_scalars(head(last[:, None]).squeeze(-1))[:, 0]  # [b]
        return self.linear(last, self.model.lm_head), value


# Which model it is, and what it may be given


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
                raise TypeError(
                    f"the virtual tokens of a {type(adapter).__name__} are not part of a rollout; "
                    "pass a model whose adapter changes weights, such as LoRA."
                )
            models.append(models[-1].get_base_model())
        elif hasattr(models[-1], "get_input_embeddings"):
            return models
        else:
            raise TypeError(f"got a {type(model).__name__}; expected a causal language model, or a wrapper of one.")


def innermost(model):
    """The model to run where no gradient is wanted: without wrappers that then change nothing (no hook, no FSDP2)."""
    for outer in unwrapped(model):
        thin = isinstance(outer, nn.parallel.DistributedDataParallel) or hasattr(outer, "get_base_model")
        thin = thin or "_orig_mod" in outer._modules
        if hasattr(outer, "unshard") or not thin or not runs(outer, type(outer).forward, LIBRARIES):
            return outer


def device_of(model):
    """The device that the model computes on, also where Accelerate keeps its weights on another or on the disk."""
    inner = unwrapped(model)[-1]
    for module in inner.modules():
        hook = getattr(module, "_hf_hook", None)
        for each in getattr(hook, "hooks", [hook]):
            if getattr(each, "execution_device", None) is not None:
                return torch.device(each.execution_device)
    if inner.device.type == "meta":
        raise TypeError(f"the weights of this {type(inner).__name__} have no data (device meta); load them first.")
    return inner.device


def vocabulary_of(model):
    """How many tokens the model knows."""
    return unwrapped(model)[-1].get_input_embeddings().weight.shape[0]


def forward_parameters(model):
    """Names that the forward of the model's class takes, those included that its `**kwargs` hand to a base class."""
    names: set = set()
    for kind in type(model).__mro__:
        if kind is nn.Module:  # all classes handed **kwargs on, to a model inside
            names |= {"position_ids", CACHE}
        elif "forward" in vars(kind):
            parameters = inspect.signature(vars(kind)["forward"]).parameters
            names |= parameters.keys()
            rest = [each.name for each in parameters.values() if each.kind is each.VAR_KEYWORD]
            if not rest or rest == ["deprecated_arguments"]:  # BLOOM's, which warns of what it is given
                break
    return names


def check_tokens(model, tokens, mask, new_tokens=0):
    """The size of the model's vocabulary. TypeError or ValueError where it cannot run on `tokens`, `mask [B, P]`."""
    vocabulary = vocabulary_of(model)
    if not are_ids(tokens):
        raise TypeError(f"tokens are {tokens.dtype}; expected token ids, an integer dtype: try .long().")
    lengths = mask.sum(1)
    if len(tokens) == 0 or not lengths.all():
        which = f"row {int(lengths.argmin())} has no tokens" if len(tokens) else "there are no rows"
        raise ValueError(f"{which}; expected at least one token in each, such as the end-of-text token.")
    for row, column in (((tokens < 0) | (tokens >= vocabulary)) & mask.bool()).nonzero().tolist():
        raise ValueError(
            f"row {row} holds the id {int(tokens[row, column])}, outside the vocabulary of {vocabulary} tokens; "
            "was it made by this model's tokenizer? Padding needs an attention_mask."
        )
    places = getattr(unwrapped(model)[-1].config, "max_position_embeddings", None)
    longest = int(lengths.max()) + new_tokens
    if places is not None and 0 < places < longest:  # XLNet's is -1: any length
        raise ValueError(
            f"the longest row, new tokens included, has {longest} tokens, this model's positions end at {places}; "
            "shorten the prompts, or draw fewer tokens (max_new_tokens)."
        )
    return vocabulary


def are_ids(tokens):
    """Whether a tensor's dtype is one of token ids."""
    return not (tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool)


# Whether a call does what the class says. `GPT2Decoder`, a call of the body alone and a score request would pass over a
# hook, or a forward that somebody replaced; then the model's own call is used instead.


def runs(module, forward, libraries=("transformers",)):
    """Whether a call of the module runs this forward, and besides only what these libraries put around it.

    transformers 5 leaves hooks on every model, which hand arguments and outputs through. So do the forwards that
    Accelerate puts on a module.
    """
    everywhere = nn.modules.module._global_forward_pre_hooks, nn.modules.module._global_forward_hooks
    groups = module._forward_pre_hooks, module._forward_hooks, *everywhere
    around = [hook for group in groups for hook in group.values()]
    own = vars(module).get("forward")
    if own is not None and getattr(own, "__func__", None) is not forward:
        around.append(own)
    is_own_call = library_of(type(module).__call__) in LIBRARIES
    return type(module).forward is forward and is_own_call and all(library_of(each) in libraries for each in around)


def library_of(function):
    """The first name of the module that a function, or the one inside a partial, was defined in."""
    return (getattr(getattr(function, "func", function), "__module__", None) or "").split(".")[0]


def own_forward(model):
    """The forward of GPT2LMHeadModel or GPT2ValueModel, as it was when it was imported."""
    return getattr(type(model), "own_forward", OWN_LM_FORWARD)


def takes_requests(model):
    """Whether a call of the model reaches `GPT2ValueModel.forward` with its `score`, and nobody changes its output."""
    *wrappers, inner = unwrapped(model)
    for wrapper in wrappers:
        forward = type(wrapper).forward
        if library_of(forward) not in LIBRARIES or not runs(wrapper, forward, LIBRARIES):
            return False
    return hasattr(inner, "own_forward") and runs(inner, own_forward(inner), LIBRARIES)


def can_decode_fast(model):
    """Whether `GPT2Decoder` computes what the model does: GPT-2's own modules, functions and weights, no hooks."""
    if not runs(model, own_forward(model)) or torch.is_autocast_enabled(device_of(model).type):
        return False
    config = model.config
    odd = config.scale_attn_by_inverse_layer_idx, config.reorder_and_upcast_attn, config.add_cross_attention
    if any(odd) or not config.scale_attn_weights or config._attn_implementation not in ("eager", "sdpa"):
        return False
    act = type(ACT2FN[config.activation_function])
    forwards = {**OWN_FORWARDS, act: act.forward}
    for module in (model.lm_head, *model.transformer.modules()):
        # Quantised weights, sharded ones and pruned heads are of another class or shape.
        plain = all(type(weight) is nn.Parameter for weight in module.parameters(recurse=False))
        if not plain or not runs(module, forwards.get(type(module))):
            return False
    scaling = (config.n_embd // config.n_head) ** -0.5
    for block in model.transformer.h:
        if block.attn.c_attn.weight.shape[1] != 3 * config.n_embd or getattr(block.attn, "scaling", scaling) != scaling:
            return False
    return ALL_ATTENTION_FUNCTIONS["sdpa"] is OWN_SDPA


# Weights that FSDP2 spreads over processes: a call gathers them, so all processes have to make the same calls.


def anywhere(model, flag):
    """Whether the flag holds in this process, or in one that holds another part of the same model."""
    for weight in model.parameters():
        if hasattr(weight, "device_mesh"):
            flags = torch.full([1] * weight.dim(), flag, device=weight.device)
            return bool(weight.from_local(flags, weight.device_mesh, weight.placements).full_tensor().any())
    return flag


def keep_pace(model, tokens, *, ended):
    """Before a column: let the others know. Once it has `ended`: run on one token as long as others have not."""
    while anywhere(model, not ended) and ended:
        model(tokens[:1, :1])


# Dropout is switched off in a copy: `eval()` would write to a model that another thread may be training.


def without_dropout(model, *, checkpointing=False):
    """The model as `eval()` leaves it, without writing to it: copies of its modules, which share weights and hooks.

    A hook that keeps state on its module keeps it on the copy, which is thrown away. With `checkpointing`, layers whose
    activations are checkpointed still are; without, they can use a cache. Dropout that a function keeps, which somebody
    put in the place of a forward, is out of reach, and found by `check_itself`.
    """
    if not any(module.training for module in model.modules()):
        return model
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise TypeError("the dropout inside DistributedDataParallel cannot be switched off: call model.eval() first.")
    copies = {module: object.__new__(type(module)) for module in model.modules()}
    for module, copied in copies.items():
        fields = dict(vars(module))
        fields["_modules"] = {name: copies.get(child) for name, child in module._modules.items()}
        # transformers checkpoints a layer in training mode only, so there its own dropouts are set to 0 instead.
        fields["training"] = module.training and checkpointing and bool(fields.get("gradient_checkpointing"))
        fields["_compiled_call_impl"] = None  # it is bound to the module
        fields.update({name: 0.0 for name, value in fields.items() if "drop" in name and type(value) is float})
        # Accelerate's: methods and partials, whose copies are bound to the modules' copies.
        for name in {"forward", "_old_forward", "_original_forward"} & set(fields):
            fields[name] = copy.deepcopy(fields[name], {id(each): its for each, its in copies.items()})
        copied.__dict__ = fields
    return copies[model]


# Products by oneDNN, which torch's own inductor calls so: in half the time of torch's default on a CPU. Weights are
# packed for one rollout, and so are never older than the model's.


class Products:
    """Linear layers: `products(x, layer, activation)` is `activation(layer(x))`, by oneDNN where this processor can."""

    def __init__(self, model, device):
        # A processor without products of bfloat16 or float16 takes float32's, which round the same sums.
        wanted = (model.dtype, torch.promote_types(model.dtype, torch.float32)) if device.type == "cpu" else ()
        self.dtype = next(filter(_can_multiply, wanted), None)
        self.packed: dict = {}

    def __call__(self, x, layer, activation=None):
        if self.dtype is None:
            return layer(x) if activation is None else activation(layer(x))
        if layer not in self.packed:  # Conv1D keeps its weight as [in, out]; oneDNN wants [out, in]
            weight = layer.weight.t() if isinstance(layer, Conv1D) else layer.weight
            weight, bias = (w if w is None else w.to(self.dtype) for w in (weight, layer.bias))
            if len(x) > 1:  # one row is multiplied as fast by a weight as it is
                weight = torch.ops.mkldnn._reorder_linear_weight(weight, len(x))
            self.packed[layer] = weight, bias
        fuses = isinstance(activation, nn.GELU)
        how: tuple = ("gelu", [], "tanh") if fuses else ("none", [], "")
        x = torch.ops.mkldnn._linear_pointwise(x.to(self.dtype), *self.packed[layer], *how).to(x.dtype)
        return x if activation is None or fuses else activation(x)


@functools.lru_cache
def _can_multiply(dtype):
    """Whether this torch and processor have oneDNN's linear layers for a dtype."""
    x = torch.ones((2, 8), dtype=dtype)
    if not (torch.backends.mkldnn.enabled and torch.backends.mkldnn.is_available()):
        return False
    try:
        torch.ops.mkldnn._linear_pointwise(x, torch.ops.mkldnn._reorder_linear_weight(x, 2), None, "none", [], "")
    except (AttributeError, RuntimeError):  # no such function; no such products
        return False
    return True
