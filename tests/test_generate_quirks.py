"""The example of the quirks, on a tiny random model: every quirk is caught, and every rollout passes."""

import generate_quirks as example
import pytest
import torch
from conftest import make_tiny_model, plain_twin


@pytest.mark.parametrize("name", example.QUIRKS)
def test_every_quirk_is_caught_and_every_rollout_passes(name):
    torch.manual_seed(0)
    model = plain_twin(make_tiny_model(resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1))
    with torch.no_grad():
        model.transformer.ln_f.weight.mul_(3)  # as sharp as a trained one's
    prompts = torch.randint(1, 96, (240, 4))
    end = int(model(prompts).logits.softmax(-1).mean((0, 1)).argmax())  # one that ends many rows
    told, drawn = example.audits(model, prompts, end, name, example.QUIRKS[name])
    assert told.p_value < 1e-4
    assert drawn.honest
