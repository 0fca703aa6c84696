"""GPT-2 with a value head: next-token logits and one value per token, in one forward pass.

The head is a linear layer on GPT-2's last hidden state, as in "Fine-Tuning Language Models from Human Preferences"
(Ziegler et al., 2019, arXiv:1909.08593). Six files are copied into every package. In the order in which to read them:
`configuration_`, which has a map of them all, `sampling_`, `decoding_`, `scoring_`, `generation_`, `modeling_`.
"""

import inspect
from dataclasses import dataclass

import torch
from torch import nn
from transformers import Cache, GPT2LMHeadModel
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

# transformers 4.57.6 to 5.0.0 copy from a local folder only what is named here: what generation needs must be, too.
try:
    from .configuration_gpt2_value import GPT2ValueConfig
    from .decoding_gpt2_value import positions
    from .generation_gpt2_value import rollout
    from .sampling_gpt2_value import Sampling
    from .scoring_gpt2_value import rescore
except ImportError:
    if __package__:  # in a package the siblings are there: it is transformers that lacks a name
        raise
    # In a checkout or a wheel these files are top-level modules.
    from configuration_gpt2_value import GPT2ValueConfig
    from decoding_gpt2_value import positions
    from generation_gpt2_value import rollout
    from sampling_gpt2_value import Sampling  # noqa: F401
    from scoring_gpt2_value import rescore
SIGNATURE = inspect.signature(GPT2LMHeadModel.forward)  # of the installed transformers
# Trainer's label smoothing shifts the labels only for the class names in this registry of transformers, and has no
# other way to be told; the keys are not used.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.update(gpt2_value="GPT2ValueModel", gpt2_value_seed="GPT2HeadWithValueModel")


@dataclass
class GPT2ValueOutput(CausalLMOutputWithCrossAttentions):
    """`GPT2LMHeadModel`'s, and `value [batch, tokens]` float32 of the state after each token of the input."""

    value: torch.Tensor | None = None


class Projection(nn.Module):
    """A linear layer that computes in its input's dtype. No subclass of `nn.Linear`, so that nothing quantises it."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs))

    def forward(self, states):
        return nn.functional.linear(states, self.weight.to(states.dtype), self.bias.to(states.dtype))


class ValueHead(nn.Sequential):
    """Dropout, projection, activation, dropout: `[..., n_embd]` to `[..., 1]` (see the config), in float32 at least."""

    def __init__(self, config):
        super().__init__()
        self.first_dropout = nn.Dropout(config.summary_first_dropout)
        width = 1 if config.summary_proj_to_labels else config.n_embd
        self.summary = Projection(config.n_embd, width) if config.summary_use_proj else nn.Identity()
        self.activation = nn.Tanh() if config.summary_activation == "tanh" else nn.Identity()
        self.last_dropout = nn.Dropout(config.summary_last_dropout)

    def forward(self, hidden_states):
        with torch.autocast(hidden_states.device.type, enabled=False):
            return super().forward(hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32)))


class GPT2ValueModel(GPT2LMHeadModel):
    """GPT-2 with a language-model head and a value head, `GPT2ValueOutput` in one forward pass.

    `v_head.summary.{weight,bias}` is all that it adds to GPT-2's state dict. At the same positions, its logits are
    GPT-2's, bit for bit.
    """

    config_class = GPT2ValueConfig
    returns_dict = True  # where neither the caller nor the config wants tuples
    head_std = "value_head_initializer_range"  # the config's field

    # Buffers that GPT-2 checkpoints had until 2023: causal masks, which nothing reads any more.
    _keys_to_ignore_on_load_unexpected = [r"attn\.(masked_)?bias$", r"crossattention\.(masked_)?bias$"]

    rollout = rollout
    rescore = rescore

    def __init__(self, config, init_value_head=False):
        if config.model_type != GPT2ValueConfig.model_type:
            config = GPT2ValueConfig.from_gpt2(config)
        super().__init__(config)
        self.loss_type = "ForCausalLM"  # transformers tells it by the class's name, and warns where it cannot
        self.v_head = ValueHead(config).to(torch.promote_types(self.dtype, torch.float32))
        # Loaded in float32 also where the body has 16 bits, and never quantised. transformers refuses a name without
        # weights, as of a head that has none; for a class's names, its own tests expect weights in every model.
        self._keep_in_fp32_modules_strict = ["v_head"] if config.summary_use_proj else None
        if init_value_head:  # the head is meant to be missing: transformers need not warn
            self._keys_to_ignore_on_load_missing = [r"^v_head\."]
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, Projection):
            nn.init.normal_(module.weight, std=getattr(self.config, self.head_std))
            nn.init.zeros_(module.bias)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, *model_args, init_value_head=False, output_loading_info=False, **kwargs
    ):
        """As in transformers, from a package of this model or from a plain GPT-2 checkpoint, which gets a new head.

        Raises ValueError for what is no GPT-2; without `init_value_head`, also for a package without its whole head.
        """
        if pretrained_model_name_or_path is not None and not init_value_head:
            # Without trust_remote_code, of which transformers would warn: this code is trusted already. The fields of a
            # plain GPT-2 come without a model_type (see the config).
            fields, _ = cls.config_class.get_config_dict(
                pretrained_model_name_or_path, **{**kwargs, "trust_remote_code": None}
            )
            init_value_head = fields.get("model_type") != GPT2ValueConfig.model_type
        model_args = (*model_args, True) if init_value_head else model_args
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
        )
        if init_value_head:  # transformers makes what a checkpoint lacks in the dtype of the body
            model.v_head.to(torch.promote_types(model.dtype, torch.float32))
        lost = [key for key in [*info["missing_keys"], *info["mismatched_keys"]] if "v_head." in str(key)]
        if lost and not init_value_head:
            raise ValueError(
                f"{pretrained_model_name_or_path}: its value head lacks {lost}, or has another shape. Ask for a whole "
                "package, or pass init_value_head=True, which makes what is missing."
            )
        return (model, info) if output_loading_info else model

    def detach_value_head(self):
        """Stop the value loss's gradient at the head: the body no longer learns from it. Saved with the model."""
        self.config.detach_value_head = True

    detach_head = detach_value_head  # the seed notebook's prose calls it so

    def attach_value_head(self):
        """Let the value loss's gradient reach the body again. Saved with the model."""
        self.config.detach_value_head = False

    def forward(self, *args, **kwargs):
        """`GPT2LMHeadModel.forward` with whatever arguments the installed one takes, plus the value of every token.

        `labels` may be called `lm_labels`, as in the seed. Arguments that are not known here are handed on, to the body
        and to the loss, as there. Where no `position_ids` are given, they count the tokens that a 2-D `attention_mask`
        admits, cached ones too: padding on either side changes nothing.

        Returns a `GPT2ValueOutput`, or its tuple when `return_dict` (argument, else config) is False. Raises ValueError
        for a mask that leaves out the cache or the input, TypeError for an argument that is given twice.
        """
        # What is passed by position gets the names of the installed transformers; other names stay. None is for self.
        given = SIGNATURE.bind_partial(None, *args, **kwargs).arguments
        given.update(given.pop("kwargs", {}))
        arguments = {name: value for name, value in given.items() if value is not None}
        return_dict = arguments.pop("return_dict", self.returns_dict and self.config.return_dict)
        logits_to_keep = arguments.pop("logits_to_keep", 0)
        if {"labels", "lm_labels"} <= arguments.keys():
            raise TypeError("got labels and lm_labels, two names of one argument: pass labels alone.")
        labels = arguments.pop("labels", arguments.pop("lm_labels", None))
        mask = arguments.get("attention_mask")
        cache = arguments.get("cache", arguments.get("past_key_values"))
        inputs = arguments.get("input_ids", arguments.get("inputs_embeds"))  # neither: GPT2Model says what is missing
        if "position_ids" not in arguments and inputs is not None and mask is not None and mask.dim() == 2:
            tokens = inputs.shape[1]
            past = cache.get_seq_length() if isinstance(cache, Cache) else 0
            if mask.shape[1] != past + tokens and not isinstance(cache, tuple):  # transformers 4's
                raise ValueError(
                    f"attention_mask has {mask.shape[1]} columns; expected {past + tokens}, {past} of the cache and "
                    f"{tokens} of the input: pass the whole sequence's."
                )
            arguments["position_ids"] = positions(mask)[:, -tokens:]

        outputs = dict(self.transformer(**arguments, return_dict=True))
        hidden_states = outputs.pop("last_hidden_state")  # [batch, tokens, n_embd]
        # Read from the model's config at each call: it is the one that is saved, and peft copies the head.
        value = self.v_head(hidden_states.detach() if self.config.detach_value_head else hidden_states).squeeze(-1)
        columns = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden_states[:, columns])  # [batch, columns, vocabulary]
        loss = None
        if labels is not None:
            for_loss = {name: given for name, given in arguments.items() if name not in SIGNATURE.parameters}
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **for_loss)
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                loss = loss + 0.0 * value.sum()  # DistributedDataParallel waits for a gradient of every parameter
        output = GPT2ValueOutput(loss=loss, logits=logits, **outputs, value=value)
        return output if return_dict else output.to_tuple()

    # generate() and Trainer read the names of arguments off the signature.
    forward.__signature__ = SIGNATURE  # type: ignore[attr-defined]

    # A subclass that overrides forward is scored by its own logits (see `calls_gpt2`): its forward is not this one. So
    # is a model of a package of version 0.2.0, which has no such name.
    scored_forward = forward


class GPT2HeadWithValueModel(GPT2ValueModel):
    """The seed notebook's model: a tuple `(logits, past_key_values, ..., value)`; its head starts as GPT-2's layers."""

    returns_dict = False
    head_std = "initializer_range"
