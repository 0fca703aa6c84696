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
from sampler_audit import audit_logits, audit_sampler

RAGGED = [torch.tensor(prompt) for prompt in ([5, 17, 3], [80], [41, 9, 7, 2, 64], [33, 12])]
EVEN = torch.tensor([[5, 17, 3], [80, 2, 4], [41, 9, 7], [33, 12, 50]])
EOS = [1, 2, 3, 4, 5, 6, 7, 8]  # several, so that rows of a random model end early
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


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.7, "top_k": 10, "top_p": 0.8, "eos_token_id": EOS, "min_new_tokens": 3}], ids=str
)
def test_p_values_of_honest_rollouts_are_uniform(model, settings):
    """Over 200 runs, which are rows of one large draw; and so are the biases in units of their standard errors."""
    torch.manual_seed(0)
    drawn = model.rollout(RAGGED, max_new_tokens=T, num_return_sequences=1000, **{"eos_token_id": None, **settings})
    drawn = drawn[torch.randperm(len(drawn))]
    audits = [audit_sampler(model, drawn[run::200], batch_size=64) for run in range(200)]
    assert stats.kstest([audit.p_value for audit in audits], "uniform").pvalue > 1e-3
    assert stats.kstest([audit.bias_nats / audit.standard_error for audit in audits], "norm").pvalue > 1e-3
    assert sum(not audit.honest for audit in audits) <= 2  # one in a thousand is called dishonest
    together = torch.cat([audit.transforms for audit in audits])
    assert stats.kstest(together.numpy(), "uniform").pvalue > 1e-3


def test_p_values_are_uniform_for_any_number_of_tokens():
    torch.manual_seed(0)
    logits = torch.randn(20_000, 7) * 2
    tokens = torch.multinomial(logits.softmax(-1), 1).squeeze(-1)
    for n in (50, 100, 1000):
        pieces = zip(logits.split(n), tokens.split(n), strict=True)
        p_values = [audit_logits(*piece).p_value for piece in pieces]
        assert stats.kstest(p_values, "uniform").pvalue > 1e-3


def test_the_p_value_is_that_of_a_g_test(model):
    audit = audit_sampler(model, model.rollout(EVEN, max_new_tokens=T, eos_token_id=None, num_return_sequences=20))
    widths = torch.tensor(audit.edges, dtype=torch.float64).diff()
    expected = widths / widths.sum() * audit.tokens
    g = stats.power_divergence(audit.histogram, expected.numpy(), lambda_="log-likelihood").statistic
    williams = 1 + ((1 / widths).sum().item() - 1) / (6 * audit.tokens * audit.degrees_of_freedom)
    assert audit.statistic == pytest.approx(g / williams, rel=1e-9)
    p_value = audit.tests["calibration"].p_value
    assert p_value == pytest.approx(stats.chi2.sf(audit.statistic, audit.degrees_of_freedom), rel=1e-6)
    smallest = min(test.p_value for test in audit.tests.values())
    assert audit.p_value == pytest.approx(1 - (1 - smallest) ** 4, rel=1e-6)  # Sidak's of four
    assert sum(audit.histogram) == audit.tokens == 4 * 20 * T


@pytest.mark.parametrize("shape", [(50,), (10, 5), (2, 60), (40, 10)], ids=str)
def test_few_tokens_give_no_more_false_alarms(shape):
    """Of each test alone: p-values below its share of the level, 1 in 4,000, where 0.4 of 1,500 are expected."""
    torch.manual_seed(0)
    small = Counter()
    for _ in range(1500):
        logits = torch.randn(*shape, 30) * 2
        tokens = torch.multinomial(logits.softmax(-1).view(-1, 30), 1).view(shape)
        audit = audit_logits(logits, tokens)
        small.update(name for name, test in audit.tests.items() if test.p_value < 2.5e-4)
    assert max(small.values(), default=0) <= 4


@pytest.mark.parametrize("settings", [{"top_k": 50}, {"top_p": 0.9}, {}], ids=str)
def test_honest_rollouts_in_bfloat16_pass(settings):
    """Sampling and auditing round otherwise, and so cut off otherwise; the rollout keeps what it drew from."""
    model = make_sharp_model().bfloat16()
    torch.manual_seed(0)
    drawn = model.rollout(RAGGED, max_new_tokens=T, num_return_sequences=150, **{"eos_token_id": None, **settings})
    audits = [audit_sampler(model, drawn[part::12], batch_size=64) for part in range(12)]
    assert [audit.impossible for audit in audits] == [0] * 12
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
    assert audit_sampler(moved, drawn.sequences, prompt_length=3, top_k=5).impossible > 0
    spoilt = dataclasses.replace(drawn, kept=~drawn.kept)  # a bit mask of the others
    assert audit_sampler(model, spoilt).impossible == drawn.response_mask.sum()


def test_a_rollout_passes_in_training_mode_and_is_audited_like_its_tokens(model):
    torch.manual_seed(1)
    hot = make_sharp_model(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5).train()
    claim = {"temperature": 0.7, "top_k": 30, "eos_token_id": EOS, "min_new_tokens": 4}
    drawn = hot.rollout(EVEN, max_new_tokens=T, num_return_sequences=60, **{"eos_token_id": None, **claim})
    audit = audit_sampler(hot, drawn, generator=torch.Generator().manual_seed(0))
    assert audit.honest
    assert hot.training
    same = audit_sampler(
        hot,
        drawn.sequences,
        prompt_length=3,
        attention_mask=drawn.attention_mask,
        generator=torch.Generator().manual_seed(0),
        **claim,
    )
    torch.testing.assert_close(same.transforms, audit.transforms)
    masked = audit_sampler(
        hot,
        drawn.sequences,
        response_mask=drawn.response_mask,
        attention_mask=drawn.attention_mask,
        generator=torch.Generator().manual_seed(0),
        **claim,
    )
    torch.testing.assert_close(masked.transforms, audit.transforms)


def test_lists_padding_and_micro_batches_change_nothing(model):
    torch.manual_seed(2)
    drawn = model.rollout(RAGGED, max_new_tokens=T, num_return_sequences=5, eos_token_id=EOS, min_new_tokens=2)
    lengths = [len(prompt) for prompt in RAGGED for _ in range(5)]
    rows = [row[mask.bool()] for row, mask in zip(drawn.sequences, drawn.attention_mask, strict=True)]
    claim = {"eos_token_id": EOS, "min_new_tokens": 2}
    expected = audit_sampler(model, drawn, generator=torch.Generator().manual_seed(0))
    for batch_size in (1, 7, 100):
        generator = torch.Generator().manual_seed(0)
        audit = audit_sampler(model, rows, prompt_length=lengths, generator=generator, batch_size=batch_size, **claim)
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
    assert audit_sampler(model, sequences, prompt_length=3, eos_token_id=EOS).honest


def test_an_end_that_was_suppressed_is_caught(model):
    torch.manual_seed(0)
    ends = list(range(1, 30))
    sequences = generated(model, EVEN, copies=50, min_new_tokens=T, eos_token_id=ends)
    assert audit_sampler(model, sequences, prompt_length=3).p_value < 1e-4  # 4 * 50 * 20 columns
    assert audit_sampler(model, sequences, prompt_length=3, eos_token_id=ends, min_new_tokens=T).honest


@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": 50},
        {"temperature": 0.8},
        {"temperature": 1.2},
        {"top_p": 0.9},
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 1},
        {"do_sample": False},
    ],
    ids=str,
)
def test_what_generate_did_and_nobody_claims_is_caught(model, settings):
    torch.manual_seed(0)
    sequences = enough(generated(model, EVEN, copies=350, **settings))
    audit = audit_sampler(model, sequences, prompt_length=3, eos_token_id=EOS)
    assert audit.tokens < 4000 + T
    assert audit.p_value < 1e-4
    assert audit.verdict == "dishonest"


@pytest.mark.parametrize(
    "settings", [{}, {"top_k": 20}, {"temperature": 0.8}, {"top_p": 0.9}, {"min_new_tokens": 5}], ids=str
)
def test_what_generate_did_and_is_claimed_passes(model, settings):
    torch.manual_seed(0)
    sequences = enough(generated(model, EVEN, copies=350, **settings))
    assert audit_sampler(model, sequences, prompt_length=3, eos_token_id=EOS, **settings).honest


def test_the_hidden_top_k_of_a_generation_config_is_caught(model):
    torch.manual_seed(0)
    prompts = EVEN.repeat(350, 1)
    always = {"do_sample": True, "max_new_tokens": T, "pad_token_id": 0, "eos_token_id": EOS}
    sequences = enough(model.generate(prompts, attention_mask=torch.ones_like(prompts), **always))
    assert audit_sampler(model, sequences, prompt_length=3, eos_token_id=EOS).p_value < 1e-4


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
    """At 40 rows of 100 tokens; `make audit-power` counts how often."""
    model = make_sharp_model(n_positions=128)
    torch.manual_seed(1)
    prompts = torch.randint(0, 96, (40, 3))
    sequences = dishonest_samplers.draw(model, prompts, **sampler(40, 100, 96))
    audit = audit_sampler(model, sequences, prompt_length=3)
    assert audit.tokens == 4000
    assert not audit.honest
    assert audit.failed


def test_the_same_draws_pass_where_they_are_random_and_of_one_distribution():
    model = make_sharp_model(n_positions=128)
    torch.manual_seed(1)
    prompts = torch.randint(0, 96, (40, 3))
    sequences = dishonest_samplers.draw(model, prompts, **dishonest_samplers.honest(40, 100, 96))
    audit = audit_sampler(model, sequences, prompt_length=3)
    assert audit.honest
    assert audit.failed == ()


def test_banned_ids_of_a_large_vocabulary_are_caught():
    """Ids are counted in 512 groups; some tokens are frequent everywhere, as in any language."""
    torch.manual_seed(0)
    logits = 2 * torch.randn(8192) + 1.5 * torch.randn(100, 8192)
    tokens = torch.multinomial(logits.softmax(-1), 40, replacement=True)  # [100, 40]
    everywhere = logits[:, None].expand(100, 40, 8192)
    assert audit_logits(everywhere, tokens).honest
    for banned in (slice(4096, None), slice(0, None, 5)):
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
    audit = audit_sampler(model, drawn.sequences, prompt_length=3, top_k=50)
    assert 0 < audit.impossible < audit.tokens
    assert (audit.p_value, audit.verdict, audit.bias_nats) == (0.0, "dishonest", -math.inf)
    assert math.isnan(audit.standard_error)
    assert f"{audit.impossible} of them impossible" in str(audit)
    ends = list(range(48))
    early = audit_sampler(
        model, drawn.sequences, response_mask=drawn.response_mask, eos_token_id=ends, min_new_tokens=T
    )
    assert early.impossible == (drawn.responses < 48).sum()


def test_a_tie_that_another_engine_broke_otherwise_is_not_impossible():
    logits = torch.tensor([3.0, 2.0, 2.0, 1.0]).expand(1000, 4)
    torch.manual_seed(0)
    first = torch.multinomial(logits[:, :2].softmax(-1), 1).squeeze(-1)  # this engine kept tokens 0 and 1
    other = torch.where(first == 1, 2, first)  # the other one 0 and 2
    for settings in ({"top_k": 2}, {"top_p": 0.7}):
        assert audit_logits(logits, first, **settings).honest
        assert audit_logits(logits, other, **settings).honest
        third = other.clone()
        third[0] = 3
        assert audit_logits(logits, third, **settings).impossible == 1


@pytest.mark.parametrize("temperature", [0.5, 0.9, 1.0, 2.0])
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
    drawn = rollout(
        small,
        prompt[None],
        max_new_tokens=length,
        eos_token_id=None,
        temperature=temperature,
        num_return_sequences=20_000,
    )
    audit = audit_sampler(small, drawn.sequences, prompt_length=2, batch_size=5000)
    assert abs(audit.bias_nats - expected) < 4 * audit.standard_error
    assert audit.honest == (temperature == 1.0)
    if temperature != 1.0:
        assert abs(expected) > 10 * audit.standard_error


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
    for audit in (audit_sampler(model, drawn), audit_sampler(model, drawn.sequences, prompt_length=3, top_k=2)):
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
    hidden = mask.clone()
    hidden[:, -1] = 0
    everything = mask.bool()
    cases = [
        (TypeError, "neither prompt_length nor", {}),
        (TypeError, "both prompt_length and", {"prompt_length": 3, "response_mask": everything}),
        (ValueError, "expected 1 to 23", {"prompt_length": 0}),
        (ValueError, "expected 1 to 23", {"prompt_length": 24}),
        (ValueError, "one for each of 20 rows", {"prompt_length": [3, 3]}),
        (ValueError, "first token", {"response_mask": everything}),
        (ValueError, "response_mask has shape", {"response_mask": everything[:3]}),
        (ValueError, "attention_mask has shape", {"prompt_length": 3, "attention_mask": mask[:, 1:]}),
        (ValueError, "claims column 22 as drawn", {"prompt_length": 3, "attention_mask": hidden}),
        (ValueError, "temperature=0", {"prompt_length": 3, "temperature": 0.0}),
        (ValueError, "top_p=1.5", {"prompt_length": 3, "top_p": 1.5}),
        (ValueError, "top_k=-1", {"prompt_length": 3, "top_k": -1}),
        (ValueError, "no effect without eos_token_id", {"prompt_length": 3, "min_new_tokens": 2}),
        (ValueError, "min_new_tokens=-2", {"prompt_length": 3, "min_new_tokens": -2, "eos_token_id": 1}),
        (ValueError, "eos_token_id=96", {"prompt_length": 3, "eos_token_id": 96}),
        (ValueError, "at least 50", {"prompt_length": 22}),
        (ValueError, "alpha=2", {"prompt_length": 3, "alpha": 2}),
        (ValueError, "alpha='1'", {"prompt_length": 3, "alpha": "1"}),
        (ValueError, "alpha=1", {"prompt_length": 3, "alpha": 1}),
        (TypeError, "prompt_length=5.5", {"prompt_length": 5.5}),
        (TypeError, "prompt_length='3'", {"prompt_length": "3"}),
        (TypeError, "generator is a int", {"prompt_length": 3, "generator": 7}),
        (ValueError, "attention_mask holds other numbers", {"prompt_length": 3, "attention_mask": mask * 0.5}),
        (ValueError, "response_mask holds other numbers", {"response_mask": mask * 2}),
        (ValueError, "batch_size=2.5", {"prompt_length": 3, "batch_size": 2.5}),
        (ValueError, "attention_mask has shape", {"prompt_length": 3, "attention_mask": [[1, 1]]}),
        (ValueError, "batch_size=0", {"prompt_length": 3, "batch_size": 0}),
        (ValueError, "top_k=2.5", {"prompt_length": 3, "top_k": 2.5}),
    ]
    for kind, words, claim in cases:
        with pytest.raises(kind, match=words):
            audit_sampler(model, tokens, **claim)
    with pytest.raises(TypeError, match="Rollout together with temperature"):
        audit_sampler(model, drawn, temperature=1.0)
    with pytest.raises(ValueError, match="outside the vocabulary of 96"):
        audit_sampler(model, torch.where(everything, tokens + 90, tokens), prompt_length=3)
    with pytest.raises(TypeError, match=r"try \.long\(\)"):
        audit_sampler(model, tokens.float(), prompt_length=3)
    with pytest.raises(ValueError, match=r"expected \[batch, tokens\]"):
        audit_sampler(model, tokens[0], prompt_length=3)
    with pytest.raises(ValueError, match="list of 1-D tensors"):
        audit_sampler(model, [], prompt_length=3)
    with pytest.raises(TypeError, match="not texts"):
        audit_sampler(model, ["a text"], prompt_length=3)
    with pytest.raises(ValueError, match="a list needs none"):
        audit_sampler(model, list(tokens), prompt_length=3, attention_mask=mask)
    with pytest.raises(ValueError, match="positions end at 64"):
        audit_sampler(model, tokens.repeat(1, 3), prompt_length=3)
    with pytest.raises(ValueError, match="there are no rows"):
        audit_sampler(model, drawn[[]])
    with pytest.raises(TypeError, match="logits is a NoneType"):
        audit_logits(None, None)
    with pytest.raises(TypeError, match="complex64; expected a float dtype"):
        audit_logits(torch.zeros(60, 5) * 1j, torch.zeros(60, dtype=torch.long))
    with pytest.raises(TypeError, match="audit_logits"):
        audit_sampler(lambda x: x, drawn)
    with pytest.raises(ValueError, match=r"tokens \[3\]"):
        audit_logits(torch.zeros(2, 5), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="NaN or infinite"):
        audit_logits(torch.full((60, 5), math.nan), torch.zeros(60, dtype=torch.long))


def test_a_package_s_own_rollout_is_one(model):
    """A model loaded with trust_remote_code returns a Rollout of its package's own module."""
    drawn = model.rollout(EVEN, max_new_tokens=T, eos_token_id=None, num_return_sequences=5)
    foreign = dataclasses.make_dataclass("Rollout", [field.name for field in dataclasses.fields(Rollout)])
    theirs = foreign(**{field.name: getattr(drawn, field.name) for field in dataclasses.fields(Rollout)})
    assert audit_sampler(model, theirs).tokens == drawn.response_mask.sum()
