"""Lean scoring: never `[B, T, vocabulary]`, and the numbers and gradients of the plain computation."""

import math

import pytest
import torch
from conftest import make_tiny_model, plain_twin, sampling_logprobs
from support.settings import EOS, RAGGED, SETTINGS, checkpoint_layers, seeded

import scoring_gpt2_value
from generation_gpt2_value import rollout
from scoring_gpt2_value import rescore


@pytest.fixture(params=["small chunks", "one chunk"])
def chunks(request, monkeypatch):
    """7 tokens at a time, which are computed again in the backward pass; or all of them, whose logits are kept."""
    if request.param == "small chunks":
        small_chunks(monkeypatch)


def small_chunks(monkeypatch):
    for name, size in (("CHUNK", 96 * 7), ("KEPT_BYTES", 0)):
        monkeypatch.setattr(scoring_gpt2_value, name, size)


def plainly(model, drawn):
    """Log-probabilities, values and entropy by full logits of the whole sequences, in one piece."""
    T = drawn.responses.shape[1]
    output = model(drawn.sequences, attention_mask=drawn.attention_mask)
    early = (torch.arange(T) < drawn.sampling.min_new_tokens).expand(len(drawn), T)
    logprobs = sampling_logprobs(output.logits[:, -T - 1 : -1], drawn.sampling, early=early, kept=drawn.kept)
    possible = logprobs.exp() > 0
    found = {
        "logprobs": logprobs.gather(-1, drawn.responses[..., None]).squeeze(-1),
        "values": output.value[:, -T - 1 : -1],
        "entropy": -(logprobs.exp() * logprobs.masked_fill(~possible, 0.0)).sum(-1),
    }
    return {name: torch.where(drawn.response_mask, numbers, 0.0) for name, numbers in found.items()}


def hooked(model):
    model.lm_head.register_forward_hook(lambda module, args, output: None)
    return model


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_lean_scoring_gives_the_numbers_and_gradients_of_full_logits(settings, chunks):
    for model in (make_tiny_model(), hooked(make_tiny_model())):
        drawn = rollout(model, RAGGED, max_new_tokens=10, generator=seeded(), **settings)
        gradients = []
        for scored in (vars(rescore(model, drawn, with_entropy=True)), plainly(model, drawn)):
            model.zero_grad()
            weights = {"logprobs": 1.0, "values": 0.3, "entropy": -0.5}
            sum((scored[name] * weight).sum() for name, weight in weights.items()).backward()
            gradients.append({name: weight.grad.clone() for name, weight in model.named_parameters()})
            gradients[-1]["scores"] = torch.cat([scored[name].detach() for name in weights])
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradient, gradients[1][name], atol=2e-4, rtol=1e-4)


def test_gradients_are_exact_in_float64():
    model = make_tiny_model(n_embd=8, n_head=2, n_layer=1, vocab_size=12).double()
    drawn = rollout(model, [torch.tensor([1, 2])], max_new_tokens=3, num_return_sequences=2, temperature=0.8)
    weight = model.transformer.h[0].mlp.c_fc.weight

    def scores(replacement):
        with torch.no_grad():
            weight.copy_(replacement)
        scored = rescore(model, drawn, with_entropy=True)
        return scored.logprobs.sum() + 2 * scored.entropy.sum()

    at = weight.detach().clone()
    (analytic,) = torch.autograd.grad(scores(at), weight)
    for place in [(0, 0), (3, 7), (7, 31)]:
        step = torch.zeros_like(at)
        step[place] = 1e-6
        numeric = (scores(at + step) - scores(at - step)).item() / 2e-6
        assert analytic[place].item() == pytest.approx(numeric, abs=1e-7, rel=1e-6)


@pytest.mark.parametrize("grad", [True, False])
def test_no_more_than_a_chunk_of_logits_is_held(grad, monkeypatch):
    small_chunks(monkeypatch)
    seen, original = [], scoring_gpt2_value.sampling_distribution

    def watched(logits, *settings, **more):
        seen.append(len(logits))
        return original(logits, *settings, **more)

    monkeypatch.setattr(scoring_gpt2_value, "sampling_distribution", watched)
    for model in (make_tiny_model(), hooked(make_tiny_model())):
        drawn = rollout(model, RAGGED, max_new_tokens=10, eos_token_id=EOS)
        rescore(model, drawn)  # checks itself, so that the next need not
        seen.clear()
        with torch.set_grad_enabled(grad):
            scored = rescore(model, drawn)
        assert max(seen) == 7
        assert sum(seen) == drawn.response_mask.sum()  # padding is not scored
        if grad:
            (scored.logprobs.sum() + scored.values.sum()).backward()
            assert sum(seen) == 2 * drawn.response_mask.sum()  # each chunk once more
            assert max(seen) == 7


def test_values_alone_run_no_output_layer(monkeypatch):
    for model in (make_tiny_model(), make_tiny_model().train()):
        drawn = rollout(model, RAGGED, max_new_tokens=10, top_p=0.9)
        expected = rescore(model, drawn)
        handle = model.lm_head.register_forward_pre_hook(lambda *args: pytest.fail("the output layer was run"))
        with torch.no_grad():
            scored = rescore(model, drawn, values_only=True)
        assert scored.logprobs is scored.entropy is scored.kl is None
        torch.testing.assert_close(scored.values, expected.values, atol=1e-5, rtol=0)
        rescore(model, drawn, values_only=True).values.sum().backward()
        assert model.transformer.wte.weight.grad.abs().sum() > 0
        handle.remove()
        with pytest.raises((TypeError, ValueError), match="values_only"):
            rescore(model, drawn, values_only=True, with_entropy=True)
    with pytest.raises((TypeError, ValueError), match="value"):
        rescore(plain_twin(model), drawn, values_only=True)


# Entropy and divergence


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_divergence_is_the_sum_over_the_tokens_that_could_be_drawn(settings, chunks):
    model, other = make_tiny_model(), plain_twin(make_tiny_model(seed=1))
    drawn = rollout(model, RAGGED, max_new_tokens=10, generator=seeded(), **settings)
    scored = rescore(model, drawn, reference=other, with_entropy=True)
    positions = (drawn.attention_mask.cumsum(-1) - 1).clamp(min=0)
    early = (torch.arange(10) < drawn.sampling.min_new_tokens).expand(len(drawn), 10)
    with torch.no_grad():
        p, q = (
            sampling_logprobs(
                m(drawn.sequences, attention_mask=drawn.attention_mask, position_ids=positions).logits[:, -11:-1],
                drawn.sampling,
                early=early,
                kept=drawn.kept,
            ).double()
            for m in (model, other)
        )
    possible = p > -math.inf
    assert torch.equal(possible, q > -math.inf)
    ratio = p.masked_fill(~possible, 0.0) - q.masked_fill(~possible, 0.0)
    expected = torch.where(drawn.response_mask, (p.exp() * ratio).sum(-1), 0.0)
    torch.testing.assert_close(scored.kl.double(), expected, atol=1e-4, rtol=1e-4)
    assert rescore(model, drawn).entropy is None
    assert rescore(model, drawn, reference=plain_twin(model)).kl.abs().max() < 1e-5


def test_the_divergence_teaches_the_model_and_not_the_reference():
    model, other = make_tiny_model(seed=0), make_tiny_model(seed=1)
    drawn = rollout(model, RAGGED, max_new_tokens=6)
    assert not drawn.logprobs.requires_grad
    rescore(model, drawn, reference=other).kl.mean().backward()
    assert model.transformer.wte.weight.grad.abs().sum() > 0
    assert other.transformer.wte.weight.grad is None
    scored = rescore(plain_twin(model), drawn)
    assert scored.values is None
    torch.testing.assert_close(scored.logprobs, drawn.logprobs, atol=1e-5, rtol=0)


def test_means_over_draws_are_the_entropy_and_the_divergence():
    """Two ways to compute one number: the estimate from draws that PPO uses, and the sum over the vocabulary."""
    model, other = make_tiny_model(), make_tiny_model(seed=1)
    for settings in ({}, {"top_p": 0.6, "temperature": 1.3}, {"top_k": 4}):
        drawn = rollout(
            model, [RAGGED[0]], max_new_tokens=1, num_return_sequences=20_000, generator=seeded(), **settings
        )
        exact = rescore(model, drawn[:1], reference=other, with_entropy=True)
        ratio = drawn.logprobs - rescore(other, drawn).logprobs
        for estimates, expected in ((-drawn.logprobs, exact.entropy), (ratio, exact.kl)):
            assert abs(estimates.mean() - expected[0, 0]) < 4 * estimates.std() / 20_000**0.5


# Checkpointed layers


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers_are_run_again_without_dropout(reentrant):
    def gradient(checkpointing):
        model = make_tiny_model(resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5).train()
        if checkpointing:
            checkpoint_layers(model, reentrant)
        drawn = model.rollout(RAGGED, max_new_tokens=6, generator=seeded())
        scored = model.rescore(drawn)
        torch.testing.assert_close(scored.logprobs, drawn.logprobs, atol=1e-5, rtol=0)
        (scored.logprobs.sum() + scored.values.sum()).backward()
        return model.transformer.h[0].mlp.c_fc.weight.grad

    torch.testing.assert_close(gradient(True), gradient(False))
