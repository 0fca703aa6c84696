"""The example of the quirks, on a model that takes a second: every quirk is caught, and every rollout passes."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import generate_quirks as example
from conftest import make_tiny_model, plain_twin


@pytest.fixture(scope="module")
def stage():
    """A tiny random model in the place of the trained one: four of its tokens end a text as often as in the example."""
    torch.manual_seed(0)
    reference = plain_twin(make_tiny_model(resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1))
    with torch.no_grad():
        reference.transformer.ln_f.weight.mul_(3)
    prompts = torch.randint(1, 96, (560, example.LONGEST))
    even = prompts[:, : example.PROMPT]
    mask = torch.ones_like(prompts)
    for row in range(len(prompts)):
        mask[row, : example.LONGEST - 2 - row % (example.LONGEST - 1)] = 0
    policy = example.make_policy(reference, even[:32], 0)
    return example.Stage(policy, reference, 0, (even, torch.ones_like(even)), (prompts * mask, mask))


@pytest.mark.parametrize("quirk", example.QUIRKS, ids=lambda quirk: quirk.name)
def test_every_quirk_is_caught_and_every_rollout_passes(stage, quirk):
    torch.manual_seed(0)
    row = example.measure(stage, quirk)
    assert row.as_expected, f"{row.generate.audit}; {row.rollout.audit}"
    assert row.generate.audit.p_value < 1e-4
    assert abs(row.rollout.bias) < 4 * row.rollout.standard_error
    assert not stage.policy.training
    assert stage.policy.generation_config.repetition_penalty in (None, 1.0)  # as it was


def test_table_page_and_picture_show_every_quirk(stage, tmp_path, capsys):
    torch.manual_seed(0)
    rows = [example.measure(stage, quirk) for quirk in example.QUIRKS[:2]]
    example.show(rows, example.Console(width=120))
    shown = capsys.readouterr().out
    page = example.markdown(rows)
    example.draw(rows, tmp_path / "deep" / "quirks.png")
    assert (tmp_path / "deep" / "quirks.png").read_bytes().startswith(b"\x89PNG")
    for row in rows:
        assert row.quirk.name in shown
        assert row.quirk.settings in page
    assert page.count("\n") == 1 + 2 * len(rows)
