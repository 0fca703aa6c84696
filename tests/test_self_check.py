"""A rollout checks itself: what a model gives wrongly is never returned, and an honest model is never refused."""

import functools

import pytest
import torch
from conftest import make_tiny_model
from support.families import build
from support.settings import EOS, RAGGED, assert_close, by_hand, covering, of_drawn, own_logits, seeded
from torch import nn
from transformers import GPT2Model
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from generation_gpt2_value import rollout
from scoring_gpt2_value import SelfCheckError

DTYPES = [torch.float32, torch.bfloat16]
in_both_dtypes = pytest.mark.parametrize("dtype", DTYPES)


def draw(model, **settings):
    return rollout(model, RAGGED * 4, generator=seeded(), **{"max_new_tokens": 12, "eos_token_id": EOS, **settings})


# Faults that every call has, whether a rollout or a user makes it


def in_every_call(change):
    def put_into(model, monkeypatch):
        original = GPT2Model.forward

        def forward(self, *args, **kwargs):
            change(kwargs)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(GPT2Model, "forward", functools.wraps(original)(forward))

    return put_into


def spoil_cache(arguments):
    cache = arguments.get("cache") or arguments.get("past_key_values")
    if cache is not None and cache.get_seq_length():
        for layer in cache.layers:
            layer.values = -layer.values


def noise_in_eval_mode(model, monkeypatch):
    model.transformer.h[0].mlp.register_forward_hook(lambda m, a, output: nn.functional.dropout(output, 0.3, True))


FAULTS = {
    "cache": in_every_call(spoil_cache),
    "padding": in_every_call(lambda arguments: arguments.update(attention_mask=None)),  # it is seen
    "positions": in_every_call(lambda arguments: arguments.update(position_ids=None)),  # they count padding, too
    "noise": noise_in_eval_mode,
}


@in_both_dtypes
@pytest.mark.parametrize("fault", FAULTS)
def test_a_model_that_gives_other_numbers_in_a_batch_is_refused_by_name(fault, dtype, monkeypatch):
    model = make_tiny_model(attn_implementation="eager").to(dtype)
    FAULTS[fault](model, monkeypatch)
    draw(model, top_k=1)  # each token is certain, and shows no fault: that tells nothing about other settings
    before = torch.get_rng_state()
    with pytest.raises(SelfCheckError, match=r"GPT2ValueModel.* nats"):
        draw(model)
    assert fault == "noise" or torch.equal(torch.get_rng_state(), before)


def test_settings_of_precision_for_one_kind_of_device_are_taken():
    products = torch.backends.mkldnn.matmul
    products.fp32_precision = "bf16"
    try:
        assert draw(make_tiny_model()).logprobs.any()
    finally:
        products.fp32_precision = "none"


def test_a_fault_that_comes_later_is_found_after_some_rollouts():
    model = make_tiny_model()
    model.register_forward_hook(lambda module, args, output: None)  # it is run by its own calls from the first
    for _ in range(3):
        draw(model)
    noise_in_eval_mode(model, None)
    with pytest.raises(SelfCheckError, match="GPT2ValueModel"):
        all(draw(model) for _ in range(100))


# What changes the model itself changes the rollout


def other_scaling(model, monkeypatch):
    """An attribute of the attention that somebody has set by hand: read by the forward, or by nobody."""
    for block in model.transformer.h:
        block.attn.scaling = 3.0


def other_attention(model, monkeypatch):
    """A function in the place of transformers' own, as kernel libraries register them: heard by every call."""
    own = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def louder(*args, **kwargs):
        output, weights = own(*args, **kwargs)
        return output * 1.5, weights

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", louder)


@in_both_dtypes
@pytest.mark.parametrize("change", [other_scaling, other_attention])
def test_what_changes_the_model_itself_changes_the_rollout(change, dtype, monkeypatch):
    model = make_tiny_model(attn_implementation="sdpa").to(dtype)
    honest = draw(model)
    change(model, monkeypatch)
    drawn = draw(model)
    expected = of_drawn(by_hand(own_logits(model, drawn), drawn.sampling), drawn)
    assert_close(drawn.logprobs, expected, 1e-5 if dtype == torch.float32 else 0.1)
    assert change is other_scaling or not torch.equal(drawn.logprobs, honest.logprobs)


@pytest.mark.parametrize(
    "choice",
    covering(
        family=["gpt2", "llama", "mixtral", "gemma2", "bloom"],
        dtype=[*DTYPES, torch.float16],
        settings=[{}, {"top_k": 5}, {"top_p": 0.8, "temperature": 0.5}, {"temperature": 2.0, "min_new_tokens": 3}],
        ends=[None, EOS],
    ),
    ids=lambda choice: " ".join(map(str, choice.values())),
)
def test_an_honest_model_is_never_refused(choice):
    """A sample; `make families` runs all families."""
    model = build(choice["family"]).to(choice["dtype"])
    settings = {**choice["settings"], "eos_token_id": choice["ends"]}
    if choice["ends"] is None:
        settings.pop("min_new_tokens", None)
    for row_count in (1, 16):
        drawn = rollout(model, (RAGGED * 4)[:row_count], max_new_tokens=10, **settings)
        assert drawn.logprobs.isfinite().all()
