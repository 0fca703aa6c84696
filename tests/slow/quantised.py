"""Models whose weights torchao quantised are sampled and scored as they are, and keep their value head."""

import pytest
import torch
from conftest import make_tiny_model, plain_twin
from support.settings import RAGGED, assert_as_drawn, assert_close, by_hand, of_drawn, own_logits
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import TorchAoConfig

from gpt2_value import GPT2ValueModel, rescore, rollout

WEIGHTS = Int8WeightOnlyConfig()


@pytest.mark.parametrize("plain", [False, True], ids=["GPT2ValueModel", "GPT2LMHeadModel"])
def test_a_layer_of_a_plain_class_with_a_quantised_weight_is_not_read_as_plain(plain):
    exact = make_tiny_model()
    model = plain_twin(exact) if plain else make_tiny_model()
    quantize_(model, WEIGHTS)  # in place: every nn.Linear, which here is the output layer
    assert type(model.lm_head) is torch.nn.Linear
    assert type(model.lm_head.weight) is not torch.nn.Parameter
    drawn = rollout(model, RAGGED, max_new_tokens=6, top_k=20, temperature=0.7)
    scored = rescore(model, drawn)
    assert_as_drawn(scored, drawn)
    assert not torch.equal(scored.logprobs, rescore(exact, drawn).logprobs)
    assert_close(drawn.logprobs, of_drawn(by_hand(own_logits(model, drawn), drawn.sampling), drawn))
    scored.logprobs.sum().backward()
    assert model.transformer.h[0].attn.c_attn.weight.grad.abs().sum() > 0


def test_a_quantisation_config_does_not_quantise_the_value_head(saved):
    """It takes nn.Linear only, GPT-2's layers are Conv1D, and output layers are left out: nothing else would be."""
    model = GPT2ValueModel.from_pretrained(saved, quantization_config=TorchAoConfig(WEIGHTS))
    exact = GPT2ValueModel.from_pretrained(saved)
    for name, weight in model.named_parameters():
        assert type(weight) is torch.nn.Parameter, name
        assert torch.equal(weight, exact.get_parameter(name)), name
    drawn = rollout(exact, RAGGED, max_new_tokens=6)
    assert_as_drawn(rescore(model, drawn), rescore(exact, drawn), 0)


def test_a_quantisation_config_keeps_a_head_without_weights_loadable(tmp_path):
    make_tiny_model(summary_use_proj=False).save_pretrained(tmp_path)
    model = GPT2ValueModel.from_pretrained(tmp_path, quantization_config=TorchAoConfig(WEIGHTS))
    assert model(torch.tensor([[1, 2]])).value.shape == (1, 2, 32)
