"""The fields of the config: kept by saving and loading, and checked when a config is built."""

import json

import pytest
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import AutoConfig, GPT2Config

from configuration_gpt2_value import AUTO_MAP, GPT2ValueConfig


def test_the_defaults_are_gpt2s_and_the_heads():
    config, gpt2 = GPT2ValueConfig(), GPT2Config()
    assert (config.model_type, config.num_labels) == ("gpt2_value", 1)
    assert config.summary_last_dropout == 0.0
    assert config.detach_value_head is False
    assert config.value_head_initializer_range == 0.0
    for name in ("n_embd", "n_layer", "vocab_size", "summary_first_dropout", "summary_type", "summary_use_proj"):
        assert getattr(config, name) == getattr(gpt2, name)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n_embd", 30),
        ("n_layer", 0),
        ("n_positions", -1),
        ("vocab_size", 2.5),
        ("n_inner", 0),
        ("resid_pdrop", 1.5),
        ("attn_pdrop", float("nan")),
        ("summary_first_dropout", -0.1),
        ("summary_last_dropout", 1.0),
        ("summary_activation", "relu"),
        ("summary_type", "attn"),
        ("summary_type", "middle"),
        ("summary_use_proj", "yes"),
        ("num_labels", 2),
        ("detach_value_head", 1),
        ("value_head_initializer_range", -1.0),
        ("value_head_initializer_range", "0.1"),
        ("layer_norm_epsilon", 0.0),
    ],
)
def test_a_bad_field_is_refused_by_name(field, value):
    with pytest.raises((ValueError, StrictDataclassFieldValidationError), match=field):
        GPT2ValueConfig(**{"n_head": 4, "n_embd": 32, field: value})


def test_the_attention_summary_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="attention layer of its own"):
        GPT2ValueConfig(summary_type="attn")


def test_every_field_survives_save_and_load(tmp_path):
    config = GPT2ValueConfig(
        n_layer=3,
        summary_activation="tanh",
        summary_last_dropout=0.25,
        detach_value_head=True,
        value_head_initializer_range=0.1,
        n_ctx=1024,
    )
    config.save_pretrained(tmp_path)
    for loaded in (
        GPT2ValueConfig.from_pretrained(tmp_path),
        AutoConfig.from_pretrained(tmp_path, trust_remote_code=True),
    ):
        for name in ("n_layer", "summary_activation", "summary_last_dropout", "detach_value_head", "num_labels"):
            assert getattr(loaded, name) == getattr(config, name)
        assert loaded.value_head_initializer_range == 0.1
        assert loaded.n_ctx == 1024


def test_a_saved_config_names_the_classes_beside_it(tmp_path):
    config = GPT2ValueConfig()
    config.auto_map = {"AutoConfig": "somebody/else--configuration_gpt2_value.GPT2ValueConfig"}
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP
    for reference in AUTO_MAP.values():
        assert (tmp_path / f"{reference.split('.')[0]}.py").is_file()


def test_a_plain_gpt2_config_loses_only_what_says_which_class_it_is_for(tmp_path):
    plain = GPT2Config(n_layer=3, resid_pdrop=0.0, task_specific_params={"text-generation": {"do_sample": True}})
    plain.save_pretrained(tmp_path)
    for config in (GPT2ValueConfig.from_pretrained(tmp_path), GPT2ValueConfig.from_gpt2(plain)):
        assert config.num_labels == 1
        assert config.n_layer == 3
        assert config.resid_pdrop == 0.0
        assert config.task_specific_params == plain.task_specific_params


def test_a_config_of_another_architecture_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 32}))
    with pytest.raises(ValueError, match="type 'llama'; expected 'gpt2' or 'gpt2_value'"):
        GPT2ValueConfig.from_pretrained(tmp_path)
