"""Causal language models of other families are right, or refused by name. `make families` runs all of them."""

import pytest
import torch
import transformers
from support.families import ENDS, build, difference
from support.settings import RAGGED

from generation_gpt2_value import respond_to_batch, rollout

RIGHT = ["llama", "opt", "openai-gpt", "gpt_neo", "bloom"]
# Recurrent, hybrid, and those that count positions by columns or by ids.
OTHER = ["rwkv", "mamba", "mamba2", "falcon_mamba", "jamba", "lfm2", "qwen3_next", "bart", "roberta"]
STATEFUL = ["rwkv", "mamba", "mamba2", "falcon_mamba", "jamba"]
if transformers.__version__ >= "5":  # before, its states stay in its modules: its own second call fails
    OTHER, STATEFUL = [*OTHER, "recurrent_gemma"], [*STATEFUL, "recurrent_gemma"]


@pytest.mark.parametrize("family", RIGHT)
def test_a_model_of_another_family_is_right(family):
    model = build(family).train()  # dropout is in the config of most
    for ends in (None, ENDS):
        assert difference(model.eval(), eos_token_id=ends) < 1e-4
    drawn = rollout(model.train(), RAGGED, max_new_tokens=4, eos_token_id=None)
    assert drawn.values is None
    torch.testing.assert_close(rollout_scores(model, drawn), drawn.logprobs, atol=1e-5, rtol=0)
    assert respond_to_batch(model, torch.stack([RAGGED[0]] * 2), txt_len=4).shape == (2, 4)


def rollout_scores(model, drawn):
    from scoring_gpt2_value import rescore

    return rescore(model, drawn).logprobs


@pytest.mark.parametrize("family", OTHER)
def test_a_recurrent_model_is_right_or_refused_by_name(family):
    model = build(family)
    for ends in (None, ENDS):
        before, largest, refusal = torch.get_rng_state(), 0.0, type(model).__name__
        try:
            largest = difference(model, eos_token_id=ends)
        except (TypeError, ValueError, RuntimeError) as error:
            refusal = str(error)
        assert largest < 1e-4
        assert type(model).__name__ in refusal
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("family", STATEFUL)
def test_rows_of_equal_length_that_do_not_end_are_right(family):
    model = build(family)
    prompts = torch.tensor([[5, 17, 3], [80, 2, 9], [41, 9, 7]])
    drawn = rollout(model, prompts, max_new_tokens=6, eos_token_id=None)
    logits = model(drawn.sequences, use_cache=False).logits[:, -7:-1].float()
    expected = logits.log_softmax(-1).gather(-1, drawn.responses.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(drawn.logprobs, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(rollout_scores(model, drawn), expected, atol=1e-4, rtol=0)
