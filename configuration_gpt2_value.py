"""Configuration of a GPT-2 with a value head: GPT-2's own fields plus those of the head, checked when built.

This is the first of the six files that are copied into every package (the remote code). Read them in this order:

    configuration_   GPT2ValueConfig: the fields of the head
    sampling_        Sampling, and logits -> distribution -> draw; float32 at least, sums in float64
    decoding_        running any causal LM as it is scored: its own forward; on a CPU, GPT-2 with faster linear layers
    scoring_         rescore, and the check of a rollout or a score against one row alone, at every 16th call
    generation_      rollout and its record, Rollout
    modeling_        ValueHead (float32), GPT2ValueModel, GPT2HeadWithValueModel

    rollout ─ Decoder.logits_and_values                  logits [b, V] in the model's dtype, values [b] float32
       │      sampling_distribution                      [b, V] float32: temperature, top-k, top-p, minimum length
       │      draw                                       tokens [b] int64, log-probabilities [b] float32
       └───── check_itself ─ logits_alone                one row by the model's own call
    rescore ─ call_with                                  a copy of the model, with _scores where its output layer stands
       │      _scores ─ _score_chunk                     logits [n, V] ─ sampling_distribution ─ log_softmax: float32
       └───── check_itself

(float32 is float64 for a model of that dtype.)

What touches anything outside: `to_json_file` (below), which `save_pretrained` calls, writes `config.json` and copies
these files beside it; `from_pretrained` (modeling) reads a checkpoint through transformers, which may download it. On
import, modeling adds two names to a registry of transformers, generation two classes to torch's safe globals; both say
why. A rollout takes random numbers from the generator, and under FSDP2 calls wait for other processes. Scoring counts
each model's calls beside it. `detach_value_head` sets a field of the config, `reference="disable_adapter"` switches a
PeftModel's adapter off and on. Nothing else is written: no file, no network, no other module, no state of a model.

This file imports only the standard library and transformers.
"""

import contextlib
import shutil
from pathlib import Path

from transformers import GPT2Config

# What transformers reads in `config.json` to find the classes of a package.
AUTO_MAP = {
    "AutoConfig": "configuration_gpt2_value.GPT2ValueConfig",
    "AutoModel": "modeling_gpt2_value.GPT2ValueModel",
    "AutoModelForCausalLM": "modeling_gpt2_value.GPT2ValueModel",
}

# What the head's fields may be: a value is one number for each token, and no head has attention layers of its own.
CHOICES: dict = {
    "num_labels": [1],
    "summary_type": ["cls_index", "first", "last", "mean"],
    "summary_activation": [None, "tanh"],
    "summary_use_proj": [True, False],
    "summary_proj_to_labels": [True, False],
    "detach_value_head": [True, False],
}


class GPT2ValueConfig(GPT2Config):
    """Everything that `GPT2Config` takes, and the value head.

    Args:
        num_labels (`int`, defaults to 1): outputs of the head's projection. A value is a scalar: only 1 is accepted.
        summary_type (`str`, defaults to `"cls_index"`): GPT-2's field, unused here; `"attn"` is refused as there.
        summary_use_proj (`bool`, defaults to `True`): project the hidden state. If `False` the head has no weights.
        summary_proj_to_labels (`bool`, defaults to `True`): project to `num_labels`, else to `n_embd`. If either of the
            two is `False`, `value` is `[batch, tokens, n_embd]`, which `rollout` and `rescore` refuse.
        summary_activation (`str`, *optional*): `"tanh"`, or `None` for no activation.
        summary_first_dropout (`float`, defaults to 0.1): dropout before the projection, in training mode.
        summary_last_dropout (`float`, defaults to 0.0): dropout after the activation, in training mode.
        detach_value_head (`bool`, defaults to `False`): stop the value loss's gradient at the head.
        value_head_initializer_range (`float`, defaults to 0.0): std of the projection's initial weights. 0 starts every
            value at exactly 0 ("The N Implementation Details of RLHF with PPO", Huang et al., 2023).

    Raises ValueError where a field in `CHOICES` has another value. torch checks numbers when a model is built,
    transformers GPT-2's own fields.
    """

    model_type = "gpt2_value"
    keys_to_ignore_at_inference = ["cache", "past_key_values", "value"]  # Trainer's predictions are the logits

    def __init__(
        self, *, summary_last_dropout=0.0, detach_value_head=False, value_head_initializer_range=0.0, **kwargs
    ):
        super().__init__(**{"num_labels": 1, **kwargs})
        self.summary_last_dropout = summary_last_dropout
        self.detach_value_head = detach_value_head
        self.value_head_initializer_range = value_head_initializer_range

        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"GPT2ValueConfig: {name}={getattr(self, name)!r}; expected one of {allowed}.")

    @classmethod
    def from_gpt2(cls, config):
        """A `GPT2ValueConfig` for the body that a plain `GPT2Config` describes, without a classifier's labels."""
        # `to_dict` leaves out how attention is computed.
        return cls(**_as_value_fields(config.to_dict()), attn_implementation=config._attn_implementation)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """The fields in `config.json`, of a package or of a plain GPT-2 checkpoint, and the unused `kwargs`."""
        fields, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        model_type = fields.get("model_type", GPT2Config.model_type)
        if model_type not in (cls.model_type, GPT2Config.model_type):
            raise ValueError(
                f"{pretrained_model_name_or_path} is a checkpoint of type {model_type!r}; expected 'gpt2' or "
                f"{cls.model_type!r}. Pass a GPT-2 checkpoint or a package of this model."
            )
        return (fields if model_type == cls.model_type else _as_value_fields(fields)), unused

    def to_dict(self):
        """The fields, for `config.json`. The classes are always the ones beside it, never another repository's."""
        return {**super().to_dict(), "auto_map": dict(AUTO_MAP)}

    def to_json_file(self, json_file_path, *args, **kwargs):
        """Write `config.json`, and beside it the code that it names, so that the folder is complete by itself."""
        for file in Path(__file__).parent.glob("*_gpt2_value.py"):
            with contextlib.suppress(shutil.SameFileError):  # this file is in the folder
                shutil.copyfile(file, Path(json_file_path).parent / file.name)
        super().to_json_file(json_file_path, *args, **kwargs)


def _as_value_fields(gpt2_fields):
    """Plain GPT-2 fields without those that say which class they are for, or that describe a classifier's labels."""
    dropped = ("model_type", "auto_map", "num_labels", "id2label", "label2id", "transformers_version")
    return {name: value for name, value in gpt2_fields.items() if name not in dropped}
