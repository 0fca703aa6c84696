"""Tokens that another engine drew: what `rollout_from_tokens` makes of them, and what it refuses."""

import math

import pytest
import torch
from conftest import make_tiny_model

from generation_gpt2_value import rescore
from sampler_audit import audit_sampler, find_kept_sets, rollout_from_tokens
from sampling_gpt2_value import Sampling

RAGGED = [torch.tensor(prompt) for prompt in ([5, 17, 3], [80], [41, 9, 7, 2, 64], [33, 12])]
EOS = [1, 2, 3, 4, 5, 6, 7, 8]
SETTINGS = [
    {},
    {"temperature": 0.7, "top_k": 12},
    {"top_p": 0.8, "eos_token_id": EOS, "min_new_tokens": 3},
    {"top_p": 0.3, "eos_token_id": EOS},
]
grid = pytest.mark.parametrize("settings", SETTINGS, ids=str)


def draw(model, settings, seed=0):
    """A rollout, and the same as an engine would hand it over: prompts, and lists of tokens, numbers and sets."""
    drawn = model.rollout(
        RAGGED, max_new_tokens=12, num_return_sequences=4, generator=torch.Generator().manual_seed(seed), **settings
    )
    lengths = drawn.response_mask.sum(1).tolist()
    prompts = [prompt for prompt in RAGGED for _ in range(4)]
    handed = {"responses": drawn.responses, "logprobs": drawn.logprobs}
    handed = {
        name: [row[:n].tolist() for row, n in zip(column, lengths, strict=True)] for name, column in handed.items()
    }
    return drawn, prompts, handed["responses"], handed["logprobs"]


def sets_of(drawn):
    """The kept sets as an engine would return them, by code of this test only: ids, in lists of lists of lists."""

    def ids(kept):
        if kept.dtype == torch.int32:
            return kept[kept >= 0].tolist()
        return [id for id in range(8 * len(kept)) if kept[id // 8] >> (id % 8) & 1]

    lengths = drawn.response_mask.sum(1).tolist()
    return [[ids(kept) for kept in row[:n]] for row, n in zip(drawn.kept, lengths, strict=True)]


@grid
def test_tokens_that_a_rollout_drew_come_back_as_that_rollout(settings):
    model = make_tiny_model()
    drawn, prompts, responses, logprobs = draw(model, settings)
    kept = None if drawn.kept is None else sets_of(drawn)
    back = rollout_from_tokens(prompts, responses, sampling=drawn.sampling, logprobs=logprobs, kept=kept)
    for name in ("sequences", "attention_mask", "responses", "response_mask", "logprobs", "truncated"):
        assert torch.equal(getattr(back, name), getattr(drawn, name)), name
        assert getattr(back, name).dtype == getattr(drawn, name).dtype
    assert back.sampling == drawn.sampling
    assert back.values is None
    scored = rescore(model, back, with_entropy=True)
    expected = rescore(model, drawn, with_entropy=True)
    for name in ("logprobs", "values", "entropy"):
        torch.testing.assert_close(getattr(scored, name), getattr(expected, name), atol=1e-5, rtol=0)
    part = rescore(model, back[[5, 2]])
    torch.testing.assert_close(part.logprobs, expected.logprobs[[5, 2]], atol=1e-5, rtol=0)


def test_tensors_lists_and_padded_prompts_give_the_same_rollout():
    sequences = [[5, 17, 3], [80, 4, 9]]
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])
    padded = torch.tensor([[5, 17, 3, 99], [-1, 80, 4, 9]])
    lists = rollout_from_tokens(sequences, [[7, 8], [6, 5]])
    tensors = rollout_from_tokens(torch.tensor(sequences), torch.tensor([[7, 8], [6, 5]], dtype=torch.int32))
    masked = rollout_from_tokens(padded, [torch.tensor([7, 8]), [6, 5]], attention_mask=mask)
    assert torch.equal(lists.sequences, tensors.sequences)
    assert torch.equal(lists.sequences, masked.sequences[:, 1:])
    assert masked.attention_mask.tolist() == [[0, 1, 1, 1, 1, 1]] * 2


def test_rows_of_any_lengths_are_padded_and_masked():
    back = rollout_from_tokens(
        [[5], [6, 7]],
        [[9, 8, 2], []],
        sampling=Sampling(eos_token_id=2),
        logprobs=[[-1.0, -2.0, -3.0], []],
        pad_token_id=90,
    )
    assert back.sequences.tolist() == [[90, 5, 9, 8, 2], [6, 7, 90, 90, 90]]
    assert back.attention_mask.tolist() == [[0, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert back.response_mask.tolist() == [[True] * 3, [False] * 3]
    assert back.logprobs.tolist() == [[-1.0, -2.0, -3.0], [0.0] * 3]
    assert back.truncated.tolist() == [False, True]
    assert rescore(make_tiny_model(), back).logprobs[1].tolist() == [0.0] * 3


def test_kept_sets_may_be_lists_tensors_or_keys_of_dicts():
    rollouts = [
        rollout_from_tokens([[5]], [[7, 8]], sampling=Sampling(top_k=2), kept=[kept])
        for kept in (
            [[7, 1], [8]],
            [torch.tensor([7, 1]), torch.tensor([8, -1])],
            [{7: "a number of the engine", 1: None}, {8: None}],
        )
    ]
    assert all(rollout.kept.tolist() == [[[7, 1], [8, -1]]] for rollout in rollouts)
    assert rollouts[0].kept.dtype == torch.int32
    assert rescore(make_tiny_model(), rollouts[0]).logprobs[0, 1].item() == pytest.approx(0.0, abs=1e-6)


def test_without_log_probabilities_nothing_can_be_computed_from_them_by_mistake(tmp_path):
    model = make_tiny_model()
    drawn, prompts, responses, _ = draw(model, {})
    back = rollout_from_tokens(prompts, responses)
    assert back.logprobs is None
    assert back[[1, 0]].to("cpu").logprobs is None
    torch.testing.assert_close(rescore(model, back).logprobs, drawn.logprobs, atol=1e-5, rtol=0)
    with pytest.raises(TypeError):
        rescore(model, back).logprobs - back.logprobs
    torch.save(back, tmp_path / "rollout.pt")
    loaded = torch.load(tmp_path / "rollout.pt", weights_only=True)
    assert torch.equal(loaded.sequences, back.sequences)
    assert loaded.logprobs is None


# Sets that nobody recorded


@pytest.mark.parametrize("settings", SETTINGS[1:], ids=str)
def test_scoring_refuses_tokens_whose_sets_nobody_recorded(settings):
    drawn, prompts, responses, logprobs = draw(make_tiny_model(), settings)
    back = rollout_from_tokens(prompts, responses, sampling=drawn.sampling, logprobs=logprobs)
    with pytest.raises(ValueError, match=r"kept` is None.*kept=.*find_kept_sets"):
        rescore(make_tiny_model(), back)


@pytest.mark.parametrize("settings", SETTINGS[1:], ids=str)
@pytest.mark.parametrize("hooked", [False, True], ids=["hidden states", "all logits"])
def test_the_sets_are_found_again_by_the_model_that_drew(settings, hooked):
    model = make_tiny_model()
    drawn, prompts, responses, logprobs = draw(model, settings)
    if hooked:
        model.register_forward_hook(lambda module, args, output: None)
    back = rollout_from_tokens(prompts, responses, sampling=drawn.sampling, logprobs=logprobs)
    found = find_kept_sets(model, back, batch_size=3)
    assert sets_of(found) == sets_of(drawn)
    assert back.kept is None
    other = make_tiny_model(seed=1)
    torch.testing.assert_close(rescore(other, found).logprobs, rescore(other, drawn).logprobs, atol=1e-5, rtol=0)


def test_a_drawn_token_is_in_its_set_though_the_model_would_not_have_kept_it():
    model = make_tiny_model()
    drawn, prompts, responses, _ = draw(model, {"top_k": 3})
    outside = next(id for id in range(96) if id not in sets_of(drawn)[0][0])
    responses[0] = [outside]
    found = find_kept_sets(model, rollout_from_tokens(prompts, responses, sampling=drawn.sampling))
    assert outside in sets_of(found)[0][0]
    assert len(sets_of(found)[0][0]) == 4
    assert rescore(model, found).logprobs.isfinite().all()


def test_where_nothing_was_cut_off_there_is_nothing_to_find():
    drawn, prompts, responses, _ = draw(make_tiny_model(), {"temperature": 0.5})
    back = rollout_from_tokens(prompts, responses, sampling=drawn.sampling)
    assert find_kept_sets(make_tiny_model(), back) is back


def test_finding_sets_refuses_what_has_them_and_what_is_no_rollout():
    model = make_tiny_model()
    drawn, *_ = draw(model, {"top_k": 3})
    with pytest.raises(ValueError, match="says already"):
        find_kept_sets(model, drawn)
    with pytest.raises(TypeError, match="expected a Rollout"):
        find_kept_sets(model, drawn.sequences)


def test_the_audit_takes_the_tokens_with_and_without_their_sets():
    model, sampling = make_tiny_model(), Sampling(top_k=12, temperature=0.7)
    drawn, prompts, responses, _ = draw(model, {"top_k": 12, "temperature": 0.7})
    for kept in (None, sets_of(drawn)):
        back = rollout_from_tokens(prompts, responses, sampling=sampling, kept=kept)
        assert audit_sampler(model, back, generator=torch.Generator().manual_seed(0)).honest
    _, prompts, responses, _ = draw(model, {"temperature": 0.7})
    claim = rollout_from_tokens(prompts, responses, sampling=sampling)
    assert audit_sampler(model, claim).impossible > 0


# Refusals

ENDS = Sampling(eos_token_id=2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prompts": [[5]]}, ValueError, "got 1 prompts, 2 responses"),
        ({"responses": [[], []]}, ValueError, "a token at least"),
        ({"responses": []}, ValueError, "responses is empty"),
        ({"responses": [[7], "text"]}, TypeError, "responses holds no token ids"),
        ({"responses": [[7], [1.5]]}, TypeError, "float32; expected token ids"),
        ({"responses": [[7], [[1], [2]]]}, TypeError, r"responses\[1\] has the shape \[2, 1\]"),
        ({"responses": torch.tensor([[7.0], [8.0]])}, TypeError, "is torch.float32; expected token ids"),
        ({"prompts": torch.tensor([[5.0], [8.0]])}, TypeError, "is torch.float32; expected token ids"),
        ({"responses": torch.tensor([7, 8])}, TypeError, r"responses\[0\] has the shape \[\]"),
        ({"prompts": [5, 6]}, TypeError, r"prompts\[0\] has the shape \[\]"),
        ({"prompts": [[5], []]}, ValueError, r"the token 6, has no prompt before it"),
        ({"prompts": [[5], [6]], "attention_mask": [[1], [1, 1]]}, ValueError, "attention_mask has another shape"),
        ({"responses": [[7, 2], [6, 2, 2]], "sampling": ENDS}, ValueError, r"\[1\]\[2\], the token 2, comes after"),
        ({"responses": [[7, 2, 9], [6]], "sampling": ENDS}, ValueError, r"\[0\]\[2\], the token 9, comes after"),
        (
            {"responses": [[7, 2], [6]], "sampling": Sampling(eos_token_id=2, min_new_tokens=2)},
            ValueError,
            r"\[0\]\[1\], the token 2, ends the row before min_new_tokens",
        ),
        ({"logprobs": [[-1.0, -1.0], [-1.0, -1.0]]}, ValueError, "rows of logprobs are not as long"),
        ({"logprobs": [[-1.0, -1.0]]}, ValueError, "rows of logprobs are not as long"),
        ({"logprobs": [[-1.0, 0.3], [-1.0]]}, ValueError, r"\[0\]\[1\].*log-probability above 0"),
        ({"logprobs": [[-1.0, math.nan], [-1.0]]}, ValueError, r"\[0\]\[1\].*not finite"),
        ({"logprobs": [[-math.inf, -1.0], [-1.0]]}, ValueError, r"\[0\]\[0\].*not finite"),
        ({"kept": [[[7], [8]]]}, ValueError, "rows of kept are not as long"),
        ({"kept": [[[7]], [[6]]]}, ValueError, "rows of kept are not as long"),
        ({"kept": [[[7], [1, 3]], [[6]]]}, ValueError, r"\[0\]\[1\], the token 8, is not in its kept set"),
        ({"kept": [[[7], []], [[6]]]}, ValueError, r"\[0\]\[1\], the token 8, is not in its kept set"),
        ({"kept": [[[7], [8, -2]], [[6]]]}, ValueError, r"\[0\]\[1\], the token 8, is not in its kept set"),
        ({"pad_token_id": -1}, ValueError, "pad_token_id=-1"),
    ],
)
def test_what_nobody_can_have_drawn_is_refused(arguments, error, message):
    good = {"prompts": [[5], [5]], "responses": [[7, 8], [6]]}
    with pytest.raises(error, match=message):
        rollout_from_tokens(**{**good, **arguments})
    rollout_from_tokens(**good)


def test_kept_ids_outside_the_vocabulary_are_refused_by_who_scores_them():
    back = rollout_from_tokens([[5]], [[7]], sampling=Sampling(top_k=2), kept=[[[7, 96]]])
    with pytest.raises(ValueError, match="not of this model's vocabulary of 96"):
        rescore(make_tiny_model(), back)
