"""`mismatch`: the numbers of the literature, on engines that are off by a known amount."""

import dataclasses
import math

import pytest
import torch
from conftest import make_tiny_model
from support.settings import EOS, RAGGED, seeded

from gpt2_value import Rescored, Sampling, rescore
from sampler_audit import mismatch, rollout_from_tokens

CLAIMED = "the sampling settings"


def draw(model, copies=16, **settings):
    settings = {"eos_token_id": None, "max_new_tokens": 16, **settings}
    return model.rollout(RAGGED, num_return_sequences=copies, generator=seeded(), **settings)


def test_the_numbers_are_those_of_their_formulas():
    drawn = rollout_from_tokens([[5], [4]], [[7, 8, 9], [6, 5]], logprobs=[[-1.0, -2.0, -0.5], [-3.0, -1.5]])
    found = mismatch(drawn, Rescored(logprobs=torch.tensor([[-1.1, -1.0, -0.5], [-3.0, -4.5, 0.0]])))
    r = torch.tensor([-0.1, 1.0, 0.0, 0.0, -3.0]).exp()
    numbers = (found.mean_ratio, found.standard_error, found.effective_sample_size, found.kl)
    expected = (r.mean(), r.std() / 5**0.5, r.sum() ** 2 / (r**2).sum(), (r - 1 - r.log()).mean())
    assert numbers == pytest.approx([float(number) for number in expected], rel=1e-6)
    assert found.tokens == 5
    assert found.reports is None
    product = r[0] * r[1]  # above 2
    for arguments, expected in (
        ({}, [[r[0], 2.0, 1.0], [1.0, r[4], 0.0]]),
        ({"cap": math.inf}, [[r[0], r[1], 1.0], [1.0, r[4], 0.0]]),
        ({"level": "sequence"}, [[2.0] * 3, [r[4], r[4], 0.0]]),
        ({"level": "sequence", "cap": 3.0}, [[product] * 3, [r[4], r[4], 0.0]]),
    ):
        torch.testing.assert_close(found.weights(**arguments), torch.tensor(expected))


def test_the_ratio_of_an_engine_that_drew_by_its_own_numbers_is_1_within_its_error():
    """The engine has learnt something else: it draws and reports by other weights, and the estimates see how far."""
    engine, ours = make_tiny_model(), make_tiny_model()
    with torch.no_grad():
        for weight in ours.transformer.parameters():
            weight.add_(0.01 * torch.randn(weight.shape, generator=seeded(1)))
    for settings in ({}, {"top_k": 12, "temperature": 0.7, "eos_token_id": EOS}):
        drawn = draw(engine, 64, **settings)
        found = mismatch(drawn, rescore(ours, drawn), model=ours)
        assert found.reports == CLAIMED
        assert abs(found.mean_ratio - 1) < 4 * found.standard_error
        kl = rescore(engine, drawn, reference=ours).kl[drawn.response_mask].mean().item()  # summed over the vocabulary
        assert kl > 1e-3
        assert found.kl == pytest.approx(kl, rel=0.25)


@pytest.mark.parametrize(
    ("reading", "name"),
    [
        (Sampling(), "temperature 1 over the full vocabulary"),
        (Sampling(0.7), "temperature 0.7 over the full vocabulary"),
        (None, CLAIMED),
    ],
)
@pytest.mark.parametrize("noise", [0.0, 0.02], ids=["exact", "rounded"])
def test_what_the_engine_means_by_its_numbers_is_said(reading, name, noise):
    model = make_tiny_model()
    drawn = draw(model, top_k=12, temperature=0.7)
    scored = rescore(model, drawn)
    if reading is not None:
        other = rescore(model, dataclasses.replace(drawn, sampling=reading, kept=None))
        drawn = dataclasses.replace(drawn, logprobs=other.logprobs.detach())
    drawn.logprobs += noise * torch.randn(drawn.logprobs.shape, generator=seeded(2))
    found = mismatch(drawn, scored, model=model)
    assert found.reports == name
    assert found.distances[name] <= noise + 1e-5
    assert mismatch(drawn, scored).weights().shape == drawn.responses.shape  # without the model, nobody knows
    if name == CLAIMED:
        assert "are those of the sampling settings" in str(found)
        assert found.weights().shape == drawn.responses.shape
        return
    away = f"({found.distances[CLAIMED]:.1e} nats apart)"
    assert f"NOT those of the sampling settings {away} but of {name}" in str(found)
    with pytest.raises(ValueError, match=f"{name}.*No weights follow"):
        found.weights()


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_weights_have_no_gradient_and_leave_out_what_was_not_drawn(level):
    model = make_tiny_model()
    drawn = draw(model, eos_token_id=EOS)
    weights = mismatch(drawn, model.rescore(drawn), model=model).weights(level)
    assert (weights.requires_grad, weights.dtype) == (False, torch.float32)
    torch.testing.assert_close(weights, drawn.response_mask.float(), atol=1e-3, rtol=0)
    unlikely = rollout_from_tokens([[5]], [[7] * 40], logprobs=[[-60.0] * 40])
    assert (mismatch(unlikely, Rescored(logprobs=torch.zeros(1, 40))).weights(level) == 2.0).all()  # and not infinite


def test_what_cannot_be_compared_is_refused():
    model = make_tiny_model()
    drawn = draw(model, 1, max_new_tokens=3)
    scored = rescore(model, drawn)
    for rollout, scores, error, message in (
        (drawn.sequences, scored, TypeError, "expected a Rollout"),
        (dataclasses.replace(drawn, logprobs=None), scored, ValueError, r"None, \[4, 3\]"),
        (drawn, Rescored(), ValueError, r"\[4, 3\], None"),
        (dataclasses.replace(drawn, logprobs=drawn.logprobs * math.nan), scored, ValueError, "NaN or infinite"),
    ):
        with pytest.raises(error, match=message):
            mismatch(rollout, scores)
    for arguments in ({"level": "row"}, {"cap": 0.5}, {"cap": math.nan}):
        with pytest.raises(ValueError, match=r'cap=.*expected "token" or "sequence"'):
            mismatch(drawn, scored).weights(**arguments)
