"""Running a causal language model as it is scored: without dropout, at positions that count its own tokens.

Remote code, which imports only torch and transformers. What is computed is always the model's own forward, called on a
copy of its modules without dropout. The main path comes first: `Decoder` for one column at a time, `call_with` for all.
Nothing here writes to a module of the model: other threads may train, sample or score it meanwhile.
"""

import copy
import inspect
from functools import partial
from weakref import WeakKeyDictionary, proxy

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Cache, GPT2LMHeadModel
from transformers.activations import NewGELUActivation
from transformers.pytorch_utils import Conv1D

# What the installed transformers calls a cache, as an argument and in an output: 5.24 renamed it.
CACHE = "cache" if "cache" in inspect.signature(GPT2LMHeadModel.forward).parameters else "past_key_values"
# Forwards as they were when this module was imported: somebody may replace them later.
OWN_FORWARD = GPT2LMHeadModel.forward
OWN_LAYERS = {kind: kind.forward for kind in (NewGELUActivation, Conv1D, nn.Linear)}
# Of each DistributedDataParallel the copy that is called: to that, its backward pass has only a weak reference.
_called: WeakKeyDictionary = WeakKeyDictionary()


def positions(mask):
    """Positions `[B, columns]` that count the tokens of `mask [B, columns]`, so that padding changes nothing."""
    return (mask.bool().cumsum(-1) - 1).clamp(min=0)


def run(model, tokens, mask, columns, **arguments):
    """Run the model on a slice of the columns of `tokens [B, P+T]`: its output, and `[B, columns]` values or None.

    Of the arguments, those are left out that the model does not take. One that takes any (`**kwargs`) gets them all;
    before transformers 5, BLOOM took any only to warn of them.
    """
    signature = inspect.signature(type(unwrapped(model)).forward)
    named = str(signature)
    arguments["position_ids"] = positions(mask)[:, columns]
    if "**" not in named or "**deprecated" in named:
        arguments = {name: given for name, given in arguments.items() if name in signature.parameters}
    output = model(input_ids=tokens[:, columns], attention_mask=mask[:, : columns.stop], return_dict=True, **arguments)
    values = getattr(output, "value", None)
    if values is not None and values.dim() != 2:
        raise ValueError(
            f"this model's value has the shape {list(values.shape)}; expected one scalar for each token, "
            "[batch, tokens]: set summary_use_proj and summary_proj_to_labels in its config."
        )
    return output, values


class Decoder:
    """Logits and values for one more column at a time, by the model's own forward pass and cache."""

    def __init__(self, model, tokens, mask):
        self.tokens, self.mask = tokens, mask  # [B, P+T], which the caller fills
        self.rows = torch.arange(len(tokens), device=tokens.device)  # those that are still computed, b of B
        inner = unwrapped(model)
        # GPT-2's cache is known, a DynamicCache: rows can be dropped, and room be kept.
        self.is_gpt2 = isinstance(inner, GPT2LMHeadModel) and not inner.config.add_cross_attention
        self.model = without_dropout(to_call(model))
        if self.is_gpt2 and torch.backends.mkldnn.is_available():
            speed_up(self.model, len(tokens))
        # The cache of a recurrent model holds states that run on over padding, and may live in its modules.
        self.use_cache = not getattr(inner, "_is_stateful", False)
        self.cache = None  # without one, all columns are run again

    def logits_and_values(self, columns):
        """Logits `[b, V]` and values `[b]` or None after so many columns, of the current rows."""
        new = slice(0 if self.cache is None else columns - 1, columns)
        tokens, mask = self.tokens[self.rows], self.mask[self.rows]  # [b, P+T]
        output, values = run(
            self.model, tokens, mask, new, **{CACHE: self.cache}, use_cache=self.use_cache, logits_to_keep=1
        )
        cache = getattr(output, CACHE, None)
        if self.cache is None and isinstance(cache, Cache):
            self.cache = cache
            for layer in cache.layers if self.is_gpt2 else ():
                layer.update = partial(append, proxy(layer), tokens.shape[1])
        return output.logits[:, -1], None if values is None else values[:, -1]

    def keep(self, rows):
        """Go on with these of the current rows only, a 1-D tensor of indices. Other models than GPT-2 keep all."""
        if self.is_gpt2 and self.cache is not None:
            self.rows = self.rows[rows]
            self.cache.batch_select_indices(rows)


def logits_alone(model, row):
    """Logits `[n, V]` of one row `[n]`, without padding or cache: what a call of the model gives in eval mode."""
    with torch.no_grad():
        return without_dropout(to_call(model))(input_ids=row[None], use_cache=False, return_dict=True).logits[0]


def call_with(model, tokens, mask, T, score):
    """Call the model on all columns but the last: what `score(head, inputs [B, T, ...])` gives, and values or None.

    A copy of a GPT-2 has `score` in the place of its output layer, and that layer is `head`. The call hands `score`
    what it would hand the layer, for the last T columns, and returns what it gives as `output.logits`. So nobody has to
    hold all logits, and whatever a call of the model does around it still happens: it gathers weights, switches
    autocast on, synchronises gradients. Of any other model the inputs are its logits, and `head` does nothing.
    """
    # Until 2025, torch lost gradients where a call without them came before, in the same block of autocast.
    torch.clear_autocast_cache()
    outer = to_call(model)
    called = without_dropout(outer)
    *wrappers, inner = wrapped(called)
    takes_score = calls_gpt2(inner) and all(map(is_thin, wrappers))
    if takes_score:
        head, inner.lm_head = inner.lm_head, nn.Identity()
        inner.lm_head.forward = partial(score, head)
    if isinstance(outer, DistributedDataParallel):
        # It keeps state from call to call (a reducer, flags), so its copy shares all its fields. Only the module is the
        # copy's own, and what was compiled, with another module inside, is not called.
        called, module = _called.setdefault(outer, called), called.module
        called.__class__ = type(
            "Copy", (type(outer),), {"module": module, "__call__": DistributedDataParallel._call_impl}
        )
        called.__dict__ = vars(outer)
    output, values = run(called, tokens, mask, slice(0, tokens.shape[1] - 1), logits_to_keep=T, use_cache=False)
    inner.lm_head = None  # the copy may live on, and what it scored shall not
    # In the place of the output layer, `score` gives what the output calls logits.
    scores = output.logits if takes_score else score(nn.Identity(), output.logits[:, -T:])
    return scores, None if values is None else values[:, -T:]


def inputs_and_head(model, tokens, mask, T):
    """The inputs `[B, T, ...]` of the model's output layer, and that layer, which may be called later."""
    # Inside its call alone, a model has the weights that FSDP2 gathers, and the dtypes that autocast chooses. There the
    # layer is called at once, and all logits are held. Else it is called later; it is a copy's, made while a PEFT
    # adapter was off, and in the copy it stays off.
    at_once = (
        is_spread(model)
        or hasattr(to_call(model), "_original_forward")
        or torch.is_autocast_enabled(tokens.device.type)
    )
    return call_with(
        model, tokens, mask, T, lambda head, inputs: (head(inputs), nn.Identity()) if at_once else (inputs, head)
    )[0]


# Which model it is, and what it may be given


def wrapped(model):
    """The model and what it wraps, outermost first; TypeError where there is nothing that can be sampled and scored."""
    models = [model]
    while True:
        outer = models[-1]
        children = getattr(outer, "_modules", {})
        child = children.get("_orig_mod", children.get("module"))
        if type(outer).__name__ in ("DataParallel", "FullyShardedDataParallel"):
            raise TypeError(
                f"got a {type(outer).__name__}: use DistributedDataParallel or FSDP2; of DataParallel, its module."
            )
        if child is not None:
            models.append(child)
        elif hasattr(outer, "get_base_model"):
            if outer.active_peft_config.is_prompt_learning:
                raise TypeError(
                    f"the virtual tokens of a {type(outer.active_peft_config).__name__} are not part of a rollout; "
                    "pass a model whose adapter changes weights, such as LoRA."
                )
            models.append(outer.get_base_model())
        elif hasattr(outer, "get_output_embeddings") and outer.get_output_embeddings() is not None:
            return models
        else:
            raise TypeError(f"got a {type(model).__name__}; expected a causal language model, or a wrapper of one.")


def unwrapped(model):
    """The model without wrappers."""
    return wrapped(model)[-1]


def to_call(model):
    """The model to run: without torch's wrappers that change nothing here, such as what is compiled.

    DistributedDataParallel does change something where gradients flow, and PEFT's call may, with some adapters.
    """
    return next(
        x
        for x in wrapped(model)
        if is_sharded(x)
        or hasattr(x, "peft_config")
        or not is_thin(x)
        or (torch.is_grad_enabled() and isinstance(x, DistributedDataParallel))
    )


def device_of(model):
    """The device that the model is on. TypeError where parts of it are not in memory."""
    inner = unwrapped(model)
    if any(weight.is_meta for weight in inner.parameters()):
        raise TypeError(f"weights of this {type(inner).__name__} have no data (device meta); load all of them first.")
    return inner.device


def vocabulary_of(model):
    """How many tokens the model knows."""
    return unwrapped(model).get_input_embeddings().weight.shape[0]


def check_tokens(model, tokens, mask, new_tokens=0):
    """The size of the model's vocabulary. TypeError or ValueError where it cannot run on `tokens`, `mask [B, P]`."""
    vocabulary = vocabulary_of(model)
    lengths = mask.sum(1)
    if not len(tokens) or not lengths.all():
        raise ValueError(f"the rows have {lengths.tolist()} tokens; expected at least one row, and one token in each.")
    for row, column in (((tokens < 0) | (tokens >= vocabulary)) & mask.bool()).nonzero().tolist():
        raise ValueError(
            f"row {row} holds the id {int(tokens[row, column])}, outside the vocabulary of {vocabulary} tokens; pass "
            "what this model's tokenizer gives, padding with its attention_mask."
        )
    places = getattr(unwrapped(model).config, "max_position_embeddings", None) or 0
    longest = int(lengths.max()) + new_tokens
    if 0 < places < longest:  # XLNet's is -1: any length
        raise ValueError(
            f"the longest row, new tokens included, has {longest} tokens, this model's positions end at {places}; "
            "shorten the prompts, or draw fewer tokens (max_new_tokens)."
        )
    return vocabulary


# Whether a call does with the output layer what the class says, and nothing else. Scores in its place would pass over a
# hook on the model, or a forward that somebody replaced; then the call is asked for its logits instead.
#
#     is_thin(wrapper)     it only hands on: `call_with` may score inside it, `to_call` leaves torch's out
#     is_hooked(module)    somebody's function sees or changes what the call takes or gives
#     calls_gpt2(model)    the call is GPT-2's, so its logits are what the output layer gives
#     is_sharded(module)   FSDP2's: its weights are there only inside its call


def is_hooked(module):
    """Whether somebody has hooked the module's call, or replaced its forward.

    FSDP2 hooks it to gather weights, `torch.compile` has a forward of its own, and Accelerate's `prepare` one that
    switches autocast on: these do not count.
    """
    if "forward" in vars(module) and not (hasattr(module, "_original_forward") or hasattr(module, "_orig_mod")):
        return True
    return not is_sharded(module) and (module._forward_pre_hooks or module._forward_hooks)


def is_sharded(module):
    """Whether FSDP2 gathers this module's weights."""
    return hasattr(module, "unshard")


def is_thin(wrapper):
    """Whether a wrapper is torch's or PEFT's, such as DistributedDataParallel, and so hands arguments through."""
    return type(wrapper).__module__.startswith(("torch.", "peft.")) and not is_hooked(wrapper)


def calls_gpt2(model):
    """Whether a call runs the forward of GPT2LMHeadModel or GPT2ValueModel, as it was when it was imported."""
    kind = type(model)
    return kind.forward is getattr(kind, "scored_forward", OWN_FORWARD) and not is_hooked(model)


# Weights that FSDP2 spreads over processes: a call gathers them, so all processes have to make the same calls.


def is_spread(model):
    """Whether the model's weights are spread over processes."""
    return any(hasattr(weight, "device_mesh") for weight in model.parameters())


# Copies of a model, which share its weights: `eval()` would write to a model that another thread may be training.


def copied(model):
    """The modules of a model once more. What is set on a module of one is not set on the other's.

    Shared are the weights (the dictionary itself, where FSDP2 puts gathered ones during a call) and what an attribute
    or a buffer holds. A hook that keeps state on its module keeps it on the copy, which is thrown away.
    """
    copies = {module: object.__new__(type(module)) for module in model.modules()}
    for module, its in copies.items():
        # A call may register hooks, and make buffers anew: of all dictionaries but that of the weights, a copy.
        fields = {
            name: value.copy() if isinstance(value, dict) and name != "_parameters" else value
            for name, value in vars(module).items()
        }
        fields["_compiled_call_impl"] = None  # what is compiled is bound to the module
        fields["_modules"] = {name: copies.get(child) for name, child in module._modules.items()}
        # Accelerate puts methods and partials there, for autocast and for offloading. In their copies, the copy of a
        # module stands for the module.
        for name in {"forward", "_old_forward"} & set(fields):
            fields[name] = copy.deepcopy(fields[name], {id(each): twin for each, twin in copies.items()})
        if "_orig_mod" in module._modules:  # of `torch.compile`, whose forward calls the original
            fields["forward"] = copies[module._orig_mod]
        its.__dict__ = fields
    return copies[model]


def without_dropout(model):
    """A copy of the model as `eval()` leaves it. Where gradients flow, checkpointing goes on.

    Dropout that a function keeps, which somebody put in the place of a forward, is out of reach, and found by
    `check_itself`.
    """
    quiet = copied(model)
    for module in quiet.modules():
        # transformers checkpoints a layer in training mode only, so there its own dropouts are set to 0 instead.
        checkpoints = torch.is_grad_enabled() and getattr(module, "gradient_checkpointing", False)
        module.training = module.training and checkpoints
        for name, value in vars(module).items():
            if "drop" in name and type(value) is float:
                setattr(module, name, 0.0)
    return quiet


# What makes a rollout fast on a CPU. Without products by oneDNN it takes twice as long, in 16 bits up to thirty times.
# Without room in the cache, 16 rows of 48 columns take 3% longer, of 256 columns 13%.


def speed_up(model, rows):
    """Let the linear layers of a GPT-2 on a CPU multiply by oneDNN, as torch's inductor does; `model` is a copy.

    Weights are packed for one rollout of so many rows, and so are never older than the model's. GPT-2's activation is
    one call instead of eight, on every device.
    """
    for layer in model.modules():
        kind = type(layer)
        # A hook before the call may compute a weight or a bias, as pruning does.
        if kind.forward is not OWN_LAYERS.get(kind) or is_hooked(layer):
            continue
        if kind is NewGELUActivation:
            layer.forward = partial(nn.functional.gelu, approximate="tanh")
        # Quantised and sharded weights are of other classes; oneDNN has no float64.
        elif type(layer.weight) is nn.Parameter and layer.weight.is_cpu and layer.weight.dtype != torch.float64:
            weight = layer.weight.detach().float()
            if kind is Conv1D:
                weight = weight.t()  # [out, in]
            if rows > 1:  # one row is multiplied as fast by a weight as it is
                weight = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
            bias = None if layer.bias is None else layer.bias.float()
            layer.forward = partial(multiply, weight, bias)


def multiply(weight, bias, x):
    """A linear layer by oneDNN, in float32, also under autocast. (It sums products of 16 bits in float32 anyway.)"""
    return torch.ops.mkldnn._linear_pointwise(x.float(), weight, bias, "none", [], "").to(x.dtype)


def append(layer, columns, *new, **kwargs):
    """In the place of a cache layer's `update`, which copies all columns for each new one: keep room for `columns`.

    `keys` becomes the beginning of a longer tensor, its `_base`. The new column is written behind, and `keys` made
    longer. (The prompt's columns went through the layer's own `update`.)
    """
    past = layer.keys.shape[-2]
    for name, states in zip(("keys", "values"), new):  # [b, n_head, 1, width]
        room = getattr(layer, name)._base  # at first, and after rows were dropped, None or some other tensor
        if room is None or room.shape[-2] != columns:
            room = nn.functional.pad(getattr(layer, name), (0, 0, 0, columns - past))
        room[..., past, :] = states[..., 0, :]
        setattr(layer, name, room[..., : past + 1, :])
    return layer.keys, layer.values
