"""The arithmetic of examples/ppo.py against slow plain loops in float64, and the details that others got wrong."""

import math

import ppo
import pytest
import torch

B, T = 7, 9
CLOSE = {"atol": 1e-9, "rtol": 0}


def batch(seed):
    """Random `[B, T]` float64 tensors and a mask of prefixes: a row of one token, and one of all, among them."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, T + 1, (B,), generator=generator)
    lengths[0], lengths[1] = 1, T
    mask = torch.arange(T) < lengths[:, None]
    names = ("logprobs", "old_logprobs", "ref_logprobs", "values", "old_values", "rewards", "advantages", "returns")
    found = {name: torch.randn(B, T, generator=generator, dtype=torch.float64) for name in names}
    return {**found, "scores": torch.randn(B, generator=generator, dtype=torch.float64), "mask": mask}


@pytest.fixture(params=range(5))
def data(request):
    return batch(request.param)


def drawn(mask):
    """All (row, column) of drawn tokens."""
    return [(b, t) for b in range(B) for t in range(T) if mask[b, t]]


def with_garbage(tensor, mask):
    """The same numbers, and large ones where nothing was drawn."""
    return torch.where(mask, tensor, 1e6 * torch.randn_like(tensor))


def test_token_rewards_are_those_of_a_plain_loop(data):
    expected = torch.zeros(B, T, dtype=torch.float64)
    for b in range(B):
        tokens = [t for t in range(T) if data["mask"][b, t]]
        for t in tokens:
            expected[b, t] = -0.3 * (data["logprobs"][b, t] - data["ref_logprobs"][b, t])
        expected[b, tokens[-1]] += data["scores"][b]
    found = ppo.token_rewards(data["scores"], data["logprobs"], data["ref_logprobs"], data["mask"], 0.3)
    torch.testing.assert_close(found, expected, **CLOSE)


def test_the_score_stands_on_the_last_drawn_token_and_on_no_padding(data):
    zero = torch.zeros(B, T, dtype=torch.float64)
    found = ppo.token_rewards(data["scores"], zero, zero, data["mask"], 0.3)
    for b in range(B):
        last = int(data["mask"][b].sum()) - 1
        assert found[b, last] == data["scores"][b]
        assert found[b].count_nonzero() == 1


@pytest.mark.parametrize("bootstrapped", [False, True])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)])
def test_advantages_and_returns_are_those_of_a_plain_loop(data, gamma, lam, bootstrapped):
    bootstrap = data["scores"] * (data["mask"].sum(1) == T) if bootstrapped else None
    expected = torch.zeros(B, T, dtype=torch.float64)
    for b in range(B):
        length = int(data["mask"][b].sum())
        values = data["values"][b, :length].tolist()
        values.append(float(bootstrap[b]) if bootstrapped else 0.0)
        for t in range(length):  # equation 16: a discounted sum of errors, no recursion
            for k in range(t, length):
                error = data["rewards"][b, k] + gamma * values[k + 1] - values[k]
                expected[b, t] += (gamma * lam) ** (k - t) * error
    advantages, returns = ppo.advantages_and_returns(
        data["rewards"], data["values"], data["mask"], gamma, lam, bootstrap
    )
    torch.testing.assert_close(advantages, expected, **CLOSE)
    torch.testing.assert_close(returns, torch.where(data["mask"], expected + data["values"], 0), **CLOSE)


def test_nothing_after_the_end_leaks_into_advantages(data):
    mask = data["mask"]
    clean = ppo.advantages_and_returns(data["rewards"], data["values"], mask, 1.0, 0.95)
    garbage = (with_garbage(data[name], mask) for name in ("rewards", "values"))
    for found, expected in zip(ppo.advantages_and_returns(*garbage, mask, 1.0, 0.95), clean, strict=True):
        torch.testing.assert_close(found, expected, **CLOSE)
        assert not found[~mask].any()


def test_without_an_argument_a_truncated_row_ends_like_the_others():
    one = torch.ones(1, 1, dtype=torch.float64)
    advantages, _ = ppo.advantages_and_returns(one, 0 * one, one.bool(), 1.0, 1.0)
    bootstrapped, _ = ppo.advantages_and_returns(one, 0 * one, one.bool(), 1.0, 1.0, torch.tensor([5.0]))
    assert advantages.item() == 1
    assert bootstrapped.item() == 6


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_is_that_of_a_plain_loop(data, shift_mean):
    x, mask = data["advantages"] * 3 + 2, data["mask"]
    numbers = [float(x[b, t]) for b, t in drawn(mask)]
    mean = math.fsum(numbers) / len(numbers)
    deviation = math.sqrt(math.fsum((number - mean) ** 2 for number in numbers) / len(numbers) + 1e-8)
    expected = torch.zeros(B, T, dtype=torch.float64)
    for b, t in drawn(mask):
        expected[b, t] = (x[b, t] - mean) / deviation + (0 if shift_mean else mean)
    torch.testing.assert_close(ppo.whiten(with_garbage(x, mask), mask, shift_mean), expected, **CLOSE)


def test_the_policy_loss_is_that_of_a_plain_loop(data):
    total = 0.0
    for b, t in drawn(data["mask"]):
        ratio = math.exp(data["logprobs"][b, t] - data["old_logprobs"][b, t])
        advantage = float(data["advantages"][b, t])
        total += max(-advantage * ratio, -advantage * min(max(ratio, 0.8), 1.2))
    found = ppo.policy_loss(data["logprobs"], data["old_logprobs"], data["advantages"], data["mask"], 0.2)
    assert found.item() == pytest.approx(total / int(data["mask"].sum()), abs=1e-9)


def test_the_value_loss_is_that_of_a_plain_loop(data):
    total = 0.0
    for b, t in drawn(data["mask"]):
        value, old, target = (float(data[name][b, t]) for name in ("values", "old_values", "returns"))
        clipped = min(max(value, old - 0.2), old + 0.2)
        total += max((value - target) ** 2, (clipped - target) ** 2) / 2
    found = ppo.value_loss(data["values"], data["old_values"], data["returns"], data["mask"], 0.2)
    assert found.item() == pytest.approx(total / int(data["mask"].sum()), abs=1e-9)


def test_padding_has_no_part_in_the_losses_and_no_gradient(data):
    mask = data["mask"]
    for loss, names in (
        (ppo.policy_loss, ("logprobs", "old_logprobs", "advantages")),
        (ppo.value_loss, ("values", "old_values", "returns")),
    ):
        clean = loss(*(data[name] for name in names), mask, 0.2)
        first, *others = (with_garbage(data[name], mask) for name in names)
        first.requires_grad_()
        found = loss(first, *others, mask, 0.2)
        found.backward()
        assert found.item() == pytest.approx(clean.item(), abs=1e-9)
        assert not first.grad[~mask].any()
        assert first.grad[mask].any()


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_kl_estimates_agree_with_the_exact_kl_on_average(kind):
    """Over all tokens of a vocabulary, weighted by their probability, an estimate's mean is the KL itself."""
    policy, reference = torch.randn(2, 50, dtype=torch.float64).log_softmax(-1)
    estimate = ppo.kl_estimate(policy, reference, kind)
    exact = (policy.exp() * (policy - reference)).sum()
    assert (policy.exp() * estimate).sum().item() == pytest.approx(exact.item(), abs=1e-9)
    assert kind == "k1" or (estimate >= 0).all()


def test_explained_variance_is_one_for_perfect_values_and_zero_for_constant_ones(data):
    returns, mask = data["returns"], data["mask"]
    assert ppo.explained_variance(with_garbage(returns, mask), returns, mask) == pytest.approx(1)
    assert ppo.explained_variance(torch.full_like(returns, 3), returns, mask) == pytest.approx(0)
    assert ppo.explained_variance(returns, torch.ones_like(returns), mask) == 0
    residual = torch.tensor([float(returns[b, t] - data["values"][b, t]) for b, t in drawn(mask)])
    expected = 1 - residual.var(correction=0) / returns[mask].var(correction=0)
    assert ppo.explained_variance(data["values"], returns, mask) == pytest.approx(expected.item(), abs=1e-6)


def test_a_response_without_an_end_is_scored_as_the_options_say():
    scores, truncated = torch.tensor([1.0, 2.0]), torch.tensor([False, True])
    assert ppo.final_scores(scores, truncated, None, 0.0).tolist() == [1.0, 2.0]
    assert ppo.final_scores(scores, truncated, -1.0, 0.0).tolist() == [1.0, -1.0]
    assert ppo.final_scores(scores, truncated, None, 0.5).tolist() == [1.0, 1.5]
    assert ppo.final_scores(scores, truncated, -1.0, 0.5).tolist() == [1.0, -1.5]


def test_the_controller_moves_the_coefficient_towards_the_target():
    controller = ppo.AdaptiveKLController(0.2, 6.0, 10_000)
    controller.update(6.6, 64)  # a tenth too much
    assert controller.value == pytest.approx(0.2 * (1 + 0.1 * 64 / 10_000), abs=1e-12)
    controller = ppo.AdaptiveKLController(0.2, 6.0, 10_000)
    controller.update(600, 64)  # the error is clipped to 0.2, on both sides
    assert controller.value == pytest.approx(0.2 * (1 + 0.2 * 64 / 10_000), abs=1e-12)
    controller = ppo.AdaptiveKLController(0.2, 6.0, 10_000)
    controller.update(-600, 64)
    assert controller.value == pytest.approx(0.2 * (1 - 0.2 * 64 / 10_000), abs=1e-12)
    fixed = ppo.AdaptiveKLController(0.2, None, 10_000)
    fixed.update(600, 64)
    assert fixed.value == 0.2
