"""An honest sampler passes the audit as often as it should; a dishonest one does not.

What `generate()` does by itself is caught in tests/test_generate_quirks.py and tests/test_cli_audit.py.
"""

import copy
import dataclasses
import json
import math
from collections import Counter

import pytest
import torch
from conftest import make_tiny_model, plain_twin
from dishonest_samplers import DISHONEST, draw, samplers
from scipy import stats
from support.settings import EOS, RAGGED, seeded

from gpt2_value import Rollout, Sampling
from sampler_audit import audit_sampler
from sampler_audit.audit import judge
from sampler_audit.evidence import evidence_of

EVEN = torch.tensor([[5, 17, 3], [80, 2, 4], [41, 9, 7], [33, 12, 50]])
T = 20


def make_sharp_model(**fields):
    """A tiny model whose distributions are about as sharp as a trained one's: 2 nats, where even ones have 4.6."""
    model = make_tiny_model(**fields)
    with torch.no_grad():
        model.transformer.ln_f.weight.mul_(3)
    return model


@pytest.fixture(scope="module")
def model():
    return make_sharp_model()


@pytest.fixture(scope="module")
def drawn(model):
    """1,600 tokens, drawn from the model's own distribution."""
    return model.rollout(EVEN, max_new_tokens=T, eos_token_id=None, num_return_sequences=20, generator=seeded())


def draws(logits):
    """One token `[...]` from each of the distributions `[..., V]`."""
    return torch.multinomial(logits.flatten(0, -2).softmax(-1), 1).view(logits.shape[:-1])


def audit_logits(logits, tokens, sampling=None):
    """The audit of `tokens [B, T]` with the logits `[B, T, V]` that they were drawn from, without a model."""
    evidence = evidence_of(logits.flatten(0, 1), tokens.flatten(), sampling or Sampling(), None)
    return judge([evidence], torch.ones(tokens.shape, dtype=torch.bool), 1e-3)


# Honest samplers


def test_p_values_of_honest_rollouts_are_uniform(model):
    """Over 100 runs, which are rows of one large draw; and so are the biases in units of their standard errors.

    `make audit-power` does this with other settings, and 12,000 times.
    """
    settings = {"temperature": 0.7, "top_k": 10, "top_p": 0.8, "eos_token_id": EOS, "min_new_tokens": 3}
    torch.manual_seed(0)
    drawn = model.rollout(RAGGED, max_new_tokens=T, num_return_sequences=500, **settings)
    drawn = drawn[torch.randperm(len(drawn))]
    audits = [audit_sampler(model, drawn[run::100], batch_size=64) for run in range(100)]
    assert stats.kstest([audit.p_value for audit in audits], "uniform").pvalue > 1e-3
    assert stats.kstest([audit.bias_nats / audit.standard_error for audit in audits], "norm").pvalue > 1e-3
    assert sum(not audit.honest for audit in audits) <= 1  # one in a thousand is called dishonest


@pytest.mark.parametrize("shape", [(1, 50), (10, 5), (20, 25)], ids=str)
def test_few_tokens_give_no_more_false_alarms(shape):
    """Of each test alone: p-values below its share of the level, 1 in 4,000, where 0.1 of 400 are expected."""
    torch.manual_seed(0)
    audits = [audit_logits(logits, draws(logits)) for logits in (torch.randn(*shape, 30) * 2 for _ in range(400))]
    assert stats.kstest([audit.tests["calibration"].p_value for audit in audits], "uniform").pvalue > 1e-3
    small = Counter(name for audit in audits for name, test in audit.tests.items() if test.p_value < 2.5e-4)
    assert max(small.values(), default=0) <= 2


def test_a_rollout_is_audited_over_the_tokens_that_it_drew_from(model):
    """The model learns between drawing and auditing: what is no longer in its top 5 was possible all the same."""
    torch.manual_seed(0)
    drawn = model.rollout(EVEN, max_new_tokens=T, eos_token_id=None, num_return_sequences=20, top_k=5)
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for weight in moved.transformer.parameters():
            weight.add_(0.01 * weight.std() * torch.randn_like(weight))
    assert audit_sampler(moved, drawn).impossible == 0
    assert audit_sampler(moved, drawn.sequences, prompt_length=3, sampling=Sampling(top_k=5)).impossible > 0
    spoilt = dataclasses.replace(drawn, kept=~drawn.kept)  # a bit mask of the others
    assert audit_sampler(model, spoilt).impossible == drawn.response_mask.sum()


def test_training_mode_padding_micro_batches_and_the_class_change_nothing():
    hot = make_sharp_model(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5).train()
    claim = {"temperature": 0.7, "eos_token_id": EOS, "min_new_tokens": 4}
    drawn = hot.rollout(RAGGED, max_new_tokens=T, num_return_sequences=30, generator=seeded(), **claim)
    expected = audit_sampler(hot, drawn, generator=seeded())
    assert expected.honest
    assert hot.training
    of_a_package = type("Rollout", (Rollout,), {})(**vars(drawn))  # the class of a package's own module
    assert torch.equal(audit_sampler(hot, of_a_package, generator=seeded()).transforms, expected.transforms)
    wider = torch.nn.functional.pad(drawn.sequences, (3, 0), value=77)
    claim = {"attention_mask": torch.nn.functional.pad(drawn.attention_mask, (3, 0)), "sampling": drawn.sampling}
    for batch_size in (1, 7, 100):
        audit = audit_sampler(hot, wider, prompt_length=8, generator=seeded(), batch_size=batch_size, **claim)
        torch.testing.assert_close(audit.transforms, expected.transforms, atol=1e-5, rtol=0)
        assert audit.bias_nats == pytest.approx(expected.bias_nats, abs=1e-5)


# Dishonest ones


@pytest.mark.parametrize("name", ["honest", *DISHONEST])
def test_what_only_some_tokens_or_their_order_show_is_caught(name):
    """At 100 rows of 40 tokens; `make audit-power` counts how often."""
    model = make_sharp_model(n_layer=1)
    torch.manual_seed(1)
    sequences = draw(model, torch.randint(0, 96, (100, 3)), **samplers(100, 40, 96)[name])
    audit = audit_sampler(model, sequences, prompt_length=3)
    assert audit.tokens == 4000
    assert audit.honest == (name == "honest") == (not audit.failed)


def test_banned_ids_of_a_large_vocabulary_are_caught():
    """Ids are counted in 512 groups; some tokens are frequent everywhere, as in any language."""
    torch.manual_seed(0)
    logits = (2 * torch.randn(2048) + 1.5 * torch.randn(100, 1, 2048)).expand(-1, 40, -1)
    assert audit_logits(logits, draws(logits)).honest
    for banned in (slice(1024, None), slice(0, None, 5)):
        fewer = logits.clone()
        fewer[..., banned] = -math.inf
        audit = audit_logits(logits, draws(fewer))
        assert "identity" in audit.failed
        assert not audit.honest


# Impossible tokens, edges, bias


def test_a_token_of_probability_zero_settles_it(model, drawn):
    audit = audit_sampler(model, drawn.sequences, prompt_length=3, sampling=Sampling(top_k=50))
    assert 0 < audit.impossible < audit.tokens
    assert (audit.p_value, audit.verdict, audit.bias_nats) == (0.0, "dishonest", -math.inf)
    assert f"{audit.impossible} of them impossible" in str(audit)
    assert json.loads(json.dumps(audit.to_json(), allow_nan=False))["bias_nats"] is None
    claim = Sampling(eos_token_id=list(range(48)), min_new_tokens=T)
    early = audit_sampler(model, dataclasses.replace(drawn, sampling=claim))
    assert early.impossible == (drawn.responses < 48).sum()


@pytest.mark.parametrize("sampling", [Sampling(top_k=2), Sampling(top_p=0.7)])
def test_a_tie_that_another_engine_broke_otherwise_is_not_impossible(sampling):
    logits = torch.tensor([3.0, 2.0, 2.0, 1.0]).expand(20, 50, 4)
    torch.manual_seed(0)
    first = draws(logits[..., :2])  # this engine kept tokens 0 and 1
    other = torch.where(first == 1, 2, first)  # the other one 0 and 2
    assert audit_logits(logits, first, sampling).honest
    assert audit_logits(logits, other, sampling).honest
    other[0, 0] = 3
    assert audit_logits(logits, other, sampling).impossible == 1


def test_the_bias_is_the_mean_of_what_its_definition_says(model, drawn):
    with torch.no_grad():
        log_p = plain_twin(model)(drawn.sequences).logits[:, 2:-1].double().log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    terms = log_p.gather(-1, drawn.responses[..., None])[..., 0] + entropy
    audit = audit_sampler(model, drawn)
    assert audit.bias_nats == pytest.approx(terms.mean().item(), abs=1e-5)
    assert audit.standard_error == pytest.approx(terms.std().item() / math.sqrt(1600), abs=1e-5)


# What is shown


def test_the_report_its_picture_and_its_json_agree(model, drawn, tmp_path):
    audit, again, other = (audit_sampler(model, drawn, generator=seeded(seed)) for seed in (1, 1, 2))
    assert audit.p_value == again.p_value != other.p_value
    smallest = min(test.p_value for test in audit.tests.values())
    assert audit.p_value == pytest.approx(1 - (1 - smallest) ** 4, rel=1e-6)  # Sidak's of four
    assert str(audit).startswith(f"honest: p = {audit.p_value:.2g}")
    report = json.loads(json.dumps(audit.to_json(), allow_nan=False))
    assert (report["verdict"], report["tokens"]) == ("honest", 1600)
    heights = [bar.get_height() for bar in audit.plot(tmp_path / "audit.png").patches if bar.get_width() < 0.06]
    assert (tmp_path / "audit.png").stat().st_size > 5000
    assert len(heights) == 20
    assert max(abs(height - 1) for height in heights) < 4 * math.sqrt(19 / audit.tokens)


@pytest.mark.parametrize(
    ("kind", "words", "claim"),
    [
        (ValueError, "prompt_length=None", {"prompt_length": None}),
        (ValueError, "at least 50", {"prompt_length": 23}),
        (ValueError, "eos_token_id=96", {"sampling": Sampling(eos_token_id=96)}),
        (ValueError, "alpha=1", {"alpha": 1}),
        (ValueError, "batch_size=0", {"batch_size": 0}),
        (ValueError, "outside the vocabulary of 96", {"tokens": torch.full((80, 23), 96)}),
        (
            TypeError,
            r"token ids \(torch.float32, 2 dimensions\); expected",
            {"tokens": torch.ones(80, 23)},
        ),
        (TypeError, "expected a causal language model", {"model": str}),
    ],
)
def test_bad_input_is_refused_with_what_to_do(model, drawn, kind, words, claim):
    with pytest.raises(kind, match=words):
        audit_sampler(**{"model": model, "tokens": drawn.sequences, "prompt_length": 3, **claim})
    with pytest.raises(TypeError, match="got a Rollout together with"):
        audit_sampler(model, drawn, prompt_length=3)


def test_logits_that_are_not_numbers_are_refused():
    with pytest.raises(ValueError, match="NaN or infinite"):
        audit_logits(torch.full((1, 60, 5), math.nan), torch.zeros(1, 60, dtype=torch.long))
