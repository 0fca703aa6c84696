"""Weights that are not simply in memory: placed by a device map, offloaded to the disk, or without data at first."""

import pytest
import torch
from conftest import make_tiny_model

from generation_gpt2_value import rescore, rollout
from hub_tools import save_package
from hub_tools.errors import UnsavableModelError
from modeling_gpt2_value import GPT2ValueConfig, GPT2ValueModel

PROMPTS = [torch.tensor(prompt) for prompt in ([5, 17, 3], [80], [41, 9, 7, 2, 64])]
ON_DISK = {
    "transformer.wte": "cpu",
    "transformer.wpe": "cpu",
    "transformer.h.0": "disk",
    "transformer.h.1": "disk",
    "transformer.ln_f": "disk",
    "lm_head": "cpu",
    "v_head": "cpu",
}


def assert_same_numbers(placed, model):
    drawn = rollout(placed, PROMPTS, max_new_tokens=12, eos_token_id=[1, 2, 3], top_k=20)
    expected = rescore(model, drawn)
    for name in ("logprobs", "values"):
        torch.testing.assert_close(getattr(drawn, name), getattr(expected, name), atol=1e-5, rtol=0)
        with torch.no_grad():
            scored = rescore(placed, drawn, reference=placed)
        torch.testing.assert_close(getattr(scored, name), getattr(expected, name), atol=1e-5, rtol=0)
    assert scored.kl.abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_device_map_changes_no_number(saved, dtype):
    model = GPT2ValueModel.from_pretrained(saved, dtype=dtype)
    placed = GPT2ValueModel.from_pretrained(saved, dtype=dtype, device_map="auto")
    assert placed.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    drawn = rollout(placed, PROMPTS, max_new_tokens=12)
    torch.manual_seed(0)
    expected = rollout(model, PROMPTS, max_new_tokens=12)
    assert torch.equal(drawn.responses, expected.responses)
    assert torch.equal(drawn.logprobs, expected.logprobs)
    if dtype == torch.float32:
        assert_same_numbers(placed, model)


def test_weights_on_the_disk_give_the_same_numbers_and_are_not_saved(saved, tmp_path):
    placed = GPT2ValueModel.from_pretrained(saved, device_map=ON_DISK, offload_folder=tmp_path / "offloaded")
    assert placed.transformer.h[1].mlp.c_fc.weight.is_meta
    assert_same_numbers(placed, make_tiny_model())
    with pytest.raises(UnsavableModelError, match="without data"):
        save_package(placed, tmp_path / "package")
    assert not (tmp_path / "package").exists()


def test_a_model_made_on_the_meta_device_takes_weights(saved):
    model = make_tiny_model()
    with torch.device("meta"):
        empty = GPT2ValueModel(GPT2ValueConfig.from_pretrained(saved)).eval()
    assert all(weight.is_meta for weight in empty.parameters())
    empty.load_state_dict(model.state_dict(), assign=True)
    empty.tie_weights()
    buffers = dict(model.named_buffers())
    assert set(buffers) == set(dict(empty.named_buffers()))
    for name, buffer in buffers.items():  # in no state dict: transformers 4's causal masks
        owner, _, attribute = name.rpartition(".")
        setattr(empty.get_submodule(owner), attribute, buffer)
    assert_same_numbers(empty, model)
