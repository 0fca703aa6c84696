"""The arithmetic of gpt2_value.ppo against slow plain loops in float64, and the details that others got wrong."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import gradcheck

from gpt2_value import (
    AdaptiveKLController,
    GPT2ValueConfig,
    GPT2ValueModel,
    advantages_and_returns,
    create_reference,
    explained_variance,
    fit_values,
    kl_estimate,
    masked_mean,
    policy_loss,
    rollout,
    token_rewards,
    value_loss,
    whiten,
)
from gpt2_value.ppo import length_adaptive_lambda

B, T = 7, 9
NAMES = ["logprobs", "old_logprobs", "ref_logprobs", "values", "old_values", "rewards", "advantages", "returns"]


@pytest.fixture(params=range(6))
def data(request):
    """Random `[B, T]` float64 tensors, and a mask: of prefixes, or (odd seeds) with holes between drawn tokens."""
    generator = torch.Generator().manual_seed(request.param)
    lengths = torch.randint(1, T + 1, (B,), generator=generator)
    lengths[0], lengths[1] = 1, T
    mask = torch.arange(T) < lengths[:, None]
    if request.param % 2:
        mask &= torch.rand(B, T, generator=generator) < 0.6
        mask[0, 4] = True
    shapes = {**dict.fromkeys(NAMES, (B, T)), "scores": (B,)}
    found = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    return SimpleNamespace(mask=mask, drawn=mask.nonzero().tolist(), **found)


def with_garbage(tensor, mask):
    """The same numbers, and none where nothing was drawn."""
    return torch.where(mask, tensor, math.nan)


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("is_per_token", [False, True])
def test_token_rewards_are_those_of_a_plain_loop(data, is_per_token):
    mask, scores = data.mask, data.rewards if is_per_token else data.scores
    kl = data.logprobs - data.ref_logprobs
    expected = torch.zeros(B, T, dtype=torch.float64)
    for b, t in data.drawn:
        expected[b, t] = -0.3 * kl[b, t]
        if is_per_token:
            expected[b, t] += scores[b, t]
        elif not mask[b, t + 1 :].any():
            expected[b, t] += scores[b]
    assert_close(token_rewards(scores, with_garbage(data.logprobs, mask), data.ref_logprobs, mask, 0.3), expected)
    assert_close(token_rewards(scores, data.values, None, mask, 0.3, kl), expected)


@pytest.mark.parametrize("bootstrapped", [False, True])
@pytest.mark.parametrize(
    ("gamma", "lam", "lam_critic"),
    [(1.0, 0.95, None), (0.9, 0.5, 1.0), (1.0, 1.0, 0.3), (0.99, 0.0, 0.7), (0.9, None, None), (1.0, None, 0.3)],
)
def test_advantages_and_returns_are_those_of_a_plain_loop(data, gamma, lam, lam_critic, bootstrapped):
    """A lambda of None is another one for each row."""
    mask, bootstrap = data.mask, data.scores if bootstrapped else None
    lam = length_adaptive_lambda(mask, 0.5).double() if lam is None else lam

    def estimates(lam):
        """Equation 16: a discounted sum of errors over the drawn tokens of a row, without recursion."""
        found = torch.zeros(B, T, dtype=torch.float64)
        lambdas = torch.as_tensor(lam, dtype=torch.float64).expand(B)
        for b in range(B):
            columns = [t for t in range(T) if mask[b, t]]
            values = [data.values[b, t] for t in columns] + [data.scores[b] if bootstrapped else 0.0]
            for i in range(len(columns)):
                for k in range(i, len(columns)):
                    error = data.rewards[b, columns[k]] + gamma * values[k + 1] - values[k]
                    found[b, columns[i]] += (gamma * lambdas[b]) ** (k - i) * error
        return found

    rewards, values = with_garbage(data.rewards, mask), with_garbage(data.values, mask)
    advantages, returns = advantages_and_returns(rewards, values, mask, gamma, lam, bootstrap, lam_critic)
    assert_close(advantages, estimates(lam))
    assert_close(returns, torch.where(mask, estimates(lam if lam_critic is None else lam_critic) + data.values, 0))


def test_a_longer_response_has_a_larger_lambda():
    mask = torch.arange(200) < torch.tensor([[1], [10], [40], [200]])
    torch.testing.assert_close(length_adaptive_lambda(mask, 0.05), torch.tensor([0.0, 0.0, 0.5, 0.9]))


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitened_numbers_have_deviation_1_and_mean_0_or_their_own(data, shift_mean):
    x, mask = data.values * 3 + 2, data.mask
    mean, variance = x[mask].mean(), x[mask].var(correction=0)
    expected = (x - mean) / (variance + 1e-8).sqrt() + (0 if shift_mean else mean)
    assert_close(whiten(with_garbage(x, mask), mask, shift_mean), torch.where(mask, expected, 0))


@pytest.mark.parametrize(("clip_high", "highest"), [(None, 1.2), (0.4, 1.4)])
def test_the_losses_are_those_of_plain_loops(data, clip_high, highest):
    of_policy = of_values = 0.0
    for b, t in data.drawn:
        ratio, advantage = math.exp(data.logprobs[b, t] - data.old_logprobs[b, t]), float(data.advantages[b, t])
        of_policy += max(-advantage * ratio, -advantage * min(max(ratio, 0.8), highest))
        value, old, target = (float(column[b, t]) for column in (data.values, data.old_values, data.returns))
        clipped = min(max(value, old - 0.2), old + 0.2)
        of_values += max((value - target) ** 2, (clipped - target) ** 2) / 2
    found = policy_loss(data.logprobs, data.old_logprobs, data.advantages, data.mask, clip=0.2, clip_high=clip_high)
    assert found.item() == pytest.approx(of_policy / len(data.drawn), abs=1e-9)
    found = value_loss(data.values, data.old_values, data.returns, data.mask, 0.2)
    assert found.item() == pytest.approx(of_values / len(data.drawn), abs=1e-9)


@pytest.mark.parametrize(
    ("loss", "names"),
    [(policy_loss, ("logprobs", "old_logprobs", "advantages")), (value_loss, ("values", "old_values", "returns"))],
)
def test_gradients_are_those_of_finite_differences_and_padding_has_none(data, loss, names):
    mask, clean = data.mask, [getattr(data, name) for name in names]
    assert gradcheck(lambda x: loss(x, *clean[1:], mask, 0.2), clean[0].clone().requires_grad_())
    spoilt, *others = (with_garbage(column, mask) for column in clean)
    found = loss(spoilt.requires_grad_(), *others, mask, 0.2)
    found.backward()
    assert found.item() == pytest.approx(loss(*clean, mask, 0.2).item(), abs=1e-9)
    assert not spoilt.grad[~mask].any()
    assert spoilt.grad[mask].any()


def test_kl_estimates_agree_with_the_exact_kl_on_average():
    """Over all tokens of a vocabulary, weighted by their probability, an estimate's mean is the KL itself."""
    policy, reference = torch.randn(2, 50, dtype=torch.float64).log_softmax(-1)
    exact = (policy.exp() * (policy - reference)).sum()
    for kind in ("k1", "k3"):
        assert_close((policy.exp() * kl_estimate(policy, reference, kind)).sum(), exact)
    assert (kl_estimate(policy, reference, "k3") >= 0).all()


def test_explained_variance_is_one_for_perfect_values_and_zero_for_constant_ones(data):
    returns, mask = data.returns, data.mask
    assert explained_variance(with_garbage(returns, mask), returns, mask) == pytest.approx(1)
    assert explained_variance(torch.full_like(returns, 3), returns, mask) == pytest.approx(0)
    assert explained_variance(returns, torch.ones_like(returns), mask) == 0
    expected = 1 - (returns - data.values)[mask].var(correction=0) / returns[mask].var(correction=0)
    assert explained_variance(data.values, returns, mask) == pytest.approx(expected.item(), abs=1e-6)


def test_what_torch_would_broadcast_in_silence_is_refused(data):
    one, all_, mask = data.scores[:, None], data.values, data.mask
    for function, arguments in (
        (token_rewards, (one, all_, all_, mask, 0.1)),
        (advantages_and_returns, (one, all_, mask)),
        (advantages_and_returns, (all_, all_, mask, 1.0, one)),
        (policy_loss, (all_, all_, one, mask)),
    ):
        with pytest.raises(ValueError, match=r"has shape .*expected \[7"):
            function(*arguments)
    with pytest.raises(ValueError, match=r"mask is torch.int64.*try mask.bool\(\)"):
        masked_mean(all_, mask.long())


@pytest.mark.parametrize(
    ("kl", "target", "factor"),
    [
        (6.6, 6.0, 1 + 0.1 * 64 / 10_000),  # a tenth too much
        (600, 6.0, 1 + 0.2 * 64 / 10_000),  # the error is clipped to 0.2, on both sides
        (-600, 6.0, 1 - 0.2 * 64 / 10_000),
        (600, None, 1),
    ],
)
def test_the_controller_moves_the_coefficient_towards_the_target(kl, target, factor):
    controller = AdaptiveKLController(0.2, target, 10_000)
    controller.update(kl, 64)
    assert controller.value == pytest.approx(0.2 * factor, abs=1e-12)


# The critic and the reference


@pytest.fixture
def model():
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 20, "n_positions": 32}
    return GPT2ValueModel(GPT2ValueConfig(**sizes, initializer_range=0.2, bos_token_id=0, eos_token_id=0))


@pytest.mark.parametrize("body", [False, True])
def test_fitted_values_explain_returns_of_rows_that_they_did_not_learn_from(model, body):
    queries = [torch.tensor([1, 2])] * 48
    parts = [rollout(model, queries, max_new_tokens=T, eos_token_id=0) for T in (6, 9)]
    weight = torch.randn(20, generator=torch.Generator().manual_seed(0))
    returns = [weight[part.sequences[:, 1:-1]] * part.response_mask for part in parts]  # of the token before
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = fit_values(model, parts, returns, body=body, epochs=15, learning_rate=3e-3 if body else 3e-2)
    assert found.explained_variance_before == 0  # a new head says 0 everywhere
    assert found.explained_variance_after > 0.3
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert (changed == {"v_head.summary.weight", "v_head.summary.bias"}) != body


@pytest.mark.parametrize("shared", [0, 1, 2])
def test_a_reference_shares_the_layers_that_it_is_told_to_share(model, shared):
    reference = create_reference(model, shared)
    assert not any(weight.requires_grad for weight in reference.parameters())
    theirs = {weight.data_ptr() for weight in reference.parameters()}
    own = {name for name, weight in model.named_parameters() if weight.data_ptr() not in theirs}
    shared_parts = ["wte.", "wpe.", *(f"h.{number}." for number in range(shared))] if shared else []
    below = tuple(f"transformer.{part}" for part in shared_parts)
    assert own == {name for name, _ in model.named_parameters() if not name.startswith(below)}
    assert own == {name for name, weight in model.named_parameters() if weight.requires_grad}


def test_more_layers_than_there_are_cannot_be_shared(model):
    with pytest.raises(ValueError, match="shared_layers=3; expected 0 to 2"):
        create_reference(model, 3)
