"""A stranger's files run nothing, read nothing outside, exhaust nothing, and tell lies to nobody.

Each test is named after what must not happen. SECURITY.md names them, one for each promise.
"""

import json
import os
import py_compile
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_model
from safetensors.torch import save_file
from test_inspection import edit_json
from test_load_package import same_weights
from test_verify import record_again, touching
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from hub_tools import (
    convert_checkpoint,
    errors,
    inspect_package,
    layout,
    limits,
    load_package,
    save_package,
    verify_package,
)
from hub_tools.package.tokenizer import load_tokenizer

MODELING = "modeling_gpt2_value.py"
ROOT = Path(__file__).parent.parent
FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")
READERS = (inspect_package, load_package, verify_package)


@pytest.fixture
def with_tokenizer(tiny_tokenizer, tmp_path):
    save_package(make_tiny_model(), tmp_path / "spoken", tiny_tokenizer)
    return tmp_path / "spoken"


# Nothing runs but what a person reviewed


def test_what_inspection_hashed_is_what_a_review_allows(package):
    with open(package / MODELING, "a") as file:
        file.write("REVIEWED = True\n")
    record_again(package)
    for reader in (load_package, verify_package):
        with pytest.raises(errors.UntrustedCodeError):
            reader(package)
    hashes = inspect_package(package).code_sha256
    assert set(hashes) == set(layout.REMOTE_CODE)
    loaded = load_package(package, reviewed_sha256=hashes)
    module = sys.modules[type(loaded.model).__module__]
    assert module.REVIEWED
    assert loaded.code_version is None
    assert layout.sha256_of(Path(module.__file__)) == hashes[MODELING]


DISGUISES = {  # to every viewer, the second line is a comment; U+0085 ends a line to none but Python's utf-7
    "utf-7": lambda code: b"# coding: utf-7\n# harmless +AAo-raise SystemExit\n" + code,
    "a cookie on the second line": lambda code: b"#!/usr/bin/env python\n# -*- coding: latin-1 -*-\n" + code,
    "a mark before it": lambda code: "\ufeff".encode("utf-16") + code,
    "a line that a terminal erases": lambda code: code + b"raise SystemExit  #\x1b[2K\rx = 1\n",
    "a line that reads backwards": lambda code: code + "access = 'user\u202e \u2066# admin only\u2069'\n".encode(),
    "a line that ends where nothing shows it": lambda code: code + b"# harmless\rraise SystemExit\n",
}


@pytest.mark.parametrize("what", DISGUISES)
def test_code_that_looks_otherwise_than_it_runs_is_not_offered_for_review(what, package):
    (package / MODELING).write_bytes(DISGUISES[what]((package / MODELING).read_bytes()))
    record_again(package)
    for reader in (inspect_package, load_package, lambda folder: verify_package(folder, trust_remote_code=True)):
        with pytest.raises(errors.PackageError, match="looks otherwise than it runs") as refused:
            reader(package)
        assert all(char.isprintable() or char == "\n" for char in str(refused.value))


def test_what_lies_in_a_shared_module_cache_is_not_run(package, tmp_path, monkeypatch):
    """Compiled code of the same age and size as its source, and a package of the name that transformers would give."""
    from transformers import dynamic_module_utils

    cache = tmp_path / "modules"
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(cache))
    with open(package / MODELING, "a") as file:
        file.write("REVIEWED = True\n")
    record_again(package)
    evil = tmp_path / "evil.py"
    evil.write_text(touching(tmp_path / "ran"))
    for name in (package.name, "files", "gpt2_value"):
        home = cache / "transformers_modules" / name
        home.mkdir(parents=True)
        for file in layout.REMOTE_CODE:
            shutil.copy2(package / file, home / file)
            compiled = home / "__pycache__" / f"{Path(file).stem}.{sys.implementation.cache_tag}.pyc"
            py_compile.compile(
                str(evil), str(compiled), invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH
            )
    loaded = load_package(package, reviewed_sha256=inspect_package(package).code_sha256)
    assert same_weights(loaded.model, make_tiny_model())
    assert verify_package(package, trust_remote_code=True).package.folder == package
    assert not (tmp_path / "ran").exists()
    assert not list(Path(sys.modules[type(loaded.model).__module__].__file__).parent.glob("*.pyc"))


def test_code_that_is_exchanged_after_it_was_hashed_is_not_run(package, tmp_path, monkeypatch):
    run = subprocess.run

    def exchange_and_run(*args, **how):
        (package / MODELING).write_text(touching(tmp_path / "ran"))
        return run(*args, **how)

    monkeypatch.setattr(subprocess, "run", exchange_and_run)
    assert verify_package(package).package.folder == package
    assert not (tmp_path / "ran").exists()


def test_an_adapter_in_a_package_does_not_change_its_numbers(package, tmp_path):
    """transformers would load it silently from the folder itself, and run another loop of generation."""
    name = "base_model.model.transformer.h.0.attn.c_attn"
    ones = {f"{name}.lora_A.weight": torch.ones(1, 32), f"{name}.lora_B.weight": torch.ones(96, 1)}
    save_file(ones, package / "adapter_model.safetensors", metadata={"format": "pt"})
    (package / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 1, "target_modules": ["c_attn"]})
    )
    (package / "custom_generate").mkdir()
    (package / "custom_generate" / "generate.py").write_text(touching(tmp_path / "ran"))
    assert same_weights(load_package(package).model, make_tiny_model())
    with pytest.raises(errors.PackageError, match="do not belong"):
        verify_package(package)
    assert not (tmp_path / "ran").exists()


# Nothing outside is read or written


def test_a_link_out_of_a_package_is_not_followed(with_tokenizer, tmp_path):
    (tmp_path / "secret").write_text("a secret")
    (with_tokenizer / "chat_template.jinja").symlink_to(tmp_path / "secret")
    for reader in READERS:
        with pytest.raises(errors.PackageError, match="leads out"):
            reader(with_tokenizer)
    (with_tokenizer / "chat_template.jinja").unlink()
    (with_tokenizer / "additional_chat_templates").mkdir()
    (with_tokenizer / "additional_chat_templates" / "x.jinja").symlink_to(tmp_path / "secret")
    assert "a secret" not in str(load_package(with_tokenizer).tokenizer.chat_template)


@pytest.mark.parametrize("file", [layout.TOKENIZER_CONFIG, layout.SPECIAL_TOKENS_MAP])
def test_a_tokenizer_is_not_read_from_another_place(file, with_tokenizer, tiny_tokenizer, tmp_path):
    (tmp_path / "outside.json").write_text('{"a-secret": 0}')
    fields = json.loads((with_tokenizer / file).read_text()) if (with_tokenizer / file).exists() else {}
    for name in ("vocab", "merges", "vocab_file", "tokenizer_file", "sp_model_kwargs", "init_inputs"):
        fields[name] = str(tmp_path / "outside.json")
    (with_tokenizer / file).write_text(json.dumps(fields))
    (with_tokenizer / layout.RECORD).unlink()
    assert load_package(with_tokenizer).tokenizer.get_vocab() == tiny_tokenizer.get_vocab()


def test_a_chat_template_whose_name_is_a_path_is_not_written_there(with_tokenizer):
    for name in ("../../../written", "/tmp/written", "a\0b", "default"):
        edit_json(with_tokenizer / layout.TOKENIZER_CONFIG, chat_template=[{"name": name, "template": "a"}])
        record_again(with_tokenizer)
        with pytest.raises(errors.PackageError, match="chat_template"):
            load_package(with_tokenizer)


def test_a_link_in_the_place_of_a_lock_is_not_emptied(tiny_model, tmp_path):
    """filelock before 3.20 opens it, wherever it leads, and empties what is there."""
    (tmp_path / "precious").write_text("precious")
    planted = tmp_path / ".p.saving-aaaaaaaa"
    planted.mkdir()
    (planted / "lock").symlink_to(tmp_path / "precious")
    save_package(tiny_model, tmp_path / "p")
    assert (tmp_path / "precious").read_text() == "precious"


# Nothing is exhausted


def tried(tokenizer, folder, monkeypatch, seconds=5.0):
    """Try a tokenizer as a package's is tried, with less memory and time."""
    monkeypatch.setattr(limits, "TOKENIZER_MEMORY", 512 * limits.MIB)
    monkeypatch.setattr(limits, "TOKENIZER_SECONDS", seconds)
    tokenizer.save(str(folder / "tokenizer.json"))
    with pytest.raises(errors.LoadError, match="its trial") as refused:
        load_tokenizer(folder, "it", config=None)
    return refused.value.found


@pytest.mark.own_interpreter  # the limit of its memory counts what a fork has already
@pytest.mark.parametrize("part", ["normalizer", "decoder"])
def test_a_tokenizer_that_doubles_its_text_does_not_fill_the_memory(part, tiny_tokenizer, tmp_path, monkeypatch):
    """The decoder multiplies one token that no text encodes to."""
    tokenizer = tiny_tokenizer.backend_tokenizer
    if part == "normalizer":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Replace("secret", "secretsecret")] * 12)
    else:
        tokenizer.add_special_tokens(["secret"])
        tokenizer.decoder = decoders.Sequence([decoders.Replace("secret", "secretsecret")] * 12)
    assert part in tried(tokenizer, tmp_path, monkeypatch)


@pytest.mark.own_interpreter
@pytest.mark.parametrize("place", ["vocabulary", "added", "replacement", "unknown"])
def test_a_token_of_megabytes_is_not_used(place, tmp_path, monkeypatch):
    """It would take time that grows with the square of its length."""
    long = "ab" * 1_800_000
    vocabulary = {"a": 0, "b": 1, **({long: 2} if place in ("vocabulary", "unknown") else {})}
    tokenizer = Tokenizer(
        models.WordPiece(vocabulary, unk_token=long, max_input_chars_per_word=1 << 30)
        if place == "unknown"
        else models.BPE(vocabulary, [])
    )
    if place == "added":
        tokenizer.add_tokens([long[:10_000]])  # of all, tokenizers 0.22 takes hours
    if place == "replacement":
        tokenizer.decoder = decoders.Replace("a", long)
    assert "too " in tried(tokenizer, tmp_path, monkeypatch)


@pytest.mark.own_interpreter
def test_a_tokenizer_that_does_not_end_is_ended(tiny_tokenizer, tmp_path, monkeypatch):
    tokenizer = tiny_tokenizer.backend_tokenizer
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    tried(tokenizer, tmp_path, monkeypatch, seconds=1.0)


def test_a_file_that_is_too_large_is_not_parsed(with_tokenizer):
    os.truncate(with_tokenizer / "tokenizer.json", 252 * 10**6)
    for reader in READERS:
        with pytest.raises(errors.PackageError, match=r"tokenizer\.json has 252,000,000 bytes"):
            reader(with_tokenizer)


@pytest.mark.parametrize("fields", [{"num_beams": 1024}, {"num_return_sequences": 1024}], ids=str)
def test_a_generation_config_of_a_thousand_beams_is_not_taken_over(fields, package):
    edit_json(package / layout.GENERATION_CONFIG, **fields)
    record_again(package)
    for reader in READERS:
        with pytest.raises(errors.PackageError, match="from 1 to 16"):
            reader(package)


@pytest.mark.parametrize("levels", [100, 100_000])
def test_json_in_json_in_json_does_not_use_up_the_stack(levels, package):
    text = '{"a":[' * levels + "1" + "]}" * levels
    (package / layout.CONFIG).write_text((package / layout.CONFIG).read_text().rstrip()[:-1] + f',"x":{text}}}')
    with pytest.raises(errors.PackageError, match="levels deep"):
        inspect_package(package)


@pytest.mark.parametrize("value", ["1" + "0" * 400, "1e400", "9" * 5000, "-Infinity"], ids=range(4))
def test_a_number_that_no_float_holds_is_not_read(value, package):
    (package / layout.CONFIG).write_text(f'{{"a": {value}}}')
    with pytest.raises(errors.PackageError, match=r"config\.json holds"):
        inspect_package(package)


def test_the_fresh_interpreter_does_not_take_all_the_memory(package, monkeypatch):
    monkeypatch.setattr(limits, "VERIFY_MEMORY", 50 * limits.MIB)
    with pytest.raises(errors.LoadError):
        verify_package(package)


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
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == f"[({1 << 30}, {2 << 30}), (20, 60)]\n{5 << 30} 0\n", done.stderr


def test_the_private_copies_are_removed(with_tokenizer, tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    load_package(with_tokenizer)
    verify_package(with_tokenizer)
    assert list((tmp_path / "temporary").iterdir()) == []


# Fields are allowed, not forbidden


@pytest.mark.parametrize(
    ("file", "fields"),
    [
        (layout.CONFIG, {"activation_function": 5}),
        (layout.CONFIG, {"architectures": 5}),
        (layout.CONFIG, {"dtype": "load"}),
        (layout.CONFIG, {"_attn_implementation": "other/kernel"}),
        (layout.CONFIG, {"transformers_weights": "../elsewhere.safetensors"}),
        (layout.CONFIG, {"quantization_config": {"quant_method": "bitsandbytes"}}),
        (layout.CONFIG, {"num_labels": 10**9}),
        (layout.CONFIG, {"add_cross_attention": True}),
        (layout.CONFIG, {"n_positions": 1 << 20}),
        (layout.CONFIG, {"eos_token_id": {"a": 1}}),
        (layout.GENERATION_CONFIG, {"temperature": "hot"}),
        (layout.TOKENIZER_CONFIG, {"bos_token": 5}),
        (layout.TOKENIZER_CONFIG, {"auto_map": {"AutoTokenizer": ["tokenizer.Evil", None]}}),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_field_that_is_out_of_range_or_means_something_else_is_not_accepted(file, fields, with_tokenizer):
    edit_json(with_tokenizer / file, **fields)
    record_again(with_tokenizer)
    for reader in (inspect_package, load_package):
        with pytest.raises(errors.PackageError, match=next(iter(fields))):
            reader(with_tokenizer)


def test_fields_that_nobody_knows_are_not_shown_to_a_library_nor_raw_to_a_terminal(package, tmp_path):
    names = ["a_field_of_the_future", "to_dict", "custom_generate", "\x1b[31mred\x1b[0m", "x" * 5000]
    for file in (layout.CONFIG, layout.GENERATION_CONFIG):
        edit_json(package / file, **dict.fromkeys(names, "x"))
    record_again(package)
    loaded = load_package(package)
    assert not hasattr(loaded.model.config, "a_field_of_the_future")
    assert loaded.model.config.to_dict()
    (note,) = convert_checkpoint(package, tmp_path / "out").notes
    assert "'a_field_of_the_future'" in note
    assert note.isprintable()
    assert len(note) < 500


@pytest.mark.parametrize(
    ("file", "fields"),
    [
        (layout.TOKENIZER_CONFIG, {"tokenizer_class": "RagTokenizer"}),  # two tokenizers
        (layout.TOKENIZER_CONFIG, {"tokenizer_class": "BigBirdTokenizer"}),  # reads a variable that it has not set
        (layout.TOKENIZER_CONFIG, {"added_tokens_decoder": {"9": {"content": "x" * 5000}}}),
        ("tokenizer.json", {"added_tokens": [{"id": 200, "content": "xyz", **dict.fromkeys(FLAGS, False)}]}),
    ],
    ids=["two", "broken", "a long token", "an id that the model does not have"],
)
def test_a_tokenizer_that_does_not_fit_is_refused(file, fields, with_tokenizer):
    edit_json(with_tokenizer / file, **fields)
    record_again(with_tokenizer)
    with pytest.raises((errors.LoadError, errors.TokenizerMismatchError), match="tokenizer"):
        load_package(with_tokenizer)


# Errors say what is wrong, and cannot command a terminal or a shell


def test_an_error_does_not_pass_escape_sequences_on(package):
    edit_json(package / layout.CONFIG, model_type="\x1b[31m\x07\u202egpt\u2066")
    with pytest.raises(errors.NotAPackageError) as refused:
        inspect_package(package)
    assert all(char.isprintable() or char == "\n" for char in str(refused.value))
    assert r"\x1b[31m\x07\u202egpt\u2066" in refused.value.found.replace("\\\\", "\\")


def test_advice_is_not_a_shell_injection(package, tmp_path):
    outside = tmp_path / "q;touch PWN;" / "c.json"
    outside.parent.mkdir()
    shutil.move(package / layout.CONFIG, outside)
    (package / layout.CONFIG).symlink_to(outside)
    with pytest.raises(errors.PackageError) as refused:
        inspect_package(package)
    command = refused.value.next_step.partition(": ")[2]
    assert shlex.split(command) == ["cp", "--remove-destination", str(outside), str(package / layout.CONFIG)]


@pytest.mark.parametrize("place", ["a\0b", "x" * 300, "\ud800", "loop", "not/there/at/all"], ids=range(5))
def test_a_place_that_cannot_be_a_folder_is_not_a_traceback(place, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    for reader in READERS:
        with pytest.raises(errors.NotAPackageError):
            reader(place)
    if place in ("a\0b", "x" * 300, "loop"):
        with pytest.raises(errors.FolderRefusedError):
            save_package(tiny_model, place)


def test_a_git_lfs_pointer_is_not_taken_for_weights(package):
    (package / layout.WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    for reader in READERS:
        with pytest.raises(errors.PackageError, match="git-lfs pointer") as refused:
            reader(package)
        assert "git lfs pull" in refused.value.next_step


# The document


def test_security_md_names_tests_that_are_there():
    named = re.findall(r"`(tests/\w+\.py)::(\w+)`", (ROOT / "SECURITY.md").read_text())
    assert len(named) >= 15
    for file, test in named:
        assert f"def {test}(" in (ROOT / file).read_text(), f"{file}::{test}"
