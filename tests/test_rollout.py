"""A rollout: exact draws, whatever form the prompts have, and what it says of itself; bad input is refused."""

import dataclasses
import itertools
import math

import pytest
import torch
from conftest import make_tiny_model, plain_twin
from scipy import stats
from support.settings import EOS, RAGGED, assert_as_drawn, assert_close, by_hand, seeded
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler
from transformers import AutoModelForCausalLM

from gpt2_value import Rollout, rescore, respond_to_batch, rollout
from sampling_gpt2_value import Sampling, draw, sampling_distribution

# Sampling is exact


@pytest.mark.parametrize(
    "settings",
    [
        {"eos_token_id": None},
        {"temperature": 2.0, "top_k": 4, "top_p": 0.8, "eos_token_id": None},
        {"temperature": 0.5, "eos_token_id": [2, 4], "min_new_tokens": 2},
    ],
    ids=str,
)
def test_sampled_sequences_follow_the_enumerated_distribution(settings):
    """Chi-square over 200,000 sequences; probabilities by enumeration, in float64, with code of the tests only."""
    V, T, N = 6, 3, 200_000
    model, prompt = make_tiny_model(vocab_size=V, n_embd=8, n_head=2, n_layer=1), torch.tensor([1, 3])
    sampling = Sampling(**settings)
    sequences = torch.tensor(list(itertools.product(range(V), repeat=T)))
    with torch.no_grad():
        logits = plain_twin(model)(torch.cat([prompt.expand(len(sequences), -1), sequences], 1)).logits[:, 1:-1]
    steps = by_hand(logits, sampling).gather(-1, sequences[..., None])[..., 0]  # [V ** T, T]
    ends = torch.isin(sequences, torch.tensor(sampling.eos_token_id, dtype=torch.long)).long()
    ended = ends.cumsum(1) - ends > 0  # before this token
    impossible = (ended & (sequences != (*sampling.eos_token_id, 0)[0])).any(1)  # after the end there is only padding
    expected = N * steps.masked_fill(ended, 0.0).sum(1).exp().masked_fill(impossible, 0.0)
    assert expected.sum() == pytest.approx(N)

    drawn = model.rollout(prompt[None], max_new_tokens=T, num_return_sequences=N, generator=seeded(), **settings)
    index = (drawn.responses * V ** torch.arange(T - 1, -1, -1)).sum(-1)
    counts = torch.bincount(index, minlength=V**T)
    assert counts[expected == 0].sum() == 0
    common = expected >= 5  # the others are one cell
    observed, wanted = (torch.cat([x[common], x[~common].sum()[None]]) for x in (counts, expected))
    assert stats.chisquare(observed[wanted > 0].numpy(), wanted[wanted > 0].numpy()).pvalue > 1e-3


@pytest.mark.parametrize("width", [1, 2, 255, 256, 257, 50257])
def test_drawing_is_the_exact_inverse_of_the_distribution_function(width):
    """Uniforms in the middle of each index's interval give that index; intervals of zero length are never hit."""
    torch.manual_seed(0)
    logits = torch.randn(1, width) * 3
    logits[0, torch.randperm(width)[: width // 3]] = -math.inf
    possible = (logits[0] > -math.inf).nonzero().squeeze(-1)
    weights = (logits[0] - logits.max()).exp().double()
    edges = nn.functional.pad(weights.cumsum(-1) / weights.sum(), (1, 0))
    some = possible[:: max(1, len(possible) // 500)]
    indices, logprobs = draw(logits.expand(len(some), -1), (edges[some] + edges[some + 1]) / 2)
    assert torch.equal(indices, some)
    assert_close(logprobs, logits[0].log_softmax(-1)[some])
    extremes = torch.tensor([0.0, 1e-300, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert torch.isin(draw(logits.expand(4, -1), extremes)[0], possible).all()


def test_a_rare_token_is_drawn_as_often_as_it_should():
    """Float32 sums over a vocabulary lose a tail of 1e-8; 50,000 such tokens together have the probability 5e-4."""
    logits = torch.full((1, 50257), math.log(1e-8))
    logits[0, 0] = 0.0
    uniforms = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    tail = int((draw(logits.expand(400, -1), uniforms[-400:])[0] > 0).sum())
    assert tail == pytest.approx(200_000 * 50256e-8 / (1 + 50256e-8), abs=1)


def test_exactly_k_tokens_stay_where_several_are_tied():
    scaled = sampling_distribution(torch.zeros(5, 100), Sampling(top_k=7))
    assert ((scaled == 0).sum(-1) == 7).all()


# What a rollout says of itself


def test_the_masks_say_what_was_drawn():
    drawn = make_tiny_model().rollout(
        RAGGED, max_new_tokens=12, num_return_sequences=20, eos_token_id=EOS, pad_token_id=90, min_new_tokens=2
    )
    mask, P = drawn.response_mask, 5
    assert drawn.sequences.dtype == drawn.attention_mask.dtype == torch.long
    assert mask.dtype == drawn.truncated.dtype == torch.bool
    assert drawn.logprobs.dtype == drawn.values.dtype == torch.float32
    assert torch.equal(drawn.responses, drawn.sequences[:, P:])
    assert torch.equal(drawn.attention_mask[:, P:].bool(), mask)
    for row in range(len(drawn)):  # rows of one prompt stand together
        assert torch.equal(drawn.sequences[row, :P][drawn.attention_mask[row, :P].bool()], RAGGED[row // 20])
    ends = torch.isin(drawn.responses, torch.tensor(EOS)) & mask
    assert not ends[:, :2].any()
    assert 0 < drawn.truncated.sum() < len(drawn)
    assert torch.equal(ends.sum(1), (~drawn.truncated).long())  # one at most
    assert torch.equal(mask[:, 1:], mask[:, :-1] & ~ends[:, :-1])  # nothing is drawn after it
    assert (drawn.responses[~mask] == 90).all()
    assert (torch.stack([drawn.logprobs, drawn.values])[:, ~mask] == 0).all()
    assert (drawn.logprobs[mask] < 0).all()


def test_the_end_of_text_is_the_models_own_unless_it_is_none():
    model = make_tiny_model(eos_token_id=7)
    own = model.rollout(RAGGED * 20, max_new_tokens=20)
    assert own.sampling.eos_token_id == (7,)
    assert 0 < own.truncated.sum() < len(own)
    model.config.eos_token_id = [7, 9]
    assert model.rollout(RAGGED, max_new_tokens=2).sampling.eos_token_id == (7, 9)
    never = model.rollout(RAGGED, max_new_tokens=7, eos_token_id=None)
    assert never.sampling.eos_token_id == ()
    assert (never.response_mask.all(1) & never.truncated).all()
    assert respond_to_batch(model, torch.tensor([[5, 6]] * 50), txt_len=20).shape == (50, 20)
    model.config.eos_token_id = None
    assert model.rollout(RAGGED, max_new_tokens=3).truncated.all()


def test_a_seeded_generator_repeats_the_rollout():
    first, again, other = (make_tiny_model().rollout(RAGGED, generator=seeded(seed)).sequences for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_rows_can_be_selected_repeated_moved_and_loaded_in_batches():
    model = make_tiny_model()
    drawn = model.rollout(RAGGED, max_new_tokens=6, top_p=0.9)
    everything = [0, 1, 2, 3]
    for part, rows in (
        (drawn.repeat(2), everything * 2),
        (drawn.to("cpu"), everything),
        (drawn[1:3], [1, 2]),
        (drawn[[3, 0]], [3, 0]),
        (drawn[torch.tensor([True, False, False, True])], [0, 3]),
    ):
        assert torch.equal(part.sequences, drawn.sequences[rows])
        assert_as_drawn(rescore(model, part), part)
    sampler = BatchSampler(RandomSampler(drawn), batch_size=3, drop_last=False)
    first, second = DataLoader(drawn, sampler=sampler, batch_size=None)
    both = torch.cat([first.sequences, second.sequences])
    assert sorted(both.tolist()) == sorted(drawn.sequences.tolist())
    for rows in (0, True, torch.tensor(1), (0, 1), range(2)):
        with pytest.raises(TypeError, match="selected by a slice, a list or a 1-D tensor"):
            drawn[rows]
    with pytest.raises(TypeError):
        drawn.to(torch.float64)


@pytest.mark.parametrize("settings", [{}, {"top_k": 5}, {"top_p": 0.9}, {"top_p": 0.2}], ids=str)
def test_rollouts_of_other_lengths_and_kept_sets_are_joined(settings):
    model = make_tiny_model()
    long, short = (
        model.rollout(prompts, max_new_tokens=T, generator=seeded(), eos_token_id=EOS, **settings)
        for prompts, T in ((RAGGED * 3, 12), (RAGGED[:2], 5))
    )
    for parts in ([long, short], [short, long], [long[:0], short, long]):
        both = Rollout.cat(parts)
        assert both.responses.shape == (14, 12)
        assert_as_drawn(rescore(model, both), both)
        for name in ("responses", "logprobs"):
            given = [getattr(part, name)[part.response_mask] for part in parts]
            assert torch.equal(getattr(both, name)[both.response_mask], torch.cat(given))
        assert torch.equal(both.truncated, torch.cat([part.truncated for part in parts]))
    for others in ([], [long, model.rollout(RAGGED, max_new_tokens=2, temperature=0.5)]):
        with pytest.raises(ValueError, match="the same sampling"):
            Rollout.cat(others)


def test_a_repr_is_three_short_lines():
    drawn = make_tiny_model().rollout(RAGGED * 40, max_new_tokens=12, top_p=0.9)
    sizes, settings, means = repr(drawn).splitlines()
    assert "160" in sizes
    assert "top_p=0.9" in settings
    assert f"{drawn.logprobs[drawn.response_mask].mean():.2f}"[:4] in means
    assert max(map(len, (sizes, settings, means))) <= 160


def test_a_rollout_is_read_again_without_unpickling_code(package, tmp_path):
    drawn = make_tiny_model().rollout(RAGGED, max_new_tokens=4, top_p=0.9)
    torch.save(drawn, tmp_path / "rollout.pt")
    again = torch.load(tmp_path / "rollout.pt", weights_only=True)
    assert again.sampling == drawn.sampling
    assert torch.equal(again.kept, drawn.kept)
    # The class of a package's rollout is its own, which another process does not have.
    model = AutoModelForCausalLM.from_pretrained(package, trust_remote_code=True)
    theirs = model.rollout(RAGGED, max_new_tokens=4, top_p=0.9)
    assert type(theirs) is not Rollout
    torch.save({**vars(theirs), "sampling": dataclasses.asdict(theirs.sampling)}, tmp_path / "rollout.pt")
    fields = torch.load(tmp_path / "rollout.pt", weights_only=True)
    ours = Rollout(**{**fields, "sampling": Sampling(**fields["sampling"])})
    assert_as_drawn(rescore(model, ours), theirs)


# Prompts of any form


def test_every_form_of_prompts_gives_the_same_rollout(tiny_tokenizer):
    model, lists = make_tiny_model(), [prompt.tolist() for prompt in RAGGED]
    left, right = (
        tiny_tokenizer.pad({"input_ids": lists}, return_tensors="pt", padding_side=side) for side in ("left", "right")
    )
    odd = left.input_ids.masked_fill(left.attention_mask == 0, -100)  # padding may be any number
    expected = rollout(model, RAGGED, max_new_tokens=10, top_p=0.9, generator=seeded())
    for queries, mask in (
        (lists, None),
        (tuple(prompt.to(torch.int16) for prompt in RAGGED), None),
        (left, None),
        (dict(right), None),
        (odd, left.attention_mask),
        (right.input_ids.to(torch.uint8), right.attention_mask.tolist()),
    ):
        drawn = rollout(model, queries, attention_mask=mask, max_new_tokens=10, top_p=0.9, generator=seeded())
        assert drawn.sequences.dtype == torch.int64
        assert torch.equal(drawn.responses, expected.responses)
        assert_as_drawn(drawn, expected)
        assert_as_drawn(rescore(model, drawn), expected)
    texts = tiny_tokenizer(["a text", "b"])  # without padding
    assert torch.equal(*(rollout(model, q, generator=seeded()).responses for q in (texts, texts.input_ids)))
    for call in (lambda: rollout(model, input_ids=odd), lambda: model.rollout(**right)):
        with pytest.raises(TypeError, match="input_ids"):
            call()


def test_padding_without_a_mask_is_warned_of_at_the_callers_line():
    model, padded = make_tiny_model(), torch.tensor([[9, 9, 5, 17], [41, 9, 7, 2]])
    for prompts in (padded, padded.flip(1)):
        for draw_by in (lambda p: model.rollout(p, eos_token_id=9), lambda p: rollout(model, p, eos_token_id=9)):
            with pytest.warns(UserWarning, match="9 begins or ends some rows of queries.*attention_mask") as said:
                draw_by(prompts)
            assert (said[0].filename, said[0].lineno) == (__file__, draw_by.__code__.co_firstlineno)
    for prompts, mask in ((padded, padded != 9), (padded[:1], None), (list(padded), None)):
        rollout(model, prompts, attention_mask=mask, max_new_tokens=2, eos_token_id=9)  # where pytest would raise it


# Bad input, refused before any compute


TWO = torch.tensor([[1, 2], [3, 4]])
REFUSED = [
    ([], {}, TypeError, "token ids"),
    (TWO.float(), {}, TypeError, r"token ids \(torch.float32, 2 dimensions\); expected"),
    (TWO + 95, {}, ValueError, "row 0 holds the id 96, outside the vocabulary of 96"),
    (TWO, {"attention_mask": torch.ones(2, 3)}, ValueError, "attention_mask has another shape"),
    (TWO, {"attention_mask": torch.full((2, 2), 0.5)}, ValueError, "attention_mask has another shape"),
    (TWO, {"max_new_tokens": 63}, ValueError, "65 tokens, this model's positions end at 64"),
    *(
        (TWO, {name: value}, ValueError, f"{name}={value!r}".replace("+", r"\+"))
        for name, values in {
            "max_new_tokens": (0, "3"),
            "temperature": (0.0, math.nan, math.inf, 1e-320, True),
            "top_p": (0.0, 1.1),
            "top_k": (-1, 2.5),
            "eos_token_id": (96, 3.0, -1),
            "pad_token_id": (-1, 96),
            "num_return_sequences": (0,),
        }.items()
        for value in values
    ),
    (TWO, {"min_new_tokens": 30, "eos_token_id": 1}, ValueError, "min_new_tokens=30; expected 0 to"),
    (TWO, {"min_new_tokens": 3, "eos_token_id": None}, ValueError, "no effect without eos_token_id"),
    *((wrong, {}, TypeError, "token ids") for wrong in ("a text", ["two", "texts"], None, [[[1], [2, 3]]])),
    (TWO, {"repetition_penalty": 1.2}, TypeError, "repetition_penalty"),
]


@pytest.mark.parametrize(("queries", "arguments", "error", "message"), REFUSED)
@pytest.mark.filterwarnings("ignore:.*begins or ends some rows")
def test_bad_input_is_refused_before_any_compute(queries, arguments, error, message):
    model = make_tiny_model()
    before = torch.get_rng_state()
    model.transformer.forward = lambda *args, **kwargs: pytest.fail("the model was run on bad input")
    with pytest.raises(error, match=message):
        model.rollout(queries, **arguments)
    assert torch.equal(torch.get_rng_state(), before)


def test_logits_that_are_not_finite_are_refused_with_row_and_step():
    model, reference = make_tiny_model(), make_tiny_model()
    drawn = model.rollout(RAGGED, max_new_tokens=5, eos_token_id=None)
    with torch.no_grad():
        model.transformer.wpe.weight[4, 0] = math.nan  # reached by the prompt of 5 tokens, in row 2
    with pytest.raises(ValueError, match="row 2 at step 0 are NaN or infinite"):
        model.rollout(RAGGED, max_new_tokens=5, eos_token_id=None)
    for scorer, more in ((model, {}), (reference, {"reference": model})):
        with pytest.raises(ValueError, match="are NaN or infinite"):
            rescore(scorer, drawn, **more)
