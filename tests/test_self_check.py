"""A rollout checks itself: what a model gives wrongly is never returned, and an honest model is never refused."""

import contextlib
import functools

import pytest
import torch
from conftest import make_tiny_model
from support.families import build
from support.settings import EOS, RAGGED, covering, seeded
from torch import nn
from transformers import GPT2LMHeadModel, GPT2Model
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from generation_gpt2_value import SelfCheckError, rollout

DTYPES = [torch.float32, torch.bfloat16]


def in_every_call(change, monkeypatch):
    """`change(module, arguments)` of every call of GPT-2's body, by which rollouts and users run it."""
    original = GPT2Model.forward

    def forward(self, *args, **kwargs):
        change(self, kwargs)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(GPT2Model, "forward", functools.wraps(original)(forward))


def cache_in(arguments):
    return arguments.get("cache") if arguments.get("cache") is not None else arguments.get("past_key_values")


def wrong_cache(model, monkeypatch):
    """A cache whose keys are those of other rows."""

    def change(body, arguments):
        cache = cache_in(arguments)
        if cache is not None and cache.get_seq_length():
            for layer in cache.layers:
                layer.keys = layer.keys.roll(1, 0)

    in_every_call(change, monkeypatch)


def wrong_padding(model, monkeypatch):
    """Padding that is seen."""
    in_every_call(lambda body, arguments: arguments.update(attention_mask=None), monkeypatch)


def wrong_positions(model, monkeypatch):
    """Positions that count the columns, padding included."""
    in_every_call(lambda body, arguments: arguments.update(position_ids=None), monkeypatch)


def noise_in_eval_mode(model, monkeypatch):
    """Dropout that nobody can switch off."""
    model.transformer.h[0].mlp.register_forward_hook(lambda m, a, output: nn.functional.dropout(output, 0.3, True))


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


def draw(model, **settings):
    settings = {"max_new_tokens": 12, "eos_token_id": EOS, **settings}
    return rollout(model, RAGGED * 4, generator=seeded(), **settings)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fault", [wrong_cache, wrong_padding, wrong_positions, noise_in_eval_mode])
def test_a_model_that_gives_other_numbers_in_a_batch_is_refused_by_name(fault, dtype, monkeypatch):
    model = make_tiny_model(attn_implementation="eager").to(dtype)
    draw(model)  # as it was, it passed
    fault(model, monkeypatch)
    before = torch.get_rng_state()
    with pytest.raises(SelfCheckError, match=r"GPT2ValueModel.* nats"):
        draw(model)
    if fault is not noise_in_eval_mode:
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("change", [other_scaling, other_attention])
def test_what_changes_the_model_itself_changes_the_rollout_or_is_refused(change, dtype, monkeypatch):
    model = make_tiny_model(attn_implementation="sdpa").to(dtype)
    honest = draw(model)
    change(model, monkeypatch)
    drawn = None
    with contextlib.suppress(SelfCheckError):  # transformers 4 has no such attribute
        drawn = draw(model)
    assert drawn is not None or change is other_scaling
    for row in range(0 if drawn is None else 4):
        tokens = drawn.sequences[row][drawn.attention_mask[row].bool()][None]
        length = int(drawn.response_mask[row].sum())
        logprobs = model(tokens).logits[0, -length - 1 : -1].float().log_softmax(-1)
        expected = logprobs.gather(-1, tokens[0, -length:, None])[:, 0]
        bound = 1e-5 if dtype == torch.float32 else 0.1
        torch.testing.assert_close(drawn.logprobs[row, :length], expected, atol=bound, rtol=0)
    assert change is other_scaling or not torch.equal(drawn.logprobs, honest.logprobs)


def test_a_fault_that_comes_later_is_found_when_the_settings_change_or_after_some_rollouts(monkeypatch):
    model = make_tiny_model(attn_implementation="eager")
    for _ in range(3):
        draw(model)
    wrong_padding(model, monkeypatch)
    with pytest.raises(SelfCheckError, match="GPT2ValueModel"):
        all(draw(model) for _ in range(100))


def test_a_subclass_whose_cache_is_wrong_is_refused_however_long_it_was_right(monkeypatch):
    class Forgets(GPT2LMHeadModel):
        """With a cache, it sees the newest token alone."""

        def forward(self, *args, **kwargs):
            cache = cache_in(kwargs)
            if cache is not None and cache.get_seq_length():
                for layer in cache.layers:
                    layer.values = layer.values * 0
            return super().forward(*args, **kwargs)

    for dtype in DTYPES:
        model = make_tiny_model().to(dtype)
        forgets = Forgets(model.config).to(dtype).eval()
        forgets.load_state_dict({k: w for k, w in model.state_dict().items() if not k.startswith("v_head.")})
        with pytest.raises(SelfCheckError, match="Forgets"):
            draw(forgets)


@pytest.mark.parametrize(
    "choice",
    covering(
        family=["gpt2", "llama", "mixtral", "gemma2", "bloom"],
        dtype=[torch.float32, torch.bfloat16, torch.float16],
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
