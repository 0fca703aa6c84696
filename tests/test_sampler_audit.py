"""An honest sampler passes the audit as often as it should; a dishonest one does not."""

import copy
import dataclasses
import math
from collections import Counter

import dishonest_samplers
import pytest
import torch
from conftest import make_tiny_model, plain_twin
from scipy import stats
from torch.nn.functional import log_softmax

from generation_gpt2_value import Rollout, rollout
from sampler_audit import audit_sampler
from sampler_audit.audit import judge
from sampler_audit.evidence import evidence_of
from sampling_gpt2_value import Sampling

RAGGED = [torch.tensor(prompt) for prompt in ([5, 17, 3], [80], [41, 9, 7, 2, 64], [33, 12])]
EVEN = torch.tensor([[5, 17, 3], [80, 2, 4], [41, 9, 7], [33, 12, 50]])
EOS = [1, 2, 3, 4, 5, 6, 7, 8]  # several, so that rows of a random model end early
T = 20
DRAWN_PLAINLY = Sampling()


def make_sharp_model(**fields):
    """A tiny model whose distributions are about as sharp as a trained one's: 2 nats, where even ones have 4.6."""
    model = make_tiny_model(**fields)
    with torch.no_grad():
        model.transformer.ln_f.weight.mul_(3)
    return model


@pytest.fixture(scope="module")
def model():
    return make_sharp_model()


def audit_logits(logits, tokens, sampling=DRAWN_PLAINLY, generator=None):
    """The audit of `tokens [B, T]` or `[n]` with the logits `[..., V]` that they were drawn from, without a model."""
    shape = (-1, tokens.shape[-1]) if tokens.dim() > 1 else (1, -1)
    chunks = zip(logits.flatten(0, -2).split(2000), tokens.flatten().split(2000), strict=True)
    pieces = (evidence_of(*chunk, sampling, generator) for chunk in chunks)
    return judge(pieces, torch.ones(tokens.shape, dtype=torch.bool).reshape(shape), 1e-3)


def generated(model, prompts, *, copies, **settings):
    """What `generate()` returns, as a trainer would call it, of as many rows as `copies` of the prompts have."""
    always = {"do_sample": True, "max_new_tokens": T, "pad_token_id": 0, "top_k": 0, "eos_token_id": EOS}
    prompts = prompts.repeat(copies, 1)
    return model.generate(prompts, attention_mask=torch.ones_like(prompts), **{**always, **settings})


def enough(sequences, tokens=4000):
    """The first rows that have so many tokens up to and including their first end, prompt of 3 tokens not counted."""
    ends = torch.isin(sequences[:, 3:], torch.tensor(EOS)).long()
    lengths = (ends.cumsum(-1) - ends == 0).sum(1)
    assert lengths.sum() >= tokens
    return sequences[lengths.cumsum(0) - lengths < tokens]


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
    together = torch.cat([audit.transforms for audit in audits])
    assert stats.kstest(together.numpy(), "uniform").pvalue > 1e-3


def test_p_values_are_uniform_for_any_number_of_tokens():
    torch.manual_seed(0)
    logits = torch.randn(10_000, 7) * 2
    tokens = torch.multinomial(logits.softmax(-1), 1).squeeze(-1)
    for n in (50, 100, 1000):
        pieces = zip(logits.split(n), tokens.split(n), strict=True)
        p_values = [audit_logits(*piece).p_value for piece in pieces]
        assert stats.kstest(p_values, "uniform").pvalue > 1e-3


def test_the_p_value_is_that_of_a_g_test(model):
    audit = audit_sampler(model, model.rollout(EVEN, max_new_tokens=T, eos_token_id=None, num_return_sequences=20))
    tail = [1 - 0.1 / 2**halved for halved in range(1, 5)]  # 1,600 tokens: 10 are expected in the last of these
    edges = torch.tensor([*(bin / 10 for bin in range(10)), *tail, 1.0], dtype=torch.float64)
    counts, widths = torch.histogram(audit.transforms, edges).hist, edges.diff()
    g = stats.power_divergence(counts, (widths / widths.sum() * audit.tokens).numpy(), lambda_="log-likelihood")
    found = audit.tests["calibration"]
    williams = 1 + ((1 / widths).sum().item() - 1) / (6 * audit.tokens * found.degrees_of_freedom)
    assert found.statistic == pytest.approx(g.statistic / williams, rel=1e-9)
    assert found.p_value == pytest.approx(stats.chi2.sf(found.statistic, found.degrees_of_freedom), rel=1e-6)
    smallest = min(test.p_value for test in audit.tests.values())
    assert audit.p_value == pytest.approx(1 - (1 - smallest) ** 4, rel=1e-6)  # Sidak's of four
    assert audit.tokens == 4 * 20 * T


@pytest.mark.parametrize("shape", [(50,), (10, 5)], ids=str)
def test_few_tokens_give_no_more_false_alarms(shape):
    """Of each test alone: p-values below its share of the level, 1 in 4,000, where 0.1 of 400 are expected."""
    torch.manual_seed(0)
    small = Counter()
    for _ in range(400):
        logits = torch.randn(*shape, 30) * 2
        tokens = torch.multinomial(logits.softmax(-1).view(-1, 30), 1).view(shape)
        audit = audit_logits(logits, tokens)
        small.update(name for name, test in audit.tests.items() if test.p_value < 2.5e-4)
    assert max(small.values(), default=0) <= 2


@pytest.mark.parametrize("settings", [{"top_k": 50}, {"top_p": 0.9}], ids=str)
def test_honest_rollouts_in_bfloat16_pass(settings):
    """Sampling and auditing round otherwise, and so cut off otherwise; the rollout keeps what it drew from."""
    model = make_sharp_model().bfloat16()
    torch.manual_seed(0)
    drawn = model.rollout(RAGGED, max_new_tokens=T, num_return_sequences=50, eos_token_id=None, **settings)
    audits = [audit_sampler(model, drawn[part::4], batch_size=64) for part in range(4)]
    assert [audit.impossible for audit in audits] == [0] * 4
    assert sum(not audit.honest for audit in audits) <= 1, [str(audit) for audit in audits]  # one in a thousand is


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


def test_a_rollout_passes_in_training_mode_and_is_audited_like_its_tokens(model):
    torch.manual_seed(1)
    hot = make_sharp_model(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5).train()
    claim = {"temperature": 0.7, "top_k": 30, "eos_token_id": EOS, "min_new_tokens": 4}
    drawn = hot.rollout(EVEN, max_new_tokens=T, num_return_sequences=60, **claim)
    audit = audit_sampler(hot, drawn, generator=torch.Generator().manual_seed(0))
    assert audit.honest
    assert hot.training
    claim = {"prompt_length": 3, "attention_mask": drawn.attention_mask, "sampling": drawn.sampling}
    same = audit_sampler(hot, drawn.sequences, generator=torch.Generator().manual_seed(0), **claim)
    torch.testing.assert_close(same.transforms, audit.transforms)


def test_padding_and_micro_batches_change_nothing(model):
    torch.manual_seed(2)
    drawn = model.rollout(RAGGED, max_new_tokens=T, num_return_sequences=5, eos_token_id=EOS, min_new_tokens=2)
    expected = audit_sampler(model, drawn, generator=torch.Generator().manual_seed(0))
    wider = torch.nn.functional.pad(drawn.sequences, (3, 0), value=77)
    claim = {"attention_mask": torch.nn.functional.pad(drawn.attention_mask, (3, 0)), "sampling": drawn.sampling}
    for batch_size in (1, 7, 100):
        generator = torch.Generator().manual_seed(0)
        audit = audit_sampler(model, wider, prompt_length=8, generator=generator, batch_size=batch_size, **claim)
        torch.testing.assert_close(audit.transforms, expected.transforms, atol=1e-5, rtol=0)
        assert audit.bias_nats == pytest.approx(expected.bias_nats, abs=1e-5)


def test_logits_in_hand_are_audited_like_the_model(model):
    drawn = model.rollout(EVEN, max_new_tokens=T, eos_token_id=None, num_return_sequences=5)
    with torch.no_grad():
        logits = plain_twin(model)(drawn.sequences).logits[:, 2:-1]
    expected = audit_sampler(model, drawn, generator=torch.Generator().manual_seed(0))
    audit = audit_logits(logits, drawn.responses, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(audit.transforms, expected.transforms, atol=1e-5, rtol=0)


# Dishonest ones: each at 4,000 tokens


def test_padding_that_is_scored_is_caught(model):
    torch.manual_seed(0)
    sequences = generated(model, EVEN, copies=50)
    assert audit_sampler(model, sequences, prompt_length=3).p_value < 1e-4  # 4 * 50 * 20 columns
    assert audit_sampler(model, sequences, prompt_length=3, sampling=Sampling(eos_token_id=EOS)).honest


def test_an_end_that_was_suppressed_is_caught(model):
    torch.manual_seed(0)
    ends = list(range(1, 30))
    sequences = generated(model, EVEN, copies=50, min_new_tokens=T, eos_token_id=ends)
    claim = Sampling(eos_token_id=ends, min_new_tokens=T)
    assert audit_sampler(model, sequences, prompt_length=3).p_value < 1e-4  # 4 * 50 * 20 columns
    assert audit_sampler(model, sequences, prompt_length=3, sampling=claim).honest


@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": 50},
        {"temperature": 1.2},
        {"top_p": 0.9},
        {"repetition_penalty": 1.5},
        {"do_sample": False},
    ],
    ids=str,
)
def test_what_generate_did_and_nobody_claims_is_caught(model, settings):
    torch.manual_seed(0)
    sequences = enough(generated(model, EVEN, copies=350, **settings))
    audit = audit_sampler(model, sequences, prompt_length=3, sampling=Sampling(eos_token_id=EOS))
    assert audit.tokens < 4000 + T
    assert audit.p_value < 1e-4
    assert audit.verdict == "dishonest"


@pytest.mark.parametrize("settings", [{"top_k": 20, "temperature": 0.8}, {"top_p": 0.9, "min_new_tokens": 5}], ids=str)
def test_what_generate_did_and_is_claimed_passes(model, settings):
    torch.manual_seed(0)
    sequences = enough(generated(model, EVEN, copies=350, **settings))
    assert audit_sampler(model, sequences, prompt_length=3, sampling=Sampling(eos_token_id=EOS, **settings)).honest


def test_the_hidden_top_k_of_a_generation_config_is_caught(model):
    torch.manual_seed(0)
    prompts = EVEN.repeat(350, 1)
    always = {"do_sample": True, "max_new_tokens": T, "pad_token_id": 0, "eos_token_id": EOS}
    sequences = enough(model.generate(prompts, attention_mask=torch.ones_like(prompts), **always))
    assert audit_sampler(model, sequences, prompt_length=3, sampling=Sampling(eos_token_id=EOS)).p_value < 1e-4


def test_scoring_without_position_ids_and_with_dropout_is_caught(model):
    torch.manual_seed(0)
    drawn = model.rollout(RAGGED, max_new_tokens=T, eos_token_id=None, num_return_sequences=50)
    scorer = plain_twin(make_sharp_model(resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1))
    with torch.no_grad():
        unplaced = scorer(drawn.sequences, attention_mask=drawn.attention_mask).logits[:, 4:-1]
        positions = (drawn.attention_mask.cumsum(-1) - 1).clamp(min=0)
        noisy = scorer.train()(drawn.sequences, attention_mask=drawn.attention_mask, position_ids=positions).logits[
            :, 4:-1
        ]
    assert audit_sampler(model, drawn).honest
    assert audit_logits(unplaced, drawn.responses).p_value < 1e-4
    assert audit_logits(noisy, drawn.responses).p_value < 1e-4


@pytest.mark.parametrize("sampler", dishonest_samplers.DISHONEST, ids=lambda sampler: sampler.__name__)
def test_what_only_some_tokens_or_their_order_show_is_caught(sampler):
    """At 100 rows of 40 tokens; `make audit-power` counts how often."""
    model = make_sharp_model(n_layer=1)
    torch.manual_seed(1)
    prompts = torch.randint(0, 96, (100, 3))
    sequences = dishonest_samplers.draw(model, prompts, **sampler(100, 40, 96))
    audit = audit_sampler(model, sequences, prompt_length=3)
    assert audit.tokens == 4000
    assert not audit.honest
    assert audit.failed


def test_the_same_draws_pass_where_they_are_random_and_of_one_distribution():
    model = make_sharp_model(n_layer=1)
    torch.manual_seed(1)
    prompts = torch.randint(0, 96, (100, 3))
    sequences = dishonest_samplers.draw(model, prompts, **dishonest_samplers.honest(100, 40, 96))
    audit = audit_sampler(model, sequences, prompt_length=3)
    assert audit.honest
    assert audit.failed == ()


def test_banned_ids_of_a_large_vocabulary_are_caught():
    """Ids are counted in 512 groups; some tokens are frequent everywhere, as in any language."""
    torch.manual_seed(0)
    logits = 2 * torch.randn(2048) + 1.5 * torch.randn(100, 2048)
    tokens = torch.multinomial(logits.softmax(-1), 40, replacement=True)  # [100, 40]
    everywhere = logits[:, None].expand(100, 40, 2048)
    assert audit_logits(everywhere, tokens).honest
    for banned in (slice(1024, None), slice(0, None, 5)):
        fewer = logits.clone()
        fewer[:, banned] = -math.inf
        tokens = torch.multinomial(fewer.softmax(-1), 40, replacement=True)
        audit = audit_logits(everywhere, tokens)
        assert "identity" in audit.failed
        assert not audit.honest


def test_another_model_s_tokens_are_caught(model):
    torch.manual_seed(0)
    drawn = model.rollout(EVEN, max_new_tokens=T, eos_token_id=None, num_return_sequences=50)
    moved = copy.deepcopy(model)
    with torch.no_grad():
        moved.lm_head.weight.mul_(1.2)
    assert audit_sampler(moved, drawn).p_value < 1e-4


# Impossible tokens, edges, bias


def test_a_token_of_probability_zero_settles_it(model):
    torch.manual_seed(0)
    drawn = model.rollout(EVEN, max_new_tokens=T, eos_token_id=None, num_return_sequences=5)
    audit = audit_sampler(model, drawn.sequences, prompt_length=3, sampling=Sampling(top_k=50))
    assert 0 < audit.impossible < audit.tokens
    assert (audit.p_value, audit.verdict, audit.bias_nats) == (0.0, "dishonest", -math.inf)
    assert math.isnan(audit.standard_error)
    assert f"{audit.impossible} of them impossible" in str(audit)
    claim = Sampling(eos_token_id=list(range(48)), min_new_tokens=T)
    early = audit_sampler(model, dataclasses.replace(drawn, sampling=claim))
    assert early.impossible == (drawn.responses < 48).sum()


def test_a_tie_that_another_engine_broke_otherwise_is_not_impossible():
    logits = torch.tensor([3.0, 2.0, 2.0, 1.0]).expand(1000, 4)
    torch.manual_seed(0)
    first = torch.multinomial(logits[:, :2].softmax(-1), 1).squeeze(-1)  # this engine kept tokens 0 and 1
    other = torch.where(first == 1, 2, first)  # the other one 0 and 2
    for settings in (Sampling(top_k=2), Sampling(top_p=0.7)):
        assert audit_logits(logits, first, settings).honest
        assert audit_logits(logits, other, settings).honest
        third = other.clone()
        third[0] = 3
        assert audit_logits(logits, third, settings).impossible == 1


@pytest.mark.parametrize("temperature", [0.9, 1.0])
def test_the_bias_is_the_enumerated_one(temperature):
    """E_q[log p(x)] + H(p) over all sequences that a sampler of another temperature, q, draws; in float64."""
    V, length = 5, 3
    small = make_tiny_model(vocab_size=V, n_embd=16, n_layer=1, n_head=2)
    prompt = torch.tensor([1, 3])
    sequences = torch.cartesian_prod(*[torch.arange(V)] * length)
    tokens = torch.cat([prompt.expand(len(sequences), -1), sequences], 1)
    with torch.no_grad():
        logits = plain_twin(small)(tokens).logits[:, 1:-1].double()
    p, q = log_softmax(logits, -1), log_softmax(logits / temperature, -1)
    chosen_p, chosen_q = (x.gather(-1, sequences[..., None]).squeeze(-1) for x in (p, q))
    entropy = -(p.exp() * p).sum(-1)
    expected = (chosen_q.sum(1).exp() * (chosen_p + entropy).sum(1)).sum() / length
    torch.manual_seed(0)
    settings = {"temperature": temperature, "eos_token_id": None, "num_return_sequences": 10_000}
    drawn = rollout(small, prompt[None], max_new_tokens=length, **settings)
    audit = audit_sampler(small, drawn.sequences, prompt_length=2, batch_size=5000)
    assert abs(audit.bias_nats - expected) < 4 * audit.standard_error
    assert audit.honest == (temperature == 1.0)
    if temperature != 1.0:
        assert abs(expected) > 5 * audit.standard_error


# What is shown


def test_the_picture_is_flat_for_an_honest_sampler(model, tmp_path):
    torch.manual_seed(0)
    drawn = model.rollout(EVEN, max_new_tokens=T, eos_token_id=None, num_return_sequences=50)
    audit = audit_sampler(model, drawn)
    axes = audit.plot(tmp_path / "audit.png")
    heights = [bar.get_height() for bar in axes.patches if bar.get_width() < 0.06]
    assert (tmp_path / "audit.png").stat().st_size > 5000
    assert len(heights) == 20
    assert sum(heights) / 20 == pytest.approx(1)
    assert max(abs(height - 1) for height in heights) < 4 * math.sqrt(19 / audit.tokens)
    assert str(audit).startswith(f"honest: p = {audit.p_value:.2g}")


def test_the_report_is_plain_json(model):
    import json

    drawn = model.rollout(EVEN, max_new_tokens=T, eos_token_id=None, num_return_sequences=5)
    claim = {"prompt_length": 3, "sampling": Sampling(top_k=2)}
    for audit in (audit_sampler(model, drawn), audit_sampler(model, drawn.sequences, **claim)):
        report = json.loads(json.dumps(audit.to_json(), allow_nan=False))
        assert report["verdict"] == audit.verdict
        assert report["tokens"] == audit.tokens


def test_the_generator_decides_the_p_value(model):
    drawn = model.rollout(EVEN, max_new_tokens=T, eos_token_id=None, num_return_sequences=5)
    first, again, other = (
        audit_sampler(model, drawn, generator=torch.Generator().manual_seed(seed)).p_value for seed in (1, 1, 2)
    )
    assert first == again != other


# Bad input


def test_bad_input_is_refused_with_what_to_do(model):
    drawn = model.rollout(EVEN, max_new_tokens=T, eos_token_id=None, num_return_sequences=5)
    tokens = drawn.sequences
    mask = torch.ones_like(tokens)
    cases = [
        (ValueError, "prompt_length=None", {"prompt_length": None}),
        (ValueError, "prompt_length=0", {"prompt_length": 0}),
        (ValueError, "prompt_length=5.5", {"prompt_length": 5.5}),
        (ValueError, "at least 50", {"prompt_length": 22}),
        (ValueError, "at least 50", {"prompt_length": 23}),
        (ValueError, "attention_mask has another shape", {"attention_mask": mask[1:]}),
        (ValueError, "attention_mask holds other numbers", {"attention_mask": mask * 0.5}),
        (ValueError, "eos_token_id=96", {"sampling": Sampling(eos_token_id=96)}),
        (ValueError, "alpha=2", {"alpha": 2}),
        (ValueError, "alpha='1'", {"alpha": "1"}),
        (ValueError, "alpha=1", {"alpha": 1}),
        (TypeError, "generator is a int", {"generator": 7}),
        (ValueError, "batch_size=2.5", {"batch_size": 2.5}),
        (ValueError, "batch_size=0", {"batch_size": 0}),
        (ValueError, "outside the vocabulary of 96", {"tokens": tokens + 90}),
        (TypeError, r"float32 \[20, 23\]; expected a Rollout", {"tokens": tokens.float()}),
        (TypeError, r"expected a Rollout, as from rollout_from_tokens", {"tokens": tokens[0]}),
        (TypeError, r"got a list", {"tokens": list(tokens)}),
        (ValueError, "positions end at 64", {"tokens": tokens.repeat(1, 3)}),
        (ValueError, "there are no rows", {"tokens": drawn[[]], "prompt_length": None}),
        (TypeError, "got a Rollout together with", {"tokens": drawn}),
    ]
    for kind, words, claim in cases:
        with pytest.raises(kind, match=words):
            audit_sampler(model, **{"tokens": tokens, "prompt_length": 3, **claim})
    with pytest.raises(TypeError, match="expected a causal language model"):
        audit_sampler(lambda x: x, drawn)
    with pytest.raises(ValueError, match="NaN or infinite"):
        audit_logits(torch.full((60, 5), math.nan), torch.zeros(60, dtype=torch.long))


def test_a_package_s_own_rollout_is_one(model):
    """A model loaded with trust_remote_code returns a Rollout of its package's own module."""
    drawn = model.rollout(EVEN, max_new_tokens=T, eos_token_id=None, num_return_sequences=5)
    theirs = type("Rollout", (Rollout,), {})(**vars(drawn))
    assert audit_sampler(model, theirs).tokens == drawn.response_mask.sum()
