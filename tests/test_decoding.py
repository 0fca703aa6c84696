"""Both decoders give the same numbers, and the fast one is chosen only where it may be."""

import pytest
import torch
from conftest import make_tiny_model
from torch import nn

import generation_gpt2_value
from decoding_gpt2_value import Decoder, GPT2Decoder, decoder_for
from generation_gpt2_value import rescore, rollout

RAGGED = [torch.tensor(prompt) for prompt in ([5, 17, 3], [80], [41, 9, 7, 2, 64], [33, 12])]
EOS = [1, 2, 3, 4, 5, 6, 7, 8]


def decoder_of(model):
    tokens = torch.zeros((2, 5), dtype=torch.long)
    return type(decoder_for(model, tokens, torch.ones_like(tokens)))


class WithoutPacking(GPT2Decoder):
    def __init__(self, *args):
        super().__init__(*args)
        self.product_dtype = None


@pytest.mark.parametrize("fields", [{}, {"activation_function": "relu"}, {"n_inner": 48}])
@pytest.mark.parametrize("decoder", [GPT2Decoder, WithoutPacking])
def test_every_decoder_gives_the_same_rollout(decoder, fields, monkeypatch):
    model = make_tiny_model(**fields)
    assert decoder_of(model) is GPT2Decoder
    rollouts = []
    for kind in (Decoder, decoder):
        monkeypatch.setattr(generation_gpt2_value, "decoder_for", kind)
        seeded = torch.Generator().manual_seed(0)
        rollouts.append(rollout(model, RAGGED * 3, max_new_tokens=14, eos_token_id=EOS, generator=seeded))
    plain, fast = rollouts
    assert torch.equal(fast.sequences, plain.sequences)
    torch.testing.assert_close(fast.logprobs, plain.logprobs, atol=1e-5, rtol=0)
    torch.testing.assert_close(fast.values, plain.values, atol=1e-5, rtol=0)
    torch.testing.assert_close(rescore(model, fast).logprobs, fast.logprobs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("decoder", [Decoder, GPT2Decoder])
def test_rows_that_have_ended_are_left_out_and_change_nothing(decoder, monkeypatch):
    model = make_tiny_model()
    sizes = []

    class Watched(decoder):
        def logits_and_values(self, columns):
            logits, values = super().logits_and_values(columns)
            sizes.append(len(logits))
            return logits, values

    class WithEveryRow(decoder):
        def keep(self, rows):
            return False

    rollouts = []
    for kind in (Watched, WithEveryRow):
        monkeypatch.setattr(generation_gpt2_value, "decoder_for", kind)
        seeded = torch.Generator().manual_seed(1)
        rollouts.append(rollout(model, RAGGED * 8, max_new_tokens=30, eos_token_id=EOS, top_p=0.95, generator=seeded))
    assert sizes[0] == 32
    assert sizes[-1] <= 16
    for name in ("sequences", "response_mask", "truncated"):
        assert torch.equal(getattr(rollouts[0], name), getattr(rollouts[1], name))
    torch.testing.assert_close(rollouts[0].logprobs, rollouts[1].logprobs, atol=1e-5, rtol=0)
    torch.testing.assert_close(rescore(model, rollouts[0]).values, rollouts[0].values, atol=1e-5, rtol=0)


def test_a_rollout_after_a_training_step_uses_the_new_weights():
    model = make_tiny_model()
    model.rollout(RAGGED, max_new_tokens=3)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    drawn = model.rollout(RAGGED, max_new_tokens=10)
    torch.testing.assert_close(rescore(model, drawn).logprobs, drawn.logprobs, atol=1e-5, rtol=0)


def hooked(model):
    model.transformer.h[1].mlp.register_forward_hook(lambda module, args, output: output * 1.5)
    return model


def replaced_forward(model):
    original = model.transformer.ln_f.forward
    model.transformer.ln_f.forward = lambda x: original(x) * 1.5
    return model


def adapted(model):
    class Adapted(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 1.5

    adapter = Adapted(32, 96, bias=False)
    adapter.weight = model.lm_head.weight
    model.lm_head = adapter
    return model


@pytest.mark.parametrize(
    "altered",
    [
        lambda: hooked(make_tiny_model()),
        lambda: replaced_forward(make_tiny_model()),
        lambda: adapted(make_tiny_model()),
        lambda: make_tiny_model(scale_attn_weights=False),
        lambda: make_tiny_model(scale_attn_by_inverse_layer_idx=True),
        lambda: make_tiny_model(reorder_and_upcast_attn=True, attn_implementation="eager"),
    ],
    ids=["hook", "forward", "adapter", "no scaling", "inverse layer scaling", "upcast attention"],
)
def test_a_model_that_computes_something_else_is_decoded_by_its_own_forward(altered):
    model = altered()
    assert decoder_of(model) is Decoder
    drawn = model.rollout(RAGGED, max_new_tokens=10, eos_token_id=None)
    torch.testing.assert_close(rescore(model, drawn).logprobs, drawn.logprobs, atol=1e-5, rtol=0)
    logits = model(drawn.sequences, attention_mask=drawn.attention_mask).logits[:, -11:-1]
    expected = logits.log_softmax(-1).gather(-1, drawn.responses[..., None]).squeeze(-1)
    torch.testing.assert_close(drawn.logprobs, expected, atol=1e-5, rtol=0)


def test_recording_hidden_states_leaves_the_fast_decoder_in_place():
    """transformers 5 keeps its recording hooks installed after a call with output_hidden_states=True."""
    model = make_tiny_model()
    model(RAGGED[0][None], output_hidden_states=True, output_attentions=False)
    assert decoder_of(model) is GPT2Decoder


def test_autocast_is_decoded_by_the_model_s_own_forward():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert decoder_of(make_tiny_model()) is Decoder


def test_bfloat16_rollouts_work():
    model = make_tiny_model().to(torch.bfloat16)
    drawn = model.rollout(RAGGED, max_new_tokens=10)
    assert drawn.logprobs.dtype == drawn.values.dtype == torch.float32
    assert (rescore(model, drawn).logprobs - drawn.logprobs).abs().mean() < 0.05


@pytest.mark.shows("torch.compile", "a compiled model is sampled and scored")
def test_a_compiled_model_can_be_sampled_and_scored():
    model = make_tiny_model()
    compiled = torch.compile(model, backend="eager")
    drawn = rollout(compiled, RAGGED, max_new_tokens=4)
    torch.testing.assert_close(rescore(model, drawn).logprobs, drawn.logprobs, atol=1e-5, rtol=0)
    torch.testing.assert_close(rescore(compiled, drawn).values, drawn.values, atol=1e-5, rtol=0)


def test_what_wraps_a_model_is_refused_with_the_way_out():
    with pytest.raises(TypeError, match=r"DataParallel.*model\.module"):
        rollout(nn.DataParallel(make_tiny_model()), RAGGED)


@pytest.mark.parametrize("fields", [{"summary_use_proj": False}, {"summary_proj_to_labels": False}])
def test_a_head_that_gives_no_scalar_is_refused(fields):
    model = make_tiny_model(**fields)
    with pytest.raises(ValueError, match="one scalar for each token"):
        model.rollout(RAGGED, max_new_tokens=2)
    drawn = make_tiny_model().rollout(RAGGED, max_new_tokens=2)
    with pytest.raises(ValueError, match="one scalar for each token"):
        model.rescore(drawn)
