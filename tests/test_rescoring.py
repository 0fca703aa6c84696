"""Lean scoring: never `[B, T, vocabulary]`, and the numbers and gradients of the plain computation."""

import math

import pytest
import torch
from conftest import make_tiny_model, plain_twin
from support.settings import (
    EOS,
    RAGGED,
    SETTINGS,
    assert_as_drawn,
    assert_close,
    by_hand,
    checkpoint_layers,
    of_drawn,
    own_logits,
    seeded,
)

import scoring_gpt2_value
from gpt2_value import rescore, rollout


def small_chunks(monkeypatch):
    """7 tokens at a time, which are computed again in the backward pass."""
    for name, size in (("CHUNK", 96 * 7), ("KEPT", 0)):
        monkeypatch.setattr(scoring_gpt2_value, name, size)


def plainly(model, other, drawn):
    """Log-probabilities, values, entropy and KL by full logits of the whole sequences, in one piece."""
    logprobs = by_hand(own_logits(model, drawn), drawn.sampling)  # [B, T, V]
    possible = logprobs > -math.inf
    with torch.no_grad():
        theirs = own_logits(other, drawn).double() / drawn.sampling.temperature
        theirs = theirs.masked_fill(~possible, -math.inf).log_softmax(-1).masked_fill(~possible, 0.0)
    probs, finite = logprobs.exp(), logprobs.masked_fill(~possible, 0.0)
    values = model(drawn.sequences, attention_mask=drawn.attention_mask).value
    each = {
        "values": values[:, -drawn.responses.shape[1] - 1 : -1],
        "entropy": -(probs * finite).sum(-1).float(),
        "kl": (probs * (finite - theirs)).sum(-1).float(),
    }
    masked = {name: torch.where(drawn.response_mask, numbers, 0.0) for name, numbers in each.items()}
    return {"logprobs": of_drawn(logprobs, drawn), **masked}


@pytest.mark.parametrize("chunks", ["small chunks", "one chunk"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_lean_scoring_gives_the_numbers_and_gradients_of_full_logits(settings, chunks, monkeypatch):
    """The divergence is the sum over the tokens that could be drawn; it does not teach the reference."""
    if chunks == "small chunks":
        small_chunks(monkeypatch)
    other, weights = plain_twin(make_tiny_model(seed=1)), {"logprobs": 1.0, "values": 0.3, "entropy": -0.5, "kl": 0.7}
    for hooked in (False, True):  # by its body and output layer, and by its own call
        model = make_tiny_model()
        if hooked:
            model.lm_head.register_forward_hook(lambda module, args, output: None)
        drawn = rollout(model, RAGGED, max_new_tokens=10, generator=seeded(), **settings)
        assert not drawn.logprobs.requires_grad
        scores, gradients = [], []
        for scored in (vars(rescore(model, drawn, with_entropy=True, reference=other)), plainly(model, other, drawn)):
            model.zero_grad()
            sum((scored[name] * weight).sum() for name, weight in weights.items()).backward()
            gradients.append([weight.grad.clone() for weight in model.parameters()])
            scores.append({name: scored[name].detach() for name in weights})
        torch.testing.assert_close(*scores, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(*gradients, atol=2e-4, rtol=1e-4)
        assert other.transformer.wte.weight.grad is None
        assert rescore(model, drawn, reference=plain_twin(model)).kl.abs().max() < 1e-5


@pytest.fixture
def logit_rows(monkeypatch):
    """For each product with an output layer, how many tokens it was for."""
    rows, linear = [], torch.nn.functional.linear

    def watched(inputs, weight, bias=None):
        if len(weight) == 96:
            rows.append(inputs.shape[:-1].numel())
        return linear(inputs, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    return rows


@pytest.mark.parametrize("grad", [True, False])
def test_no_more_than_a_chunk_of_logits_is_held(grad, monkeypatch, logit_rows):
    small_chunks(monkeypatch)
    model = make_tiny_model()
    drawn = rollout(model, RAGGED, max_new_tokens=10, eos_token_id=EOS)
    rescore(model, drawn)  # checks itself, so that the next need not
    logit_rows.clear()
    with torch.set_grad_enabled(grad):
        scored = rescore(model, drawn)
    assert max(logit_rows) == 7
    assert sum(logit_rows) == drawn.response_mask.sum()  # padding is not scored
    if grad:
        (scored.logprobs.sum() + scored.values.sum()).backward()
        assert sum(logit_rows) == 2 * drawn.response_mask.sum()  # each chunk once more
        assert max(logit_rows) == 7


def test_values_alone_run_no_output_layer(logit_rows):
    for model in (make_tiny_model(), make_tiny_model().train()):
        drawn = rollout(model, RAGGED, max_new_tokens=10, top_p=0.9)
        logit_rows.clear()
        scored = rescore(model, drawn, values_only=True)
        scored.values.sum().backward()
        assert logit_rows == []
        assert model.transformer.wte.weight.grad.abs().sum() > 0
        assert scored.logprobs is scored.entropy is scored.kl is None
        assert_close(scored.values, rescore(model, drawn).values)
        with pytest.raises(ValueError, match="values_only"):
            rescore(model, drawn, values_only=True, with_entropy=True)
    with pytest.raises(ValueError, match="gives no values"):
        rescore(plain_twin(model), drawn, values_only=True)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers_are_run_again_without_dropout(reentrant):
    def gradient(checkpointing):
        model = make_tiny_model(resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5).train()
        if checkpointing:
            checkpoint_layers(model, reentrant)
        drawn = model.rollout(RAGGED, max_new_tokens=6, generator=seeded())
        scored = model.rescore(drawn)
        assert_as_drawn(scored, drawn)
        (scored.logprobs.sum() + scored.values.sum()).backward()
        return model.transformer.h[0].mlp.c_fc.weight.grad

    torch.testing.assert_close(gradient(True), gradient(False))
