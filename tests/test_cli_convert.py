"""`gpt2-value convert` and `gpt2-value export`: what the functions do, from a shell."""

import json

import torch
from test_convert import Original, assert_same_numbers, write_trl
from transformers import GPT2LMHeadModel


def test_convert_writes_a_package_and_export_a_plain_gpt2(gpt2_value, tmp_path):
    original = Original()
    write_trl(original, tmp_path / "theirs")
    status, out, _ = gpt2_value("convert", tmp_path / "theirs", tmp_path / "ours")
    assert status == 0
    assert "trl" in out
    assert f"gpt2-value verify {tmp_path / 'ours'}" in out.replace("\n", "")
    assert_same_numbers(tmp_path / "ours", original.numbers())
    export = ("export", tmp_path / "ours", tmp_path / "policy")
    status, out, _ = gpt2_value(*export, "--json")
    assert status == 0
    assert "model.safetensors" in json.loads(out)["files"]
    assert gpt2_value(*export)[0] == 1  # never over another without a word
    assert gpt2_value(*export, "--overwrite")[0] == 0
    assert torch.isfinite(GPT2LMHeadModel.from_pretrained(tmp_path / "policy").lm_head.weight).all()
