"""Tokens that another engine drew: what `rollout_from_tokens` makes of them, and what it refuses."""

import pytest
import torch
from conftest import make_tiny_model
from support.settings import EOS, RAGGED, seeded

from gpt2_value import Sampling, audit_sampler, find_kept_sets, rescore, rollout_from_tokens

CUTTING = [
    {"temperature": 0.7, "top_k": 12},
    {"top_p": 0.8, "eos_token_id": EOS, "min_new_tokens": 3},
    {"top_p": 0.3, "eos_token_id": EOS},
]
cutting = pytest.mark.parametrize("settings", CUTTING, ids=str)


def draw(settings, seed=0):
    """A rollout; and its prompts, tokens and log-probabilities in lists, as an engine hands them over."""
    drawn = make_tiny_model().rollout(
        RAGGED, max_new_tokens=12, num_return_sequences=4, generator=seeded(seed), **settings
    )
    return drawn, [prompt for prompt in RAGGED for _ in range(4)], rows(drawn, "responses"), rows(drawn, "logprobs")


def rows(drawn, name):
    """The drawn part of each row of a column, as lists."""
    pairs = zip(getattr(drawn, name), drawn.response_mask, strict=True)
    return [row[mask].tolist() for row, mask in pairs]


def sets_of(drawn):
    """The kept sets as an engine would return them, by code of this test only: ids, in lists of lists of lists."""

    def ids(kept):
        return [id for id in range(8 * len(kept)) if kept[id // 8] >> (id % 8) & 1]

    pairs = zip(drawn.kept, drawn.response_mask, strict=True)
    return [[ids(kept) for kept in row[mask]] for row, mask in pairs]


@pytest.mark.parametrize("settings", [{}, *CUTTING], ids=str)
def test_tokens_that_a_rollout_drew_come_back_as_that_rollout(settings):
    model, (drawn, prompts, responses, logprobs) = make_tiny_model(), draw(settings)
    kept = None if drawn.kept is None else sets_of(drawn)
    back = rollout_from_tokens(prompts, responses, sampling=drawn.sampling, logprobs=logprobs, kept=kept)
    for name in ("sequences", "attention_mask", "responses", "response_mask", "logprobs", "truncated"):
        assert torch.equal(getattr(back, name), getattr(drawn, name)), name
        assert getattr(back, name).dtype == getattr(drawn, name).dtype
    assert (back.sampling, back.values) == (drawn.sampling, None)
    scored, expected = rescore(model, back[[5, 2]]), rescore(model, drawn)
    assert drawn.kept is not None or find_kept_sets(model, back) is back  # nothing was cut off
    assert audit_sampler(model, back, generator=seeded()).honest
    for name in ("logprobs", "values"):
        torch.testing.assert_close(getattr(scored, name), getattr(expected, name)[[5, 2]], atol=1e-5, rtol=0)


def test_prompts_may_be_padded_and_responses_tensors_or_lists():
    padded, mask = torch.tensor([[5, 17, 3, 99], [-1, 80, 4, 9]]), [[1, 1, 1, 0], [0, 1, 1, 1]]
    back = rollout_from_tokens(padded, [torch.tensor([7, 8], dtype=torch.int32), [6, 5]], attention_mask=mask)
    assert back.sequences[:, -5:].tolist() == [[5, 17, 3, 7, 8], [80, 4, 9, 6, 5]]
    assert back.attention_mask[:, -6:].sum() == 10


@pytest.mark.parametrize("form", [list, torch.tensor, dict.fromkeys])
def test_kept_sets_may_be_lists_tensors_or_keys_of_dicts(form):
    kept = [[form([7, 1]), form([8])]]
    back = rollout_from_tokens([[5]], [[7, 8]], sampling=Sampling(top_k=2), kept=kept)
    assert back.kept.tolist() == [[[2**7 + 2**1, 0], [0, 2**0]]]  # a bit for each id
    assert rescore(make_tiny_model(), back).logprobs[0, 1].item() == pytest.approx(0.0, abs=1e-6)


def test_without_log_probabilities_nothing_can_be_computed_from_them_by_mistake(tmp_path):
    drawn, prompts, responses, _ = draw({})
    back = rollout_from_tokens(prompts, responses)
    assert back.logprobs is back[[1, 0]].to("cpu").logprobs is None
    torch.testing.assert_close(rescore(make_tiny_model(), back).logprobs, drawn.logprobs, atol=1e-5, rtol=0)
    torch.save(back, tmp_path / "rollout.pt")
    assert torch.load(tmp_path / "rollout.pt", weights_only=True).logprobs is None


# Sets that nobody recorded


@cutting
@pytest.mark.parametrize("hooked", [False, True], ids=["hidden states", "all logits"])
def test_sets_that_nobody_recorded_are_found_again_by_the_model_that_drew(settings, hooked):
    model, other = make_tiny_model(), make_tiny_model(seed=1)
    drawn, prompts, responses, logprobs = draw(settings)
    if hooked:
        model.register_forward_hook(lambda module, args, output: None)
    back = rollout_from_tokens(prompts, responses, sampling=drawn.sampling, logprobs=logprobs)
    with pytest.raises(ValueError, match=r"kept` is None.*kept=.*find_kept_sets"):
        rescore(model, back)
    found = find_kept_sets(model, back, batch_size=3)
    assert sets_of(found) == sets_of(drawn)
    torch.testing.assert_close(rescore(other, found).logprobs, rescore(other, drawn).logprobs, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="says already"):
        find_kept_sets(model, found)


def test_a_drawn_token_is_in_its_set_though_the_model_would_not_have_kept_it():
    model, (drawn, prompts, responses, _) = make_tiny_model(), draw({"top_k": 3})
    outside = next(id for id in range(96) if id not in sets_of(drawn)[0][0])
    responses[0] = [outside]
    found = find_kept_sets(model, rollout_from_tokens(prompts, responses, sampling=drawn.sampling))
    assert sorted(sets_of(found)[0][0]) == sorted([*sets_of(drawn)[0][0], outside])
    assert rescore(model, found).logprobs.isfinite().all()


# Refusals


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prompts": [[5]]}, ValueError, "got 1 prompts, 2 responses"),
        ({"prompts": [[5], []]}, ValueError, r"the token 6, has no prompt before it"),
        ({"responses": [[7, 2, 9], [6]]}, ValueError, r"\[0\]\[2\], the token 9, comes after"),
        ({"responses": [[7], [2]]}, ValueError, r"\[1\]\[0\], the token 2, ends the row before min_new_tokens"),
        ({"logprobs": [[-1.0, -1.0], [-1.0, -1.0]]}, ValueError, "rows of logprobs are not as long"),
        ({"logprobs": [[-1.0, 0.3], [-1.0]]}, ValueError, r"\[0\]\[1\].*log-probability above 0, or not"),
        ({"kept": [[[7]], [[6]]]}, ValueError, "rows of kept are not as long"),
        ({"kept": [[[7], [1, 3]], [[6]]]}, ValueError, r"\[0\]\[1\], the token 8, is not in its kept set"),
        ({"pad_token_id": -1}, ValueError, "pad_token_id=-1"),
    ],
)
def test_what_nobody_can_have_drawn_is_refused(arguments, error, message):
    sampling = Sampling(eos_token_id=2, min_new_tokens=1)
    good = {"prompts": [[5], [5]], "responses": [[7, 8], [6]], "sampling": sampling}
    with pytest.raises(error, match=message):
        rollout_from_tokens(**{**good, **arguments})


def test_kept_ids_outside_the_vocabulary_are_refused_by_who_scores_them():
    back = rollout_from_tokens([[5]], [[7]], sampling=Sampling(top_k=2), kept=[[[7, 96]]])
    with pytest.raises(ValueError, match="not of this model's vocabulary of 96"):
        rescore(make_tiny_model(), back)
