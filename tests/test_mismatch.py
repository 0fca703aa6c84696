"""`mismatch`: the numbers of the literature, on engines that are off by a known amount."""

import dataclasses
import math

import pytest
import torch
from conftest import make_tiny_model

from generation_gpt2_value import Rescored, rescore
from sampler_audit import mismatch, rollout_from_tokens
from sampling_gpt2_value import Sampling

RAGGED = [torch.tensor(prompt) for prompt in ([5, 17, 3], [80], [41, 9, 7, 2, 64], [33, 12])]
EOS = [1, 2, 3, 4, 5, 6, 7, 8]
CLAIMED, PLAIN = "the sampling settings", "temperature 1 over the full vocabulary"


def draw(model, copies=16, **settings):
    return model.rollout(
        RAGGED,
        max_new_tokens=16,
        num_return_sequences=copies,
        generator=torch.Generator().manual_seed(0),
        **{"eos_token_id": None, **settings},
    )


def by_hand(engine, ours):
    """A rollout and scores of two rows of three tokens, the last of which was not drawn."""
    responses = [[7, 8, 9], [6, 5]]
    drawn = rollout_from_tokens([[5], [4]], responses, logprobs=engine)
    column = torch.zeros(2, 3)
    column[drawn.response_mask] = torch.tensor([number for row in ours for number in row])
    return drawn, Rescored(logprobs=column)


def test_the_numbers_are_those_of_their_formulas():
    engine = [[-1.0, -2.0, -0.5], [-3.0, -1.5]]
    ours = [[-1.1, -1.0, -0.5], [-3.0, -4.5]]
    found = mismatch(*by_hand(engine, ours))
    r = [math.exp(d) for d in (-0.1, 1.0, 0.0, 0.0, -3.0)]
    mean = sum(r) / 5
    assert found.tokens == 5
    assert found.mean_ratio == pytest.approx(mean, rel=1e-6)
    assert found.standard_error == pytest.approx(math.sqrt(sum((x - mean) ** 2 for x in r) / 4 / 5), rel=1e-6)
    assert found.effective_sample_size == pytest.approx(sum(r) ** 2 / sum(x * x for x in r), rel=1e-6)
    assert found.kl == pytest.approx(sum(x - 1 - math.log(x) for x in r) / 5, rel=1e-6)
    assert found.reports is None
    assert len(str(found).splitlines()) == 1

    token = [[r[0], 2.0, 1.0], [1.0, r[4], 0.0]]
    torch.testing.assert_close(found.weights(), torch.tensor(token))
    wide = [[r[0], r[1], 1.0], [1.0, r[4], 0.0]]
    torch.testing.assert_close(found.weights(cap=math.inf), torch.tensor(wide))
    product = r[0] * r[1]
    assert product > 2
    sequence = [[2.0] * 3, [r[4], r[4], 0.0]]
    torch.testing.assert_close(found.weights("sequence"), torch.tensor(sequence))
    torch.testing.assert_close(found.weights("sequence", cap=3.0)[0], torch.full((3,), product))


def test_the_ratio_of_an_engine_that_drew_by_its_own_numbers_is_1_within_its_error():
    """The engine has learnt something else: it draws and reports by other weights, and the estimates see how far."""
    engine, ours = make_tiny_model(), make_tiny_model()
    with torch.no_grad():
        for weight in ours.transformer.parameters():
            weight.add_(0.01 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
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
        (Sampling(), PLAIN),
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
    drawn.logprobs += noise * torch.randn(drawn.logprobs.shape, generator=torch.Generator().manual_seed(2))
    found = mismatch(drawn, scored, model=model)
    assert found.reports == name
    assert found.distances[name] <= noise + 1e-5
    if name == CLAIMED:
        assert "are those of the sampling settings" in str(found)
        assert found.weights().shape == drawn.responses.shape
    else:
        assert f"NOT those of the sampling settings ({found.distances[CLAIMED]:.1e} nats apart) but of {name}" in str(
            found
        )
        with pytest.raises(ValueError, match=f"{name}.*No weights follow"):
            found.weights()
    assert mismatch(drawn, scored).weights().shape == drawn.responses.shape  # without the model, nobody knows


def test_plain_settings_have_one_reading():
    model = make_tiny_model()
    drawn = draw(model)
    assert list(mismatch(drawn, rescore(model, drawn), model=model).distances) == [CLAIMED]


def test_weights_have_no_gradient_and_leave_out_what_was_not_drawn():
    model = make_tiny_model()
    drawn = draw(model, eos_token_id=EOS)
    assert not drawn.response_mask.all()
    found = mismatch(drawn, model.rescore(drawn))
    for level in ("token", "sequence"):
        weights = found.weights(level)
        assert not weights.requires_grad
        assert weights.dtype == torch.float32
        assert not weights[~drawn.response_mask].any()
        torch.testing.assert_close(weights[drawn.response_mask], torch.ones(found.tokens), atol=1e-3, rtol=0)


def test_a_sequence_of_any_length_is_truncated_and_not_infinite():
    drawn = rollout_from_tokens([[5]], [[7] * 40], logprobs=[[-60.0] * 40])
    found = mismatch(drawn, Rescored(logprobs=torch.zeros(1, 40)))
    assert (found.weights("sequence") == 2.0).all()


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda drawn, scored: (drawn.sequences, scored), TypeError, "expected a Rollout"),
        (lambda drawn, scored: (dataclasses.replace(drawn, logprobs=None), scored), ValueError, r"None, \[4, 3\]"),
        (lambda drawn, scored: (drawn, Rescored()), ValueError, r"\[4, 3\], None"),
        (lambda drawn, scored: (drawn[:2], scored), ValueError, r"\[\[2, 3\], \[4, 3\]\]"),
        (
            lambda drawn, scored: (dataclasses.replace(drawn, logprobs=drawn.logprobs * math.nan), scored),
            ValueError,
            "NaN or infinite",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(spoil, error, message):
    model = make_tiny_model()
    drawn = model.rollout(RAGGED, max_new_tokens=3)
    with pytest.raises(error, match=message):
        mismatch(*spoil(drawn, rescore(model, drawn)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"level": "row"}, 'expected "token" or "sequence"'), ({"cap": 0.5}, "cap=0.5"), ({"cap": math.nan}, "cap=nan")],
)
def test_weights_that_do_not_exist_are_refused(arguments, message):
    model = make_tiny_model()
    drawn = model.rollout(RAGGED, max_new_tokens=3)
    with pytest.raises(ValueError, match=message):
        mismatch(drawn, rescore(model, drawn)).weights(**arguments)
