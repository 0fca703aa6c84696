"""`gpt2-value convert` and `gpt2-value export`: what the functions do, from a shell."""

import json

import torch
from test_convert import Original, assert_same_numbers, write_trl
from transformers import GPT2LMHeadModel


def test_convert_writes_a_package_and_says_what_was_kept(gpt2_value, tmp_path):
    original = Original()
    write_trl(original, tmp_path / "theirs")
    status, out, _ = gpt2_value("convert", tmp_path / "theirs", tmp_path / "ours")
    assert status == 0
    assert "trl" in out
    assert f"gpt2-value verify {tmp_path / 'ours'}" in out.replace("\n", "")
    assert_same_numbers(tmp_path / "ours", original.numbers())


def test_convert_refuses_with_one_message_and_the_option_it_names_helps(gpt2_value, tmp_path):
    original = Original()
    layers = {"v_head.0.weight": torch.ones(64, 32), "v_head.2.weight": torch.ones(1, 64)}  # as trlx's
    original.write(tmp_path / "theirs", {"model.safetensors": {**original.state("base_model."), **layers}})
    status, out, err = gpt2_value("convert", tmp_path / "theirs", tmp_path / "ours")
    assert (status, out) == (1, "")
    assert err.startswith("error: ")
    assert "v_head.0.weight" in err
    status, out, _ = gpt2_value("convert", tmp_path / "theirs", tmp_path / "ours", "--init-value-head", "--json")
    assert status == 0
    record = json.loads(out)
    assert record["source_format"] == "gpt2"
    assert "v_head.2.weight" in record["dropped"]


def test_export_writes_a_plain_gpt2_and_never_over_another_without_a_word(gpt2_value, tmp_path):
    write_trl(Original(), tmp_path / "theirs")
    gpt2_value("convert", tmp_path / "theirs", tmp_path / "ours")
    status, out, _ = gpt2_value("export", tmp_path / "ours", tmp_path / "policy", "--json")
    assert status == 0
    assert "model.safetensors" in json.loads(out)["files"]
    assert gpt2_value("export", tmp_path / "ours", tmp_path / "policy")[0] == 1
    assert gpt2_value("export", tmp_path / "ours", tmp_path / "policy", "--overwrite")[0] == 0
    assert torch.isfinite(GPT2LMHeadModel.from_pretrained(tmp_path / "policy").lm_head.weight).all()
