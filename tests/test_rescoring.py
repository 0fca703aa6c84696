"""Lean scoring: never `[B, T, vocabulary]`, and the numbers and gradients of the plain computation."""

import pytest
import torch
from conftest import make_tiny_model, plain_twin, sampling_logprobs

import scoring_gpt2_value
from generation_gpt2_value import rescore, rollout

RAGGED = [torch.tensor(prompt) for prompt in ([5, 17, 3], [80], [41, 9, 7, 2, 64], [33, 12])]
EOS = [1, 2, 3, 4, 5, 6, 7, 8]
SETTINGS = [
    {},
    {"temperature": 0.7},
    {"top_k": 12},
    {"top_p": 0.8},
    {"min_new_tokens": 4, "eos_token_id": EOS},
    {"temperature": 1.5, "top_k": 30, "top_p": 0.9, "eos_token_id": EOS},
]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(scoring_gpt2_value, "CHUNK", 96 * 7)  # 7 tokens at a time
    monkeypatch.setattr(scoring_gpt2_value, "KEPT_BYTES", 0)


def plainly(model, drawn, with_reference=None):
    """Log-probabilities, values, entropy and KL by full logits of the whole sequences, in one piece."""
    T = drawn.responses.shape[1]
    output = model(drawn.sequences, attention_mask=drawn.attention_mask)
    early = (torch.arange(T) < drawn.sampling.min_new_tokens).expand(len(drawn), T)
    logprobs = sampling_logprobs(output.logits[:, -T - 1 : -1], drawn.sampling, early=early, kept=drawn.kept)
    taken = logprobs.gather(-1, drawn.responses[..., None]).squeeze(-1)
    possible = logprobs.exp() > 0
    entropy = -(logprobs.exp() * logprobs.masked_fill(~possible, 0.0)).sum(-1)
    found = {"logprobs": taken, "values": output.value[:, -T - 1 : -1], "entropy": entropy}
    return {name: torch.where(drawn.response_mask, numbers, 0.0) for name, numbers in found.items()}


@pytest.mark.parametrize("head", ["plain", "hooked"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_lean_scoring_gives_the_numbers_and_gradients_of_full_logits(settings, head):
    model = make_tiny_model()
    if head == "hooked":
        model.lm_head.register_forward_hook(lambda module, args, output: None)
    drawn = rollout(model, RAGGED, max_new_tokens=10, **settings)
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
    for place in [(0, 0), (3, 7), (5, 20), (7, 31)]:
        step = torch.zeros_like(at)
        step[place] = 1e-6
        numeric = (scores(at + step) - scores(at - step)).item() / 2e-6
        assert analytic[place].item() == pytest.approx(numeric, abs=1e-7, rel=1e-6)


@pytest.mark.parametrize("head", ["plain", "hooked"])
@pytest.mark.parametrize("grad", [True, False])
def test_no_more_than_a_chunk_of_logits_is_held(grad, head, monkeypatch):
    model = make_tiny_model()
    drawn = rollout(model, RAGGED, max_new_tokens=10, eos_token_id=EOS)
    if head == "hooked":
        model.lm_head.register_forward_hook(lambda module, args, output: None)
    seen = []
    original = scoring_gpt2_value.sampling_distribution

    def watched(logits, *settings, **more):
        seen.append(tuple(logits.shape))
        return original(logits, *settings, **more)

    rescore(model, drawn)  # checks itself, so that the next need not
    monkeypatch.setattr(scoring_gpt2_value, "sampling_distribution", watched)
    with torch.set_grad_enabled(grad):
        scored = rescore(model, drawn)
    assert max(rows for rows, _ in seen) == 7
    assert sum(rows for rows, _ in seen) == drawn.response_mask.sum()  # padding is not scored
    if grad:
        (scored.logprobs.sum() + scored.values.sum()).backward()
        assert sum(rows for rows, _ in seen) == 2 * drawn.response_mask.sum()  # each chunk once more
        assert max(rows for rows, _ in seen) == 7


@pytest.mark.parametrize("settings", SETTINGS[:2] + SETTINGS[4:5], ids=str)
def test_the_divergence_to_a_reference_is_the_sum_over_the_vocabulary(settings):
    model, other = make_tiny_model(seed=0), plain_twin(make_tiny_model(seed=1))
    drawn = rollout(model, RAGGED, max_new_tokens=10, **settings)
    kl = rescore(model, drawn, reference=other).kl
    T = 10
    suppress = torch.zeros((T, 96), dtype=torch.bool)
    suppress[: drawn.sampling.min_new_tokens, list(drawn.sampling.eos_token_id)] = True
    positions = (drawn.attention_mask.cumsum(-1) - 1).clamp(min=0)
    p, q = (
        m(drawn.sequences, attention_mask=drawn.attention_mask, position_ids=positions).logits[:, -T - 1 : -1].double()
        for m in (model, other)
    )
    p, q = ((logits.masked_fill(suppress, -1e9) / drawn.sampling.temperature).log_softmax(-1) for logits in (p, q))
    expected = torch.where(drawn.response_mask, (p.exp() * (p - q)).sum(-1), 0.0)
    torch.testing.assert_close(kl.double(), expected, atol=1e-4, rtol=1e-4)
    assert (kl[drawn.response_mask] > 0).all()
    assert rescore(model, drawn, reference=plain_twin(model)).kl.abs().max() < 1e-5


@pytest.mark.parametrize("settings", [{"top_k": 2}, {"top_p": 0.5}, {"top_k": 20, "top_p": 0.8}], ids=str)
def test_the_divergence_is_over_the_tokens_that_were_kept(settings):
    model, other = make_tiny_model(seed=0), make_tiny_model(seed=1)
    drawn = rollout(model, RAGGED, max_new_tokens=6, eos_token_id=None, **settings)
    scored = rescore(model, drawn, reference=other, with_entropy=True)
    p, q = (
        sampling_logprobs(
            m(drawn.sequences, attention_mask=drawn.attention_mask).logits[:, -7:-1].double(),
            drawn.sampling,
            kept=drawn.kept,
        )
        for m in (model, other)
    )
    kept = p.exp() > 0
    assert torch.equal(kept, q.exp() > 0)
    p_kept, q_kept = p.masked_fill(~kept, 0.0), q.masked_fill(~kept, 0.0)
    torch.testing.assert_close(scored.kl.double(), (p.exp() * (p_kept - q_kept)).sum(-1), atol=1e-5, rtol=0)
    torch.testing.assert_close(scored.entropy.double(), -(p.exp() * p_kept).sum(-1), atol=1e-5, rtol=0)
    assert rescore(model, drawn, reference=plain_twin(model)).kl.abs().max() < 1e-5


def test_the_divergence_teaches_the_model_and_not_the_reference():
    model, other = make_tiny_model(seed=0), make_tiny_model(seed=1)
    drawn = rollout(model, RAGGED, max_new_tokens=6)
    rescore(model, drawn, reference=other).kl.mean().backward()
    assert model.transformer.wte.weight.grad.abs().sum() > 0
    assert other.transformer.wte.weight.grad is None


def test_the_mean_of_the_log_ratio_is_the_divergence():
    """Two ways to compute one number: the estimate from draws that PPO uses, and the sum over the vocabulary."""
    model, other = make_tiny_model(seed=0), make_tiny_model(seed=1)
    drawn = rollout(model, [RAGGED[0]], max_new_tokens=1, num_return_sequences=20_000)
    ratio = drawn.logprobs - rescore(other, drawn).logprobs
    exact = rescore(model, drawn[:1], reference=other).kl[0, 0]
    assert abs(ratio.mean() - exact) < 4 * ratio.std() / 20_000**0.5
