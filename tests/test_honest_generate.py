"""`generate(custom_generate=honest_generate)` draws as `rollout` does, and refuses what would draw otherwise."""

import pytest
import torch
from conftest import make_tiny_model, plain_twin
from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessor, StoppingCriteria, pipeline
from transformers.generation import TemperatureLogitsWarper

from generation_gpt2_value import rollout
from hub_tools import honest_generate
from hub_tools.errors import DishonestSettingError
from sampler_audit import audit_sampler

PROMPTS = torch.tensor([[0, 0, 5, 17, 3], [41, 9, 7, 2, 64]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
SETTINGS = {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "eos_token_id": [1, 2, 3], "min_new_tokens": 2}


def draw(model, prompts=PROMPTS, **settings):
    """Also with what a model's own generation_config says, which is what `generate()` fills settings from."""
    settings = {"attention_mask": MASK, "do_sample": True, "max_new_tokens": 8, "top_k": 0, **settings}
    return model.generate(prompts, custom_generate=honest_generate, **settings)


def seeded():
    return torch.Generator().manual_seed(3)


@pytest.mark.shows("transformers", "`generate(custom_generate=honest_generate)` draws as `rollout` does")
@pytest.mark.parametrize("plain", [False, True], ids=["GPT2ValueModel", "GPT2LMHeadModel"])
def test_it_returns_the_tokens_of_a_rollout_with_the_same_settings(plain):
    model = plain_twin(make_tiny_model()) if plain else make_tiny_model()
    tokens = draw(model, **SETTINGS, num_return_sequences=3, generator=seeded())
    expected = rollout(
        model, PROMPTS, attention_mask=MASK, max_new_tokens=8, **SETTINGS, num_return_sequences=3, generator=seeded()
    )
    columns = int(expected.response_mask.any(0).sum())
    assert torch.equal(tokens[:, :5], PROMPTS.repeat_interleave(3, 0))
    assert torch.equal(tokens[:, 5:], expected.responses[:, :columns])


def test_the_rollout_comes_along_and_is_scored_as_it_was_drawn():
    model = make_tiny_model().train()
    output = draw(model, **SETTINGS, return_dict_in_generate=True, generator=seeded())
    drawn = output.rollout
    assert torch.equal(output.sequences, draw(model, **SETTINGS, generator=seeded()))
    assert drawn.sampling.top_k == 20
    assert drawn.sampling.temperature == 0.7
    assert drawn.values is not None
    torch.testing.assert_close(model.rescore(drawn).logprobs, drawn.logprobs, atol=1e-5, rtol=0)
    assert output.scores is None  # as the class that transformers returns has it


def test_the_settings_may_come_from_a_generation_config_or_from_the_model():
    model = make_tiny_model()
    config = GenerationConfig(do_sample=True, max_new_tokens=8, pad_token_id=7, **SETTINGS)
    arguments = {"attention_mask": MASK, "custom_generate": honest_generate}
    expected = draw(model, **SETTINGS, pad_token_id=7, generator=seeded())
    assert torch.equal(model.generate(PROMPTS, generation_config=config, generator=seeded(), **arguments), expected)
    model.generation_config = config
    assert torch.equal(model.generate(PROMPTS, generator=seeded(), **arguments), expected)


def test_prompts_come_back_as_they_were_passed_also_with_padding_on_the_right():
    model = make_tiny_model()
    prompts, mask = PROMPTS.flip(1), MASK.flip(1)
    tokens = draw(model, prompts, attention_mask=mask, generator=seeded())
    assert torch.equal(tokens[:, :5], prompts)
    expected = rollout(model, prompts, attention_mask=mask, max_new_tokens=8, eos_token_id=0, generator=seeded())
    assert torch.equal(tokens[:, 5:], expected.responses[:, : tokens.shape[1] - 5])


def test_a_length_in_all_is_a_number_of_new_tokens():
    model = make_tiny_model()
    found = draw(model, max_new_tokens=None, max_length=11, min_length=8, eos_token_id=4, generator=seeded())
    expected = draw(model, max_new_tokens=6, min_new_tokens=3, eos_token_id=4, generator=seeded())
    assert torch.equal(found, expected)


def test_generate_itself_is_dishonest_where_these_draws_are_honest():
    model = plain_twin(make_tiny_model())
    prompts = PROMPTS[1:].repeat(200, 1)
    settings = {"attention_mask": torch.ones_like(prompts), "do_sample": True, "eos_token_id": 95, "pad_token_id": 95}
    torch.manual_seed(0)
    honest = model.generate(prompts, custom_generate=honest_generate, max_new_tokens=20, top_k=0, **settings)
    quirky = model.generate(prompts, max_new_tokens=20, top_p=0.9, top_k=0, **settings)
    assert audit_sampler(model, honest, prompt_length=5, eos_token_id=95).honest
    assert not audit_sampler(model, quirky, prompt_length=5, eos_token_id=95).honest


class Bans(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores.index_fill(1, torch.tensor([5]), -torch.inf)


class Stops(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.ones(len(input_ids), dtype=torch.bool)


@pytest.mark.shows("transformers", "`honest_generate` refuses every other setting by name")
@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"do_sample": False}, "do_sample=False"),
        ({"repetition_penalty": 1.5}, "repetition_penalty=1.5"),
        ({"num_beams": 2}, "num_beams=2"),
        ({"no_repeat_ngram_size": 2}, "no_repeat_ngram_size=2"),
        ({"bad_words_ids": [[5]]}, "bad_words_ids"),
        ({"suppress_tokens": [5]}, "suppress_tokens"),
        ({"typical_p": 0.5}, "typical_p=0.5"),
        ({"min_p": 0.1}, "min_p=0.1"),
        ({"sequence_bias": [[[5], 2.0]]}, "sequence_bias"),
        ({"forced_eos_token_id": 5}, "forced_eos_token_id=5"),
        ({"guidance_scale": 1.5}, "guidance_scale=1.5"),
        ({"max_time": 5.0}, "max_time=5.0"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens=3"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores=True"),
        ({"output_logits": True, "return_dict_in_generate": True}, "output_logits=True"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states=True"),
        ({"logits_processor": [Bans()]}, "logits_processor holds a Bans"),
        ({"logits_processor": [TemperatureLogitsWarper(0.5)]}, "logits_processor holds a TemperatureLogitsWarper"),
        ({"prefix_allowed_tokens_fn": lambda row, ids: [5, 6]}, "PrefixConstrainedLogitsProcessor"),
        ({"stopping_criteria": [Stops()]}, "stopping_criteria holds a Stops"),
        ({"token_type_ids": PROMPTS}, "token_type_ids"),
        ({"position_ids": torch.arange(5).expand(2, 5)}, "position_ids"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_no_other_setting_changes_the_draw_without_a_word(settings, named):
    with pytest.raises(DishonestSettingError, match=named):
        draw(make_tiny_model(), **settings)


def test_a_setting_of_the_models_own_generation_config_is_refused_too():
    model = make_tiny_model()
    model.generation_config.repetition_penalty = 1.2
    with pytest.raises(DishonestSettingError, match=r"repetition_penalty=1\.2.*\n.*model\.generation_config"):
        draw(model)
    draw(model, repetition_penalty=1.0)


def test_a_cache_with_tokens_in_it_is_refused():
    model = make_tiny_model()
    cache = model(PROMPTS[:, :2], use_cache=True).past_key_values
    with pytest.raises(DishonestSettingError, match="past_key_values"):
        draw(model, past_key_values=cache, attention_mask=torch.ones_like(MASK))
    draw(model, cache_implementation="static")


def test_a_pipeline_hands_it_on(tiny_tokenizer):
    model = make_tiny_model()
    ask = pipeline("text-generation", model=model, tokenizer=tiny_tokenizer)
    settings = {"max_new_tokens": 5, "temperature": 1.5, "top_k": 7}
    (answer,) = ask("abc", custom_generate=honest_generate, do_sample=True, generator=seeded(), **settings)
    prompts = tiny_tokenizer("abc", return_tensors="pt").input_ids
    drawn = model.rollout(prompts, eos_token_id=0, generator=seeded(), **settings)
    assert answer["generated_text"] == tiny_tokenizer.decode(drawn.sequences[0], skip_special_tokens=True)


def test_a_loaded_package_takes_it_too(package):
    model = AutoModelForCausalLM.from_pretrained(package, trust_remote_code=True)
    found = draw(model, generator=seeded())
    assert torch.equal(found, draw(make_tiny_model(), generator=seeded()))
