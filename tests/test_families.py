"""Causal language models of other families are right, or refused by name. `make families` runs all of them."""

import pytest
import torch
from support.families import ENDS, PROMPTS, build, difference
from support.settings import RAGGED, assert_as_drawn

from generation_gpt2_value import respond_to_batch, rollout
from scoring_gpt2_value import SelfCheckError, rescore

RIGHT = ["llama", "opt", "openai-gpt", "gpt_neo", "bloom"]
STATEFUL = ["rwkv", "mamba", "mamba2", "falcon_mamba", "jamba", "recurrent_gemma"]
# Recurrent, hybrid, and those that count positions by columns or by ids.
OTHER = [*STATEFUL, "lfm2", "qwen3_next", "bart", "roberta"]


@pytest.mark.parametrize("family", [*RIGHT, *OTHER])
def test_a_model_of_another_family_is_right_or_refused_by_name(family):
    model = build(family)
    for ends in (None, ENDS):
        before, refusals = torch.get_rng_state(), []
        try:
            assert difference(model, eos_token_id=ends) < 1e-4
        except (TypeError, ValueError, SelfCheckError) as error:
            refusals.append(str(error))
        assert family in OTHER or not refusals
        assert all(type(model).__name__ in refusal for refusal in refusals)
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("family", RIGHT)
def test_dropout_of_another_family_is_switched_off(family):
    model = build(family).train()
    drawn = rollout(model, RAGGED, max_new_tokens=4, eos_token_id=None)
    assert drawn.values is None
    assert_as_drawn(rescore(model, drawn), drawn)
    assert respond_to_batch(model, torch.stack([RAGGED[0]] * 2), txt_len=4).shape == (2, 4)


@pytest.mark.parametrize("family", STATEFUL)
def test_rows_of_equal_length_that_do_not_end_are_right(family):
    prompts = torch.stack([prompt[:3] for prompt in PROMPTS if len(prompt) >= 3])
    assert difference(build(family), prompts, eos_token_id=None) < 1e-4


def test_a_reference_whose_padding_is_seen_is_refused_too():
    drawn = rollout(build("llama"), PROMPTS, max_new_tokens=4)
    with pytest.raises(SelfCheckError, match="RwkvForCausalLM gives rows of this reference's score"):
        rescore(build("llama"), drawn, reference=build("rwkv"))
    scored = rescore(build("llama"), drawn, reference=build("opt"))
    assert not scored.reference_logprobs.requires_grad
    torch.testing.assert_close(scored.reference_logprobs, rescore(build("opt"), drawn).logprobs.detach())
