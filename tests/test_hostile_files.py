"""Files that change, lie or have no end: JSON that takes for ever, names that lead out, races, processes with limits.

Each test is named after what must not happen.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_convert import Original, write_trl, write_trl_shards
from test_convert_peft import Adapted
from test_inspection import edit_json
from test_verify import record_again
from tokenizers import normalizers

from hub_tools import (
    convert_checkpoint,
    errors,
    export_policy,
    inspect_package,
    layout,
    limits,
    load_package,
    save_package,
    verify_package,
)
from hub_tools.convert.pickles import read_tensors
from hub_tools.files import open_in, parse_json, read_json
from hub_tools.package import stage as stage_module
from hub_tools.package.tokenizer import try_in_a_process

ROOT = Path(__file__).parent.parent


# JSON


def test_a_key_that_stands_twice_among_a_million_is_not_looked_for_until_tomorrow():
    started = time.perf_counter()
    pairs = ",".join(f'"{number}":0' for number in (*range(1_000_000), 999_999))
    with pytest.raises(errors.PackageError, match="999999' twice"):
        parse_json(f"{{{pairs}}}".encode(), "x.json")
    assert time.perf_counter() - started < 30


@pytest.mark.parametrize(
    "value", ["1" + "0" * 400, "-1" + "0" * 400, "1e400", "9" * 5000, "NaN", "-Infinity"], ids=range(6)
)
def test_a_number_that_no_float_holds_is_not_read(value):
    with pytest.raises(errors.PackageError, match=r"x\.json"):
        parse_json(f'{{"a": {value}}}'.encode(), "x.json")


def test_a_model_max_length_of_transformers_is_read():
    assert parse_json(b'{"a": 1000000000000000019884624838656}', "x.json") == {"a": int(1e30)}


@pytest.mark.parametrize("levels", [100, 900, 150_000])
@pytest.mark.parametrize("kind", ["lists", "objects"])
def test_json_in_json_in_json_does_not_use_up_the_stack(levels, kind, package):
    text = "[" * levels + "]" * levels if kind == "lists" else '{"a":' * levels + "1" + "}" * levels
    (package / layout.CONFIG).write_text((package / layout.CONFIG).read_text().rstrip()[:-1] + f',"x":{text}}}')
    with pytest.raises(errors.PackageError, match="nested too deep"):
        inspect_package(package)


def test_a_record_of_numbers_that_no_float_holds_is_not_a_traceback(package):
    record = json.loads((package / layout.RECORD).read_text())
    record["logits"][0][0] = 10**400
    (package / layout.RECORD).write_text(json.dumps(record))
    with pytest.raises(errors.PackageError, match=layout.RECORD):
        inspect_package(package)


def test_an_adapter_of_such_numbers_is_not_a_traceback(tmp_path):
    adapted = Adapted(tmp_path)
    adapted.edit(lora_alpha=10**400)
    with pytest.raises(errors.PackageError, match="adapter_config"):
        convert_checkpoint(adapted.folder, tmp_path / "ours")


def test_a_name_of_a_million_letters_does_not_fill_the_screen(tmp_path):
    write_trl(Original(), tmp_path / "theirs")
    file = tmp_path / "theirs" / "model.safetensors"
    save_file({**load_file(file), "\x1b" * 1_000_000: torch.zeros(1)}, file)
    with pytest.raises(errors.PackageError) as refusal:
        convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    assert len(str(refusal.value)) < 10_000


# Names that lead elsewhere


@pytest.mark.parametrize(
    "name", ["a\0.safetensors", "\ud800.bin", "x" * 5000, "", ".", 7, None, ["x"], "../theirs.bin"]
)
def test_an_index_that_names_what_cannot_be_a_file_is_not_a_traceback(name, tmp_path):
    write_trl_shards(Original(), tmp_path / "theirs")
    index = tmp_path / "theirs" / "pytorch_model.bin.index.json"
    held = json.loads(index.read_text())
    held["weight_map"]["transformer.wte.weight"] = name
    index.write_text(json.dumps(held))
    with pytest.raises(errors.GPT2ValueHubError):
        convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")


def test_a_base_whose_index_names_shards_outside_is_not_read(gpt2_value, tmp_path):
    """transformers joins the names with the folder's, and an absolute one stands for itself."""
    original = Original()
    original.body.save_pretrained(tmp_path / "secret")
    original.write_config(tmp_path / "base")
    weights = {name: str(tmp_path / "secret" / "model.safetensors") for name in original.body.state_dict()}
    (tmp_path / "base" / layout.WEIGHTS_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weights}))
    save_file({"x": torch.zeros(100_000)}, tmp_path / "base" / "model-00001-of-00001.safetensors")
    status, _, err = gpt2_value("create", "--base", tmp_path / "base", tmp_path / "out", "--no-tokenizer")
    assert (status, (tmp_path / "out").exists()) == (1, False)
    assert "names the file" in err


@pytest.mark.parametrize("name", ["vocab", "merges", "vocab_file", "merges_file", "tokenizer_file", "init_inputs"])
def test_a_map_of_special_tokens_does_not_lead_to_another_vocabulary(name, tiny_model, tiny_tokenizer, tmp_path):
    """transformers takes every field of it for an argument of the tokenizer's class."""
    save_package(tiny_model, tmp_path / "p", tiny_tokenizer)
    (tmp_path / "outside.json").write_text('{"a-secret": 0}')
    (tmp_path / "p" / layout.SPECIAL_TOKENS_MAP).write_text(json.dumps({name: str(tmp_path / "outside.json")}))
    edit_json(tmp_path / "p" / layout.TOKENIZER_CONFIG, tokenizer_class="GPT2Tokenizer", added_tokens_decoder=...)
    record = json.loads((tmp_path / "p" / layout.RECORD).read_text())
    record["sha256"][layout.SPECIAL_TOKENS_MAP] = ""
    (tmp_path / "p" / layout.RECORD).write_text(json.dumps(record))
    record_again(tmp_path / "p")
    for reader in (inspect_package, load_package):
        with pytest.raises(errors.PackageError, match=name):
            reader(tmp_path / "p")


@pytest.mark.parametrize("name", ["../../../written", "/tmp/written", "a/b", "", "a\0b", 5], ids=range(6))
def test_a_chat_template_whose_name_is_a_path_is_not_written_there(name, tiny_model, tiny_tokenizer, tmp_path):
    save_package(tiny_model, tmp_path / "p", tiny_tokenizer)
    templates = [{"name": "default", "template": "a"}, {"name": name, "template": "b"}]
    edit_json(tmp_path / "p" / layout.TOKENIZER_CONFIG, chat_template=templates)
    record_again(tmp_path / "p")
    write_trl(Original(), tmp_path / "theirs")
    tiny_tokenizer.save_pretrained(tmp_path / "theirs")
    edit_json(tmp_path / "theirs" / layout.TOKENIZER_CONFIG, chat_template=templates)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    for function, *arguments in (
        (load_package, tmp_path / "p"),
        (export_policy, tmp_path / "p", tmp_path / "policy"),
        (convert_checkpoint, tmp_path / "theirs", tmp_path / "ours"),
    ):
        with pytest.raises(errors.PackageError, match="chat_template"):
            function(*arguments)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("fields", [{"a": -(1 << 40)}, {"a": "b"}, {"a": []}, {"x" * 5000: 1}], ids=range(4))
def test_added_tokens_that_cannot_be_are_not_added(fields, tiny_model, tiny_tokenizer, tmp_path):
    save_package(tiny_model, tmp_path / "p", tiny_tokenizer)
    (tmp_path / "p" / layout.ADDED_TOKENS).write_text(json.dumps(fields))
    with pytest.raises(errors.PackageError, match=layout.ADDED_TOKENS):
        inspect_package(tmp_path / "p")


@pytest.mark.parametrize("id", ["9" * 5000, "9" * 12, "\u0663", "-1"], ids=range(4))
def test_an_id_that_is_no_number_of_ours_is_not_a_traceback(id, tiny_model, tiny_tokenizer, tmp_path):
    save_package(tiny_model, tmp_path / "p", tiny_tokenizer)
    edit_json(tmp_path / "p" / layout.TOKENIZER_CONFIG, added_tokens_decoder={id: {"content": "a"}})
    with pytest.raises(errors.PackageError, match="added_tokens_decoder"):
        inspect_package(tmp_path / "p")


@pytest.mark.parametrize("place", ["a\0b", "x" * 300, "\ud800", "loop"], ids=range(4))
def test_a_source_that_cannot_be_a_folder_is_not_a_traceback(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    for reader in (inspect_package, load_package, verify_package):
        with pytest.raises(errors.NotAPackageError):
            reader(place)
    with pytest.raises(errors.PackageError):
        convert_checkpoint(place, "out")
    write_trl(Original(), tmp_path / "theirs")
    if place != "\ud800":  # which is a name like any other on this system
        with pytest.raises(errors.FolderRefusedError):
            convert_checkpoint("theirs", place)


# Races


def test_weights_that_are_cut_off_while_they_are_converted_do_not_end_the_process(tmp_path):
    """Who reads a mapped file beyond its end is killed by SIGBUS, and no error is raised."""
    for name in ("a.safetensors", "a.bin"):
        state = {"a": torch.randn(100_000)}
        save_file(state, tmp_path / name) if name.endswith("s") else torch.save(state, tmp_path / name)
        read = read_tensors(tmp_path / name, limit=1 << 30)
        os.truncate(tmp_path / name, 0)
        assert torch.equal(read["a"], state["a"])


def test_a_pipe_that_takes_a_files_place_after_the_check_is_not_waited_for(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_text("{}")
    plain = os.open

    def exchange_and_open(path, *args, **how):
        if os.fspath(path) == os.fspath(tmp_path / "a.json"):
            (tmp_path / "a.json").unlink()
            os.mkfifo(tmp_path / "a.json")
        return plain(path, *args, **how)

    monkeypatch.setattr(os, "open", exchange_and_open)
    with pytest.raises(errors.PackageChangedError, match="replaced"):
        read_json(tmp_path, "a.json")


def test_a_link_that_takes_a_files_place_after_the_check_is_not_followed(tmp_path, monkeypatch):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "a").write_text("theirs")
    (tmp_path / "secret").write_text("a secret")
    plain = os.open

    def exchange_and_open(path, *args, **how):
        if os.fspath(path) == os.fspath(tmp_path / "p" / "a"):
            (tmp_path / "p" / "a").unlink()
            (tmp_path / "p" / "a").symlink_to(tmp_path / "secret")
        return plain(path, *args, **how)

    monkeypatch.setattr(os, "open", exchange_and_open)
    with pytest.raises(errors.PackageChangedError, match="replaced"), open_in(tmp_path / "p", "a"):
        pass


def test_a_file_that_the_user_names_may_be_a_link(tmp_path):
    write_trl(Original(), tmp_path / "theirs")
    (tmp_path / "theirs" / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (tmp_path / "theirs" / "latest.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    record = convert_checkpoint(tmp_path / "theirs" / "latest.safetensors", tmp_path / "ours")
    assert record.source_format == "trl"


# Sizes and seconds


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_weights_beyond_what_the_config_calls_for_are_not_copied(name, tmp_path):
    write_trl(Original(), tmp_path / "theirs")
    (tmp_path / "theirs" / "model.safetensors").rename(tmp_path / "theirs" / name)
    os.truncate(tmp_path / "theirs" / name, 1 << 40)
    with pytest.raises(errors.PackageError, match=r"1,099,511,627,776 bytes"):
        convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")


def test_a_mask_of_ones_is_not_taken_for_a_causal_one(tmp_path):
    """Nor compared all at once: that takes three times its bytes."""
    original = Original()
    write_trl(original, tmp_path / "theirs")
    file = tmp_path / "theirs" / "model.safetensors"
    sides = (64, 3000)
    for side in sides:
        mask = torch.ones(1, 1, side, side, dtype=torch.uint8)
        save_file({**load_file(file), "transformer.h.0.attn.bias": mask.tril()}, file)
        convert_checkpoint(tmp_path / "theirs", tmp_path / f"ours-{side}")
        mask.tril_()[0, 0, side - 2, side - 1] = 1
        save_file({**load_file(file), "transformer.h.0.attn.bias": mask}, file)
        with pytest.raises(errors.ConversionError, match="causal"):
            convert_checkpoint(tmp_path / "theirs", tmp_path / "not")


def test_a_disk_that_delivers_a_byte_an_hour_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "COPY_SECONDS", 0)
    monkeypatch.setattr(limits, "COPY_BYTES_PER_SECOND", 1 << 60)
    monkeypatch.setattr(stage_module, "_PIECE", 10)
    (tmp_path / "a.safetensors").write_bytes(b"\0" * 1000)
    with pytest.raises(errors.ResourceLimitError, match="too slowly"):
        read_tensors(tmp_path / "a.safetensors", limit=1 << 30)


# Processes


def in_a_process(program, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_limit_that_the_user_set_is_not_raised():
    program = """
import resource
from hub_tools.limited_process import limit_this_process
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 2 << 30))
resource.setrlimit(resource.RLIMIT_CPU, (50, 60))
limit_this_process({"RLIMIT_AS": 4 << 30, "RLIMIT_CPU": 20, "RLIMIT_DATA": 5 << 30})
print([resource.getrlimit(kind) for kind in (resource.RLIMIT_AS, resource.RLIMIT_CPU)])
print(resource.getrlimit(resource.RLIMIT_DATA)[0], resource.getrlimit(resource.RLIMIT_CORE)[0])
"""
    assert in_a_process(program) == f"[({1 << 30}, {2 << 30}), (20, 60)]\n{5 << 30} 0\n"


def test_a_tokenizer_is_tried_also_where_the_user_has_less_memory_than_it_may_take(tiny_tokenizer, tmp_path):
    tiny_tokenizer.save_pretrained(tmp_path)
    program = """
import resource, sys
from pathlib import Path
from hub_tools.package.tokenizer import try_in_a_process
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
try_in_a_process(Path(sys.argv[1]), "it")
"""
    in_a_process(program, str(tmp_path))


def test_the_fresh_interpreter_does_not_take_all_the_memory(package, monkeypatch):
    monkeypatch.setattr(limits, "VERIFY_MEMORY", 50 * limits.MIB)
    with pytest.raises(errors.LoadError):
        verify_package(package)


def test_a_tokenizer_that_does_not_end_is_ended(tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "TOKENIZER_SECONDS", 1.0)
    tokenizer = tiny_tokenizer.backend_tokenizer
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace("e", "e")] * 3000)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(errors.ResourceLimitError, match="in a process of its own"):
        try_in_a_process(tmp_path, "it")
