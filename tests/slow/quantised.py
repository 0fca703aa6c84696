"""Models whose weights torchao quantised are sampled and scored as they are, and keep their value head."""

import pytest
import torch
from conftest import make_tiny_model, plain_twin
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_
from transformers import TorchAoConfig

from decoding_gpt2_value import GPT2Decoder, decoder_for
from generation_gpt2_value import rescore, rollout
from modeling_gpt2_value import GPT2ValueModel
from sampling_gpt2_value import sampling_distribution

RAGGED = [torch.tensor(prompt) for prompt in ([5, 17, 3], [80], [41, 9, 7, 2, 64], [33, 12])]
WEIGHTS, BOTH = Int8WeightOnlyConfig(), Int8DynamicActivationInt8WeightConfig()


def quantised(model, config):
    quantize_(model, config)  # in place: every nn.Linear, which here are the output layer and the value head
    assert type(model.lm_head) is torch.nn.Linear
    assert type(model.lm_head.weight) is not torch.nn.Parameter
    return model


# An activation on the border of two 8-bit numbers is rounded one way with a cache, and perhaps the other way without.
@pytest.mark.shows("torchao", "`quantize_`: a rollout equals its rescoring")
@pytest.mark.parametrize(
    ("config", "bound"), [(WEIGHTS, 1e-5), (BOTH, 2e-2)], ids=["weights", "weights and activations"]
)
@pytest.mark.parametrize("plain", [False, True], ids=["GPT2ValueModel", "GPT2LMHeadModel"])
def test_a_layer_of_a_plain_class_with_a_quantised_weight_is_not_read_as_plain(config, bound, plain):
    model = make_tiny_model()
    exact = model.rescore(model.rollout(RAGGED, max_new_tokens=6))
    model = quantised(plain_twin(model) if plain else model, config)
    drawn = rollout(model, RAGGED, max_new_tokens=6, top_k=20, temperature=0.7)
    assert not isinstance(decoder_for(model, drawn.sequences, drawn.attention_mask), GPT2Decoder)
    scored = rescore(model, drawn)
    torch.testing.assert_close(scored.logprobs, drawn.logprobs, atol=bound, rtol=0)
    if not plain:
        torch.testing.assert_close(scored.values, drawn.values, atol=bound, rtol=0)
        assert not torch.equal(rescore(model, model.rollout(RAGGED, max_new_tokens=6)).values, exact.values)
    # and by hand, from what the quantised model itself answers
    logits = model(drawn.sequences, attention_mask=drawn.attention_mask, position_ids=positions(drawn)).logits[:, -7:-1]
    by_hand = sampling_distribution(logits, drawn.sampling, kept=drawn.kept).log_softmax(-1)
    by_hand = by_hand.gather(-1, drawn.responses[..., None])[..., 0]
    torch.testing.assert_close(drawn.logprobs, by_hand, atol=bound, rtol=0)


def positions(drawn):
    return (drawn.attention_mask.cumsum(-1) - 1).clamp(min=0)


@pytest.mark.shows("torchao", "gradients pass a quantised output layer")
def test_a_quantised_output_layer_lets_gradients_reach_the_body():
    model = quantised(make_tiny_model(), WEIGHTS)
    rescore(model, rollout(model, RAGGED, max_new_tokens=4)).logprobs.sum().backward()
    assert model.transformer.h[0].attn.c_attn.weight.grad.abs().sum() > 0


@pytest.mark.shows("torchao", "`TorchAoConfig` leaves the value head as it is")
def test_a_quantisation_config_does_not_quantise_the_value_head(saved):
    """It takes nn.Linear only, GPT-2's layers are Conv1D, and output layers are left out: nothing else would be."""
    model = GPT2ValueModel.from_pretrained(saved, quantization_config=TorchAoConfig(WEIGHTS))
    exact = GPT2ValueModel.from_pretrained(saved)
    for name, weight in model.named_parameters():
        assert type(weight) is torch.nn.Parameter, name
        assert torch.equal(weight, exact.get_parameter(name)), name
    drawn = rollout(exact, RAGGED, max_new_tokens=6)
    assert torch.equal(rescore(model, drawn).values, rescore(exact, drawn).values)


def test_a_quantisation_config_keeps_a_head_without_weights_loadable(tmp_path):
    make_tiny_model(summary_use_proj=False).save_pretrained(tmp_path)
    model = GPT2ValueModel.from_pretrained(tmp_path, quantization_config=TorchAoConfig(WEIGHTS))
    assert model(torch.tensor([[1, 2]])).value.shape == (1, 2, 32)
