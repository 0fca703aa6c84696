"""CTranslate2 samples, this project scores: tokens, sets, log-probabilities and what the engine means by them."""

import dataclasses
from collections import defaultdict

import pytest
import torch
from conftest import make_tiny_model
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from generation_gpt2_value import rescore
from hub_tools import export_policy, save_package
from sampler_audit import audit_sampler, find_kept_sets, mismatch, rollout_from_tokens
from sampling_gpt2_value import Sampling

ctranslate2 = pytest.importorskip("ctranslate2", reason="the engine is not installed")

PROMPTS = [[5, 17, 3], [41, 9, 7], [80, 33, 12]]  # of one length: see the last test
COPIES, T = 30, 16
END = 7


@pytest.fixture(scope="module")
def model():
    return make_tiny_model()


@pytest.fixture(scope="module")
def engine(model, tmp_path_factory):
    """The policy as `export_policy` writes it, converted by CTranslate2's own converter."""
    folder = tmp_path_factory.mktemp("engine")
    save_package(model, folder / "package")
    export_policy(folder / "package", folder / "policy")
    words = Tokenizer(models.WordLevel({str(id): id for id in range(model.config.vocab_size)}, unk_token="0"))
    special = dict.fromkeys(("unk_token", "bos_token", "eos_token"), "0")
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder / "policy")
    ctranslate2.converters.TransformersConverter(str(folder / "policy")).convert(str(folder / "converted"))
    return ctranslate2.Generator(str(folder / "converted"), intra_threads=1)


def draw(engine, prompts, **settings):
    """What the engine drew for each prompt: tokens, and their log-probabilities, both as lists of lists."""
    ctranslate2.set_random_seed(1)
    logprobs = defaultdict(list)

    def take(step):
        logprobs[step.batch_id].append(step.log_prob)
        return False

    results = engine.generate_batch(
        [[str(id) for id in prompt] for prompt in prompts],
        max_length=T,
        end_token=[str(END)],
        return_end_token=True,
        include_prompt_in_result=False,
        return_scores=True,
        callback=take,
        **settings,
    )
    return [result.sequences_ids[0] for result in results], [logprobs[row] for row in range(len(prompts))]


@pytest.mark.shows(
    "CTranslate2", "its tokens come back by `rollout_from_tokens`; `mismatch` says what its numbers mean"
)
def test_tokens_of_ctranslate2_are_scored_and_its_numbers_found_to_be_of_temperature_1(model, engine):
    prompts = PROMPTS * COPIES
    tokens, logprobs = draw(engine, prompts, sampling_topk=12, sampling_temperature=0.7)
    sampling = Sampling(temperature=0.7, top_k=12, eos_token_id=END)
    drawn = rollout_from_tokens(prompts, tokens, sampling=sampling, logprobs=logprobs)
    assert 0 < drawn.truncated.sum() < len(drawn)
    assert audit_sampler(model, drawn, generator=torch.Generator().manual_seed(0)).honest

    drawn = find_kept_sets(model, drawn)
    scored = rescore(model, drawn)
    assert scored.logprobs.isfinite().all()
    found = mismatch(drawn, scored, model=model)
    assert found.reports == "temperature 1 over the full vocabulary"
    assert found.distances[found.reports] < 1e-4
    assert found.distances["the sampling settings"] > 0.5
    assert "NOT those of the sampling settings" in str(found)
    with pytest.raises(ValueError, match="No weights follow"):
        found.weights()

    ours = dataclasses.replace(drawn, logprobs=scored.logprobs.detach(), values=scored.values.detach())
    assert mismatch(ours, scored, model=model).reports == "the sampling settings"


def test_at_temperature_1_over_the_full_vocabulary_its_numbers_are_ours(model, engine):
    prompts = PROMPTS * COPIES
    tokens, logprobs = draw(engine, prompts, sampling_topk=0, sampling_temperature=1.0)
    drawn = rollout_from_tokens(prompts, tokens, sampling=Sampling(eos_token_id=END), logprobs=logprobs)
    found = mismatch(drawn, rescore(model, drawn), model=model)
    assert found.reports == "the sampling settings"
    assert abs(found.mean_ratio - 1) < 1e-4
    assert found.effective_sample_size == pytest.approx(found.tokens, rel=1e-6)
    torch.testing.assert_close(found.weights(), drawn.response_mask.float(), atol=1e-3, rtol=0)
    assert audit_sampler(model, drawn, generator=torch.Generator().manual_seed(0)).honest


def test_prompts_of_several_lengths_come_back_as_if_they_had_been_drawn_and_are_found_out(model, engine):
    """Asked for responses alone, CTranslate2 leaves out as much as the shortest prompt: the rest is no draw."""
    prompts = [[5], [41, 9, 30, 2, 64]] * COPIES
    tokens, logprobs = draw(engine, prompts, sampling_topk=0, sampling_temperature=1.0)
    assert all(row[:4] == [9, 30, 2, 64] for row in tokens[1::2])
    drawn = rollout_from_tokens(prompts, tokens, sampling=Sampling(eos_token_id=END), logprobs=logprobs)
    assert not audit_sampler(model, drawn, generator=torch.Generator().manual_seed(0)).honest
