"""GPT-2 with a value head: next-token logits and one value per token, in one forward pass.

The head is a linear layer on GPT-2's last hidden state, as in "Fine-Tuning Language Models from Human Preferences"
(Ziegler et al., 2019, arXiv:1909.08593). Six files are copied into every package. In the order in which to read them:
`configuration_`, `sampling_`, `decoding_`, `scoring_`, `generation_` and `modeling_gpt2_value.py`. A log-probability
comes from `draw` in a rollout and from `_score` in `rescore`, both over `sampling_distribution`.
"""

import inspect
from dataclasses import dataclass
from typing import Optional

import torch
from torch import nn
from transformers import Cache, GPT2LMHeadModel, GPT2Model
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

# transformers 4.57.6 to 5.0.0 copy from a local folder only what is named here: what generation needs must be, too.
try:
    from .configuration_gpt2_value import GPT2ValueConfig
    from .decoding_gpt2_value import as_scalars, positions, without_dropout
    from .generation_gpt2_value import rollout
    from .sampling_gpt2_value import Sampling
    from .scoring_gpt2_value import rescore
except ImportError:  # a checkout or a wheel, where these files are top-level modules
    from configuration_gpt2_value import GPT2ValueConfig
    from decoding_gpt2_value import as_scalars, positions, without_dropout
    from generation_gpt2_value import rollout
    from sampling_gpt2_value import Sampling  # noqa: F401
    from scoring_gpt2_value import rescore

TAKES_HEAD_MASK = "head_mask" in inspect.signature(GPT2Model.forward).parameters  # transformers 4 does
# Names that transformers' own generation, Trainer and attention kernels send through a model's **kwargs.
PASSED_ON = "block_table cache cache_position cu_seq_lens_k cu_seq_lens_q is_causal logits_indices max_length_k"
PASSED_ON += " logits_processor_args max_length_q output_attentions output_hidden_states read_index write_index"
# Trainer's label smoothing shifts the labels only for the class names in this registry; the keys are not used.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.update(gpt2_value="GPT2ValueModel", gpt2_value_seed="GPT2HeadWithValueModel")


@dataclass
class GPT2ValueOutput(CausalLMOutputWithCrossAttentions):
    """`GPT2LMHeadModel`'s, and `value [batch, tokens]` float32 of the state after each token of the input."""

    value: Optional[torch.Tensor] = None


class Float32Linear(nn.Linear):
    """A linear layer that computes in its input's dtype, also when its weights were cast to another with the body's."""

    def forward(self, hidden_states):
        bias = None if self.bias is None else self.bias.to(hidden_states.dtype)
        return nn.functional.linear(hidden_states, self.weight.to(hidden_states.dtype), bias)


class ValueHead(nn.Module):
    """Dropout, projection, activation, dropout: `[..., n_embd]` to `[..., 1]` (see the config), in float32 at least."""

    def __init__(self, config):
        super().__init__()
        width = config.num_labels if config.summary_proj_to_labels else config.hidden_size
        self.summary = Float32Linear(config.hidden_size, width) if config.summary_use_proj else nn.Identity()
        self.activation = nn.Tanh() if config.summary_activation == "tanh" else nn.Identity()
        self.first_dropout = nn.Dropout(config.summary_first_dropout)
        self.last_dropout = nn.Dropout(config.summary_last_dropout)

    def forward(self, hidden_states):
        with torch.autocast(hidden_states.device.type, enabled=False):
            output = self.first_dropout(hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32)))
            return self.last_dropout(self.activation(self.summary(output)))


class GPT2ValueModel(GPT2LMHeadModel):
    """GPT-2 with a language-model head and a value head, `GPT2ValueOutput` in one forward pass.

    `v_head.summary.{weight,bias}` is all that it adds to GPT-2's state dict; its logits are GPT-2's, bit for bit.
    """

    config_class = GPT2ValueConfig
    is_parallelizable = False  # transformers 4 offers a deprecated `parallelize()` that knows nothing of the head
    returns_dict: Optional[bool] = None  # what `forward` does when neither the caller nor, if None, the config says
    head_std = "value_head_initializer_range"  # the config's field

    _keep_in_fp32_modules_strict: Optional[list] = ["v_head"]
    _keep_in_fp32_modules: Optional[list] = ["v_head"]  # what no quantisation config touches
    # Buffers that GPT-2 checkpoints had until 2023: causal masks, which nothing reads any more.
    _keys_to_ignore_on_load_unexpected = [r"attn\.(masked_)?bias$", r"crossattention\.(masked_)?bias$"]

    rollout = rollout
    rescore = rescore

    def __init__(self, config, init_value_head=False):
        if config.model_type != GPT2ValueConfig.model_type:
            config = GPT2ValueConfig.from_gpt2(config)
        # GPT2LMHeadModel's own __init__ would run post_init() before the head exists.
        super(GPT2LMHeadModel, self).__init__(config)
        self.loss_type = "ForCausalLM"  # transformers tells it by the class's name, and warns where it cannot
        self.transformer = GPT2Model(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.v_head = ValueHead(config)
        if not config.summary_use_proj:  # no weights there: transformers 4 refuses to keep what does not exist
            self._keep_in_fp32_modules = self._keep_in_fp32_modules_strict = None
        if init_value_head:  # the head is meant to be missing: transformers need not warn
            self._keys_to_ignore_on_load_missing = [r"^v_head\."]
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, Float32Linear):
            nn.init.normal_(module.weight, std=getattr(self.config, self.head_std))
            nn.init.zeros_(module.bias)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, init_value_head=False, **kwargs):
        """As in transformers, from a package of this model or from a plain GPT-2 checkpoint, which gets a new head.

        Raises ValueError for what is no GPT-2; without `init_value_head`, also for a package without its whole head.
        """
        if pretrained_model_name_or_path is not None and not init_value_head:
            names = ("cache_dir", "local_files_only", "proxies", "revision", "subfolder", "token")
            where = {name: kwargs[name] for name in names if name in kwargs}
            fields, _ = cls.config_class.get_config_dict(pretrained_model_name_or_path, **where)
            init_value_head = fields.get("model_type") != GPT2ValueConfig.model_type
        wants_info = kwargs.pop("output_loading_info", False)
        if init_value_head:
            model_args = (*model_args, True)
        kwargs["output_loading_info"] = True
        model, info = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        mismatched = [key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]]
        lost = [key for key in [*info["missing_keys"], *mismatched] if key.startswith("v_head.")]
        if lost and not init_value_head:
            what = f"{pretrained_model_name_or_path}: its value head lacks {sorted(lost)}, or has another shape"
            raise ValueError(f"{what}. Ask for a whole package, or pass init_value_head=True to start with a new head.")
        return (model, info) if wants_info else model

    def detach_value_head(self):
        """Stop the value loss's gradient at the head: the body no longer learns from it. Saved with the model."""
        self.config.detach_value_head = True

    detach_head = detach_value_head  # the seed notebook's prose calls it so

    def attach_value_head(self):
        """Let the value loss's gradient reach the body again. Saved with the model."""
        self.config.detach_value_head = False

    def forward(
        self,
        input_ids=None,
        past_key_values=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        return_dict=None,
        score=None,
        **kwargs,
    ):
        """`GPT2LMHeadModel.forward` with its arguments, plus the value of every token.

        Where no `position_ids` are given, they count the tokens that a 2-D `attention_mask` admits, cached ones too:
        padding on either side changes nothing. `score` is the `ScoreRequest` of `rescore`, answered without dropout.

        Returns a `GPT2ValueOutput`, or its tuple when `return_dict` (argument, else config) is False. Raises TypeError
        for an argument that this model cannot honour, ValueError for a mask that leaves out the cache or the input.
        """
        if "lm_labels" in kwargs:  # the seed's word
            if labels is not None:
                raise TypeError("Got both labels and lm_labels, two names of one argument: pass labels alone.")
            labels = kwargs.pop("lm_labels")
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        for name in kwargs:
            if name not in PASSED_ON.split() and not (name == "head_mask" and TAKES_HEAD_MASK):
                why = "transformers 5 removed it" if name == "head_mask" else "it is no argument of this model"
                raise TypeError(f"{type(self).__name__}.forward() cannot honour {name}: {why}. Leave it out.")
        given = inputs_embeds if input_ids is None else input_ids  # neither: GPT2Model says what is missing
        if position_ids is None and given is not None and attention_mask is not None and attention_mask.dim() == 2:
            tokens = given.shape[1]
            past = past_key_values.get_seq_length() if isinstance(past_key_values, Cache) else None
            if isinstance(past, int) and attention_mask.shape[1] != past + tokens:
                what = f"attention_mask has {attention_mask.shape[1]} columns; expected {past + tokens}"
                raise ValueError(f"{what}, {past} of the cache and {tokens} of the input: pass the whole sequence's.")
            position_ids = positions(attention_mask)[:, -tokens:]

        layers = self.transformer, self.lm_head, self.v_head
        if score is not None:
            layers = tuple(without_dropout(layer, checkpointing=True) for layer in layers)
        transformer, lm_head, v_head = layers
        kwargs |= {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "token_type_ids": token_type_ids}
        kwargs |= {"attention_mask": attention_mask, "position_ids": position_ids, "past_key_values": past_key_values}
        kwargs |= {"encoder_hidden_states": encoder_hidden_states, "encoder_attention_mask": encoder_attention_mask}
        body = transformer(**kwargs, use_cache=use_cache, return_dict=True)
        hidden_states = body.last_hidden_state  # [batch, tokens, n_embd]
        # Read from the model's config at each call: it is the one that is saved, and peft copies the head.
        value = v_head(hidden_states.detach() if self.config.detach_value_head else hidden_states).squeeze(-1)
        if score is not None:
            return dict(score.answer(hidden_states, lm_head, as_scalars(value)))
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = lm_head(hidden_states[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, num_items_in_batch=num_items_in_batch)
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                loss = loss + 0.0 * value.sum()  # DistributedDataParallel waits for a gradient of every parameter
        extras = body.past_key_values, body.hidden_states, body.attentions, body.cross_attentions
        output = GPT2ValueOutput(loss, logits, *extras, value)
        if return_dict is None:
            return_dict = self.config.return_dict if self.returns_dict is None else self.returns_dict
        return output if return_dict else output.to_tuple()

    own_forward = forward  # tells a subclass that overrides forward: it is sampled and scored by its own logits


class GPT2HeadWithValueModel(GPT2ValueModel):
    """The seed notebook's model: a tuple `(logits, past_key_values, ..., value)`; its head starts as GPT-2's layers."""

    returns_dict = False
    head_std = "initializer_range"
