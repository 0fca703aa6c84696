"""A drawn token is scored over the set that it was drawn from, whoever scores it.

That is: by the model that drew it, a policy that has learnt since, a reference, in another dtype, wrapped, hooked, or
overridden. A rollout that does not fit together is not scored.
"""

import copy
import dataclasses
import functools
import math

import pytest
import torch
import transformers
from conftest import make_tiny_model, plain_twin
from support.settings import (
    EOS,
    RAGGED,
    SETTINGS,
    assert_as_drawn,
    assert_close,
    by_hand,
    covering,
    of_drawn,
    own_logits,
    seeded,
)
from torch import nn
from transformers.models.gpt2 import modeling_gpt2

from gpt2_value import rescore, rollout

PDROPS = ("resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_first_dropout", "summary_last_dropout")


def make_policy(**fields):
    return make_tiny_model(n_embd=48, vocab_size=300, **fields)


def draw(model, settings=SETTINGS[0]):
    return rollout(model, RAGGED, max_new_tokens=16, num_return_sequences=12, generator=seeded(), **settings)


# rollout = rescore


@pytest.mark.parametrize(
    "choice",
    covering(
        temperature=[1.0, 0.3, 2.0],
        top_k=[0, 1, 10, 500],
        top_p=[1.0, 0.9, 0.3],
        min_new_tokens=[0, 5],
        eos_token_id=[None, EOS],
        training=[True, False],
        dropout=[0.0, 0.5],
    ),
    ids=lambda choice: " ".join(map(str, choice.values())),
)
def test_rescoring_gives_the_rollout_back(choice):
    """Every pair of settings occurs, in train and eval mode, with and without dropout in the config."""
    training, dropout = choice.pop("training"), choice.pop("dropout")
    if choice["eos_token_id"] is None:
        choice["min_new_tokens"] = 0
    model = make_tiny_model(**dict.fromkeys(PDROPS, dropout)).train(training)
    drawn = model.rollout(RAGGED, max_new_tokens=12, num_return_sequences=3, **choice)
    assert_as_drawn(model.rescore(drawn), drawn)
    assert model.training == training
    assert_as_drawn(model.train(not training).rescore(drawn), drawn)


def test_nothing_of_the_checkpoints_generation_config_reaches_a_rollout():
    model = make_tiny_model()
    expected = model.rollout(RAGGED, max_new_tokens=10, generator=seeded())
    hostile = {"do_sample": True, "temperature": 0.01, "top_k": 1, "top_p": 0.1, "repetition_penalty": 5.0}
    hostile |= {"no_repeat_ngram_size": 1, "min_new_tokens": 9, "max_new_tokens": 2, "eos_token_id": [*range(90)]}
    model.generation_config.update(**hostile, pad_token_id=3, suppress_tokens=[*range(50)], forced_eos_token_id=77)
    drawn = model.rollout(RAGGED, max_new_tokens=10, generator=seeded())
    assert torch.equal(drawn.sequences, expected.sequences)
    assert_as_drawn(rescore(model, drawn), drawn)


def test_log_probabilities_are_those_of_a_plain_forward_pass():
    """A computation that shares no code with the sampler: GPT-2 itself, one row at a time, without padding or cache."""
    model = make_tiny_model()
    twin = plain_twin(model)
    drawn = model.rollout(RAGGED, max_new_tokens=10, temperature=0.7, eos_token_id=None)
    for row, prompt in enumerate(RAGGED):
        tokens, before = torch.cat([prompt, drawn.responses[row]])[None], slice(len(prompt) - 1, -1)
        expected = by_hand(twin(tokens).logits[:, before], drawn.sampling)
        assert_close(drawn.logprobs[[row]], of_drawn(expected, drawn[[row]]))
        assert_close(drawn.values[row], model(tokens).value[0, before])


@pytest.mark.parametrize("fields", [{}, {"activation_function": "relu"}], ids=str)
def test_fast_products_change_no_number_and_rows_that_have_ended_are_left_out(fields, monkeypatch):
    model, sizes = make_tiny_model(**fields), []

    def count(module, args, arguments):
        sizes.append(len(arguments["input_ids"]))

    model.transformer.register_forward_pre_hook(count, with_kwargs=True)
    settings = {"max_new_tokens": 30, "eos_token_id": EOS}
    fast = rollout(model, RAGGED * 8, generator=seeded(1), **settings)
    assert sizes.count(32) < 20
    assert min(sizes[1:]) <= 16
    monkeypatch.setattr("decoding_gpt2_value.speed_up", lambda *_: None)  # torch multiplies
    slow = rollout(model, RAGGED * 8, generator=seeded(1), **settings)
    for name in ("sequences", "response_mask", "truncated"):
        assert torch.equal(getattr(fast, name), getattr(slow, name))
    assert_as_drawn(fast, slow)
    assert_as_drawn(rescore(model, fast), fast)


# Another policy, another dtype


def learn(model, drawn, steps=4):
    """Some steps of a policy gradient, after which the model ranks the tokens otherwise."""
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    advantages = torch.randn(drawn.logprobs.shape)
    for _ in range(steps):
        scored = rescore(model, drawn)
        (-(scored.logprobs * advantages).sum(1).mean() + scored.values.pow(2).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_scored_over_the_same_sets(scored, drawn):
    """No drawn token is impossible, the KL is finite, the mean importance ratio is 1 within five standard errors."""
    mask = drawn.response_mask
    assert torch.isfinite(scored.logprobs).all()
    assert (scored.logprobs[mask] <= 1e-6).all()
    assert scored.entropy.isfinite().all()
    assert scored.kl is None or (scored.kl.isfinite() & (scored.kl > -1e-4)).all()
    ratios = (scored.logprobs - drawn.logprobs)[mask].double().exp()
    assert abs(ratios.mean() - 1) < 5 * ratios.std() / math.sqrt(len(ratios)) + 1e-5


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_policy_that_has_learnt_since_and_another_model(settings):
    model, reference = make_policy(), plain_twin(make_policy())
    drawn = draw(model, settings)
    learn(model, drawn)
    scored = rescore(model, drawn, with_entropy=True, reference=reference)
    assert_scored_over_the_same_sets(scored, drawn)
    assert scored.kl.mean() > 1e-3  # it has learnt something
    assert (scored.logprobs - drawn.logprobs).abs().max() > 0.05
    other = make_policy(seed=1)
    assert_scored_over_the_same_sets(rescore(other, drawn, with_entropy=True, reference=model), drawn)
    drawn = draw(model, settings)  # by the new weights
    assert_as_drawn(rescore(model, drawn), drawn)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_dtype(dtype):
    model = make_policy()
    low = copy.deepcopy(model).to(dtype)
    for settings in SETTINGS:
        for sampler, scorer in ((model, low), (low, model), (low, low)):
            drawn = draw(sampler, settings)
            assert drawn.logprobs.dtype == drawn.values.dtype == torch.promote_types(sampler.dtype, torch.float32)
            scored = rescore(scorer, drawn, with_entropy=True, reference=model)
            assert scored.logprobs.dtype == scored.values.dtype == torch.promote_types(scorer.dtype, torch.float32)
            assert_scored_over_the_same_sets(scored, drawn)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_under_autocast_alone_and_as_accelerate_prepares_a_model(settings):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    autocast = functools.partial(torch.autocast, "cpu", dtype=torch.bfloat16)
    model = make_policy(resid_pdrop=0.3).train()
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        prepared = Accelerator(mixed_precision="bf16", cpu=True).prepare(copy.deepcopy(model))
        with autocast():
            drawn = draw(model, settings)
            scored = rescore(model, drawn, with_entropy=True, reference=model)
        assert_scored_over_the_same_sets(scored, drawn)
        scored.logprobs.sum().backward()
        assert model.transformer.h[0].mlp.c_fc.weight.grad.isfinite().all()
        drawn = draw(prepared, settings)
        scored = rescore(prepared, drawn, with_entropy=True, reference=make_policy())
        assert_scored_over_the_same_sets(scored, drawn)
        with autocast(), torch.no_grad():
            assert_close(scored.logprobs, rescore(model, drawn).logprobs)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_the_documented_bound_of_float32_holds(temperature):
    """1e-5, or 1e-6 * max |logit| / temperature where that is more: the forward pass itself is no better."""
    for scale in (1, 10, 100):
        model = make_policy()
        with torch.no_grad():
            factor = scale / model(torch.arange(60)[None]).logits.abs().max()
            model.transformer.ln_f.weight.mul_(factor)
            model.transformer.ln_f.bias.mul_(factor)
            drawn = draw(model, {"temperature": temperature, "eos_token_id": None})
            largest = own_logits(model, drawn).abs().max()
            assert (drawn.logprobs <= 0).all()
            assert_close(rescore(model, drawn).logprobs, drawn.logprobs, max(1e-5, 1e-6 * largest / temperature))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_changes_nothing(dtype):
    model, settings = make_policy(), SETTINGS[2]
    expected, before = draw(model, settings), torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        drawn = draw(model, settings)
        assert_as_drawn(rescore(model, drawn), drawn)
    finally:
        torch.set_default_dtype(before)
    for name in ("sequences", "logprobs", "values", "kept"):
        assert_close(getattr(drawn, name), getattr(expected, name), 0)


def test_a_rollout_made_in_inference_mode_is_rescored_with_gradients():
    model = make_policy()
    with torch.inference_mode():
        drawn = draw(model, SETTINGS[1])
        parts = [drawn, drawn[:3], rollout(model, torch.tensor([[5, 6]]), max_new_tokens=3)]
    for each in parts:
        scored = rescore(model, each)
        ((scored.logprobs - each.logprobs).exp() * each.values).sum().backward()
    assert model.transformer.wte.weight.grad.abs().sum() > 0


# The model's own forward, whatever became of it


def louder(output):
    """An output of any kind, its numbers multiplied: a tensor, a tuple's first, logits, or hidden states."""
    if isinstance(output, torch.Tensor):
        return output * 1.3
    if isinstance(output, tuple):
        return (louder(output[0]), *output[1:])
    key = "logits" if "logits" in output else "last_hidden_state"
    output[key] = output[key] * 1.3
    return output


def louder_hook(module, args, output):
    return louder(output)


def capped(model):
    class Capped(type(model)):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = 5 * torch.tanh(output.logits / 5)
            return output

    model.__class__ = Capped
    return model


def hooked(name, hook=louder_hook):
    def change(model):
        model.get_submodule(name).register_forward_hook(hook)
        return model

    return change


def replaced(name):
    def change(model):
        module = model.get_submodule(name)
        original = module.forward
        module.forward = lambda *args, **kwargs: louder(original(*args, **kwargs))
        return model

    return change


class Wrapper(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, **kwargs):
        return louder(self.module(**kwargs))


CHANGES = {
    "capped": capped,
    "capped plain": lambda model: capped(plain_twin(model)),
    "plain": plain_twin,
    "hook": hooked(""),
    "hook inside": hooked("transformer.h.1"),
    "hook on the output layer": hooked("lm_head"),
    "replaced": replaced(""),
    "replaced inside": replaced("transformer.ln_f"),
    "wrapped": Wrapper,
}


def assert_scored_by_its_own_call(model, settings=SETTINGS[-1]):
    """A rollout and its scores are those of the model's own logits."""
    drawn = draw(model, settings)
    scored = rescore(model, drawn)
    assert_as_drawn(scored, drawn)
    logits = own_logits(model, drawn)
    expected = of_drawn(by_hand(logits, drawn.sampling), drawn)
    assert_close(scored.logprobs[::15, ::5], expected[::15, ::5])  # few, so that none lies on the border of a set
    if logits.requires_grad:
        scored.logprobs.sum().backward()


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_sampled_and_scored_is_the_forward_pass_of_the_model_as_it_is(change):
    assert_scored_by_its_own_call(CHANGES[change](make_policy()))


@pytest.mark.parametrize("name", ["GPT2MLP", "GPT2Block", "GPT2Model", "GPT2LMHeadModel"])
def test_a_forward_that_was_patched_on_the_class_is_run(name, monkeypatch):
    """As kernel libraries patch models."""
    kind = getattr(modeling_gpt2, name)
    original = kind.forward
    patched = functools.wraps(original)(lambda *args, **kwargs: louder(original(*args, **kwargs)))
    monkeypatch.setattr(kind, "forward", patched)
    for model in (make_policy(), plain_twin(make_policy())):
        assert_scored_by_its_own_call(model)


def test_compiled_models_and_layers_are_sampled_scored_and_hooked():
    model = make_tiny_model(resid_pdrop=0.3).train()
    whole = torch.compile(copy.deepcopy(model), backend="eager")
    drawn = rollout(whole, RAGGED, max_new_tokens=4, generator=seeded())
    assert_as_drawn(rescore(whole, drawn), drawn)
    whole.eval().register_forward_hook(louder_hook)
    hooked = rollout(whole, RAGGED, max_new_tokens=4, generator=seeded())
    assert_as_drawn(rescore(whole, hooked), hooked)
    assert not torch.equal(hooked.logprobs, drawn.logprobs)
    for block in model.transformer.h:
        block.compile(backend="eager")
    drawn = rollout(model, RAGGED, max_new_tokens=4)
    assert_as_drawn(rescore(model, drawn), drawn)


def test_dropout_of_every_kind_is_switched_off():
    class Noisy(modeling_gpt2.GPT2MLP):
        def forward(self, x):
            return nn.functional.dropout(super().forward(x), 0.9, self.training)  # no attribute names it

    for dropout in (0.0, 0.5):
        model = make_policy(**dict.fromkeys(PDROPS, dropout)).train()
        model.transformer.h[0].mlp.__class__ = Noisy
        drawn = draw(model)
        assert_as_drawn(rescore(model, drawn), drawn)


def test_tokens_banned_by_the_lowest_number_of_the_dtype_are_finite():
    def ban(module, args, output):
        output.logits[..., 90:] = torch.finfo(output.logits.dtype).min
        return output

    for dtype in (torch.float32, torch.float64):
        model = hooked("", ban)(make_policy().to(dtype))
        drawn = draw(model)
        assert (drawn.responses < 90).all()
        assert_as_drawn(rescore(model, drawn), drawn)


def test_what_is_no_causal_language_model_is_refused_with_the_way_out():
    drawn = make_tiny_model().rollout(RAGGED, max_new_tokens=2)
    with pytest.raises(TypeError, match="of DataParallel, its module"):
        rollout(nn.DataParallel(make_tiny_model()), RAGGED)
    for name in ("GPT2Model", "GPT2ForSequenceClassification"):
        model = getattr(transformers, name)(make_tiny_model().config).eval()
        for use, given in ((rollout, RAGGED[:1]), (rescore, drawn[:1])):
            with pytest.raises(TypeError, match=f"a {name}; expected a causal language model"):
                use(model, given)


# Kept sets, and a rollout that somebody changed


def test_sets_kept_of_another_vocabulary_are_refused():
    """Every drawn token is in the small vocabulary; only the sets tell."""
    drawn = rollout(make_tiny_model(), RAGGED * 2, max_new_tokens=8, eos_token_id=None, top_p=0.9)
    with pytest.raises(ValueError, match="vocabulary of 50"):
        rescore(make_tiny_model(vocab_size=50), drawn)
    with pytest.raises(TypeError, match="expected the Rollout"):
        rescore(make_tiny_model(), RAGGED)


def unseen(column):
    return lambda d: {"attention_mask": d.attention_mask.index_fill(1, torch.tensor(column), 0)}


SPOILED = {
    "responses": lambda d: {"responses": (d.responses + 1) % 96},
    "sequences": lambda d: {"sequences": d.sequences.roll(1, 1)},
    "a mask of twos": lambda d: {"attention_mask": 2 * d.attention_mask},
    "a token that nobody sees": unseen(5),
    "a prompt with padding at its end": unseen(4),
    "a response mask of ints": lambda d: {"response_mask": d.response_mask.long()},
    "fewer rows": lambda d: {"responses": d.responses[:2]},
    "another mask": lambda d: {"attention_mask": d.attention_mask[:, 1:]},
    "kept of floats": lambda d: {"kept": d.kept.float()},
    "kept of fewer rows": lambda d: {"kept": d.kept[:1]},
    "kept without the token": lambda d: {"kept": d.kept.roll(1, 0)},
    "sampling as a dict": lambda d: {"sampling": dataclasses.asdict(d.sampling)},
    "a list": lambda d: {"responses": d.responses.tolist()},
}


@pytest.mark.parametrize("how", SPOILED)
def test_a_rollout_that_does_not_fit_together_is_refused(how):
    model = make_tiny_model()
    drawn = model.rollout(RAGGED, max_new_tokens=5, eos_token_id=EOS, generator=seeded(), top_k=3)
    rescore(model, drawn)
    with pytest.raises((TypeError, ValueError), match=r"(?i)rollout"):
        rescore(model, dataclasses.replace(drawn, **SPOILED[how](drawn)))
