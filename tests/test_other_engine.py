"""CTranslate2 samples, this project scores: tokens, sets, log-probabilities and what the engine means by them."""

from collections import defaultdict

import pytest
import torch
from conftest import make_tiny_model
from support.settings import seeded
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from gpt2_value import Sampling, audit_sampler, find_kept_sets, mismatch, rescore, rollout_from_tokens
from hub_tools import export_policy, save_package

ctranslate2 = pytest.importorskip("ctranslate2", reason="the engine is not installed")

PROMPTS = [[5, 17, 3], [41, 9, 7], [80, 33, 12]] * 30  # of one length: see the last test
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


def draw(engine, prompts, top_k=0, temperature=1.0):
    """What the engine drew for each prompt, with its log-probabilities."""
    ctranslate2.set_random_seed(1)
    logprobs = defaultdict(list)
    results = engine.generate_batch(
        [[str(id) for id in prompt] for prompt in prompts],
        max_length=16,
        end_token=[str(END)],
        return_end_token=True,
        include_prompt_in_result=False,
        return_scores=True,
        callback=lambda step: logprobs[step.batch_id].append(step.log_prob),  # None: go on
        sampling_topk=top_k,
        sampling_temperature=temperature,
    )
    return rollout_from_tokens(
        prompts,
        [result.sequences_ids[0] for result in results],
        sampling=Sampling(temperature, top_k, eos_token_id=END),
        logprobs=[logprobs[row] for row in range(len(prompts))],
    )


def test_tokens_of_ctranslate2_are_scored_and_its_numbers_found_to_be_of_temperature_1(model, engine):
    drawn = draw(engine, PROMPTS, top_k=12, temperature=0.7)
    assert 0 < drawn.truncated.sum() < len(drawn)
    assert audit_sampler(model, drawn, generator=seeded()).honest
    drawn = find_kept_sets(model, drawn)
    scored = rescore(model, drawn)
    assert scored.logprobs.isfinite().all()
    found = mismatch(drawn, scored, model=model)
    assert found.reports == "temperature 1 over the full vocabulary"
    assert found.distances[found.reports] < 1e-4
    assert found.distances["the sampling settings"] > 0.5
    with pytest.raises(ValueError, match="No weights follow"):
        found.weights()


def test_at_temperature_1_over_the_full_vocabulary_its_numbers_are_ours(model, engine):
    drawn = draw(engine, PROMPTS)
    found = mismatch(drawn, rescore(model, drawn), model=model)
    assert found.reports == "the sampling settings"
    assert abs(found.mean_ratio - 1) < 1e-4
    assert found.effective_sample_size == pytest.approx(found.tokens, rel=1e-6)
    torch.testing.assert_close(found.weights(), drawn.response_mask.float(), atol=1e-3, rtol=0)
    assert audit_sampler(model, drawn, generator=seeded()).honest


def test_prompts_of_several_lengths_come_back_as_if_they_had_been_drawn_and_are_found_out(model, engine):
    """Asked for responses alone, CTranslate2 leaves out as much as the shortest prompt: the rest is no draw."""
    drawn = draw(engine, [[5], [41, 9, 30, 2, 64]] * 30)
    assert all(row[:4].tolist() == [9, 30, 2, 64] for row in drawn.responses[1::2])
    assert not audit_sampler(model, drawn, generator=seeded()).honest
