"""`export_critic`: classifiers of transformers that other trainers read, with the model's own values."""

import json

import pytest
import torch
from conftest import make_tiny_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
)

from hub_tools import convert_checkpoint, errors, export_critic, save_package
from modeling_gpt2_value import GPT2ValueModel

TOKENS = torch.tensor([[0, 0, 5, 7, 11, 13, 17], [3, 1, 4, 1, 5, 9, 2]])
MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
POSITIONS = (MASK.cumsum(-1) - 1).clamp(min=0)


def model_with_bias(**fields):
    model = make_tiny_model(**fields)
    with torch.no_grad():
        model.v_head.summary.bias.fill_(-1.7)
    return model


@torch.no_grad()
def values_of(model):
    return model.eval()(TOKENS, attention_mask=MASK).value


@torch.no_grad()
def read_as_verl_does(folder):
    """`DataParallelPPOCritic`: one logit a token; flash attention's sharding asks for the number of key-value heads."""
    critic = AutoModelForTokenClassification.from_pretrained(folder).eval()
    assert type(critic) is GPT2ForTokenClassification
    assert critic.config.num_key_value_heads == critic.config.num_attention_heads
    return critic(TOKENS, attention_mask=MASK, position_ids=POSITIONS).logits.squeeze(-1)


@torch.no_grad()
def read_as_trl_and_openrlhf_do(folder):
    """TRL's `get_reward`: the body is the attribute `base_model_prefix`, `score` is applied to its last states."""
    critic = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).eval()
    assert type(critic) is GPT2ForSequenceClassification
    body = getattr(critic, critic.base_model_prefix)
    output = body(
        input_ids=TOKENS, attention_mask=MASK, position_ids=POSITIONS, output_hidden_states=True, use_cache=False
    )
    return critic.score(output.hidden_states[-1]).squeeze(-1)


READERS = {"token-classification": read_as_verl_does, "sequence-classification": read_as_trl_and_openrlhf_do}


@pytest.mark.shows("verl, OpenRLHF, TRL", "`export_critic`: values as their code reads them")
@pytest.mark.parametrize("head", READERS)
@pytest.mark.parametrize("source", ["model", "package"])
def test_other_trainers_read_the_model_s_own_values(head, source, tmp_path, tiny_tokenizer):
    model = model_with_bias()
    expected, before = values_of(model), {name: w.clone() for name, w in model.state_dict().items()}
    if source == "package":
        save_package(model, tmp_path / "package", tiny_tokenizer)
    exported = export_critic(model if source == "model" else tmp_path / "package", tmp_path / "critic", head=head)
    assert exported.architecture.startswith("GPT2For")
    assert (exported.tokenizer is None) == (source == "model")
    found = READERS[head](tmp_path / "critic")
    torch.testing.assert_close(found[MASK == 1], expected[MASK == 1], atol=1e-6, rtol=1e-6)
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())
    fields = json.loads((tmp_path / "critic" / "config.json").read_text())
    assert "auto_map" not in fields
    assert fields["model_type"] == "gpt2"


@pytest.mark.parametrize("head", READERS)
def test_a_head_that_starts_at_zero_is_exported(head, tmp_path):
    export_critic(make_tiny_model(value_head_initializer_range=0.0), tmp_path / "critic", head=head)
    assert not READERS[head](tmp_path / "critic").any()


@pytest.mark.shows("verl, OpenRLHF, TRL", "an exported critic becomes a package again")
@pytest.mark.parametrize("head", READERS)
def test_a_critic_comes_back(head, tmp_path):
    model = model_with_bias()
    export_critic(model, tmp_path / "critic", head=head)
    convert_checkpoint(tmp_path / "critic", tmp_path / "back")
    back = GPT2ValueModel.from_pretrained(tmp_path / "back")
    torch.testing.assert_close(values_of(back), values_of(model), atol=2e-6, rtol=1e-6)


def test_a_bfloat16_critic_keeps_its_type(tmp_path):
    model = model_with_bias().to(torch.bfloat16)
    for head, reader in READERS.items():
        assert export_critic(model, tmp_path / head, head=head).dtype == torch.bfloat16
        found = reader(tmp_path / head).float()
        torch.testing.assert_close(found[MASK == 1], values_of(model)[MASK == 1], atol=0.1, rtol=0.05)


def test_what_a_classifier_cannot_express_is_refused(tmp_path):
    for fields in ({"summary_activation": "tanh"}, {"summary_use_proj": False}, {"summary_proj_to_labels": False}):
        with pytest.raises(errors.ConversionError, match="one linear layer"):
            export_critic(make_tiny_model(**fields), tmp_path / "critic")
    model = model_with_bias(value_head_initializer_range=0.0)
    with pytest.raises(errors.ConversionError, match="score has no bias"):
        export_critic(model, tmp_path / "critic", head="sequence-classification")
    export_critic(model, tmp_path / "constant")
    assert (read_as_verl_does(tmp_path / "constant") == -1.7).all()
    with pytest.raises(errors.OptionsError, match="token-classification or sequence-classification"):
        export_critic(model, tmp_path / "critic", head="regression")
    with pytest.raises(errors.UnsavableModelError, match="GPT2ForTokenClassification"):
        export_critic(GPT2ForTokenClassification.from_pretrained(tmp_path / "constant"), tmp_path / "critic")
    assert not (tmp_path / "critic").exists()


def test_the_command_exports_a_critic(gpt2_value, tmp_path):
    save_package(model_with_bias(), tmp_path / "package")
    for head, reader in READERS.items():
        status, out, _ = gpt2_value("export", tmp_path / "package", tmp_path / head, "--as", head)
        assert status == 0
        assert "GPT2For" in out
        assert reader(tmp_path / head).any()
    status, _, err = gpt2_value("export", tmp_path / "package", tmp_path / "x", "--as", "reward")
    assert status == 2
    assert "token-classification" in err
