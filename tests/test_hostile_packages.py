"""A stranger's files run nothing, read nothing outside, exhaust nothing, never swap the model, and fail in plain words.

Each test is named after what must not happen. SECURITY.md names them, one for each promise.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_model, write_published_checkpoint
from safetensors.torch import load_file, save_file
from slow.fault_sweep import serving
from test_inspection import edit_json
from test_load_package import same_weights
from test_verify import record_again
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from hub_tools import errors, inspect_package, layout, limits, load_package, save_package, verify_package
from hub_tools.package import config as allowed_fields
from hub_tools.package import verify
from hub_tools.package.tokenizer import try_in_a_process

MODELING = "modeling_gpt2_value.py"
ROOT = Path(__file__).parent.parent


@pytest.fixture
def with_tokenizer(tiny_tokenizer, tmp_path):
    save_package(make_tiny_model(), tmp_path / "spoken", tiny_tokenizer)
    return tmp_path / "spoken"


def run_command(*arguments, **environment):
    """`gpt2-value` in a process of its own, without torch, which the commands used here do not need."""
    program = "import sys; sys.modules['torch'] = None; from hub_tools import cli; cli.main(sys.argv[1:])"
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
    )


# Nothing runs but what was hashed, and nobody swaps the model


def test_an_adapter_in_a_package_does_not_change_its_answers(with_tokenizer, gpt2_value, tmp_path):
    """transformers would load it silently from the folder itself."""
    respond = ("respond", with_tokenizer, "Hello", "--seed", 1, "--max-new-tokens", 5, "--json")
    before = gpt2_value(*respond)[1]
    name = "base_model.model.transformer.h.0.attn.c_attn"
    ones = {f"{name}.lora_A.weight": torch.ones(1, 32), f"{name}.lora_B.weight": torch.ones(96, 1)}
    save_file(ones, with_tokenizer / "adapter_model.safetensors", metadata={"format": "pt"})
    (with_tokenizer / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 9, "target_modules": ["c_attn"], "fan_in_fan_out": True})
    )
    status, after, _ = gpt2_value(*respond)
    assert (status, after) == (0, before)


def test_verify_does_not_run_code_that_was_exchanged_after_it_was_hashed(package, tmp_path, monkeypatch):
    edit_json(package / layout.CONFIG, a_field_of_the_future="x")  # which the fresh interpreter is not shown
    record_again(package)
    run = subprocess.run

    def exchange_and_run(*args, **how):
        (package / MODELING).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
        return run(*args, **how)

    monkeypatch.setattr(verify.subprocess, "run", exchange_and_run)
    assert verify_package(package).folder == package
    assert not (tmp_path / "ran").exists()


def test_what_inspection_hashed_is_what_a_review_allows(package, tmp_path):
    with open(package / MODELING, "a") as file:
        file.write("REVIEWED = True\n")
    record_again(package)
    with pytest.raises(errors.UntrustedCodeError):
        load_package(package)
    hashes = inspect_package(package).code_sha256
    assert set(hashes) == set(layout.REMOTE_CODE)
    assert sys.modules[type(load_package(package, reviewed_sha256=hashes).model).__module__].REVIEWED


# Nothing outside is read


@pytest.mark.parametrize("name", ["vocab", "merges", "vocab_file", "tokenizer_file", "sp_model_kwargs", "mecab_kwargs"])
def test_a_tokenizer_is_not_read_from_another_place(name, with_tokenizer, tmp_path):
    (tmp_path / "outside.json").write_text("{}")
    place = {"x": "y"} if name.endswith("kwargs") else str(tmp_path / "outside.json")
    edit_json(with_tokenizer / layout.TOKENIZER_CONFIG, **{"tokenizer_class": "GPT2Tokenizer", name: place})
    record_again(with_tokenizer)
    for reader in (inspect_package, load_package):
        with pytest.raises(errors.PackageError, match=name):
            reader(with_tokenizer)


@pytest.mark.parametrize("name", ["RagTokenizer", "BigBirdTokenizer"])
def test_a_class_that_is_no_tokenizer_or_cannot_be_made_is_refused(name, with_tokenizer):
    """RagTokenizer holds two tokenizers. BigBirdTokenizer reads a variable that it has not set (transformers 5)."""
    edit_json(with_tokenizer / layout.TOKENIZER_CONFIG, tokenizer_class=name)
    record_again(with_tokenizer)
    with pytest.raises((errors.LoadError, errors.TokenizerMismatchError), match="tokenizer"):
        load_package(with_tokenizer)


def test_a_chat_template_that_is_a_link_is_not_followed(with_tokenizer, tmp_path):
    (tmp_path / "secret").write_text("a secret")
    (with_tokenizer / "chat_template.jinja").symlink_to(tmp_path / "secret")
    for reader in (inspect_package, load_package, verify_package):
        with pytest.raises(errors.PackageError, match="leads out"):
            reader(with_tokenizer)


def test_templates_in_folders_are_not_loaded(with_tokenizer, tmp_path):
    (tmp_path / "secret").write_text("a secret")
    (with_tokenizer / "additional_chat_templates").mkdir()
    (with_tokenizer / "additional_chat_templates" / "x.jinja").symlink_to(tmp_path / "secret")
    assert "a secret" not in str(load_package(with_tokenizer).tokenizer.chat_template)


def test_a_base_whose_files_are_links_is_not_read(gpt2_value, tiny_tokenizer, tmp_path):
    write_published_checkpoint(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "secret").write_text("a secret")
    (tmp_path / "base" / "chat_template.jinja").symlink_to(tmp_path / "secret")
    status, _, err = gpt2_value("create", "--base", tmp_path / "base", tmp_path / "out")
    assert (status, (tmp_path / "out").exists()) == (1, False)
    assert "leads out" in err


# Nothing is exhausted


@pytest.mark.own_interpreter  # the limit of its memory counts what a fork has already
@pytest.mark.parametrize("doublings", [12, 28])
def test_a_tokenizer_that_doubles_its_text_does_not_fill_the_memory(doublings, tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "TOKENIZER_MEMORY", 512 * limits.MIB)
    tokenizer = tiny_tokenizer.backend_tokenizer
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace("secret", "secretsecret")] * doublings)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(errors.ResourceLimitError, match="in a process of its own"):
        try_in_a_process(tmp_path, "it")


def test_a_package_with_such_a_tokenizer_is_not_loaded(with_tokenizer):
    doubled = {"type": "Replace", "pattern": {"String": "M"}, "content": "MM"}
    edit_json(with_tokenizer / "tokenizer.json", normalizer={"type": "Sequence", "normalizers": [doubled] * 12})
    record_again(with_tokenizer)
    with pytest.raises(errors.ResourceLimitError, match="spoken"):
        load_package(with_tokenizer)


def test_a_tokenizer_of_hundreds_of_megabytes_is_not_parsed(with_tokenizer):
    os.truncate(with_tokenizer / "tokenizer.json", 252 * 10**6)
    for reader in (inspect_package, load_package):
        with pytest.raises(errors.PackageError, match=r"tokenizer\.json has 252,000,000 bytes"):
            reader(with_tokenizer)


@pytest.mark.parametrize("fields", [{"n_layer": 2**31 - 1}, {"n_embd": 2**30}, {"vocab_size": 2**31 - 1}], ids=str)
def test_a_base_that_claims_to_be_huge_is_not_built(fields, gpt2_value, tmp_path):
    write_published_checkpoint(tmp_path / "base")
    edit_json(tmp_path / "base" / layout.CONFIG, **fields)
    status, _, err = gpt2_value("create", "--base", tmp_path / "base", tmp_path / "out", "--no-tokenizer")
    assert status == 1
    assert "config.json" in err


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.int32], ids=str)
def test_a_base_of_whole_numbers_is_not_taken_for_one_of_weights(dtype, gpt2_value, tmp_path):
    write_published_checkpoint(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    state = {name: tensor.clone() for name, tensor in load_file(file).items()}  # which maps the file: it is replaced
    masks = {name: mask.to(torch.uint8) for name, mask in state.items() if name.endswith(".attn.bias")}
    save_file({**state, **masks}, file, metadata={"format": "pt"})
    create = ("create", "--base", tmp_path / "base", tmp_path / "out", "--no-tokenizer")
    assert gpt2_value(*create)[0] == 0
    save_file({**state, "wpe.weight": state["wpe.weight"].to(dtype)}, file, metadata={"format": "pt"})
    status, _, err = gpt2_value(*create)
    assert status == 1
    assert "wpe.weight" in err


def test_weights_that_a_base_lacks_are_not_made_up(gpt2_value, tmp_path):
    write_published_checkpoint(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    state = load_file(file)
    del state["h.1.mlp.c_fc.weight"]
    save_file(state, file, metadata={"format": "pt"})
    status, _, err = gpt2_value("create", "--base", tmp_path / "base", tmp_path / "out", "--no-tokenizer")
    assert (status, (tmp_path / "out").exists()) == (1, False)
    assert "h.1.mlp.c_fc.weight" in err


# Fields are allowed, not forbidden


@pytest.mark.parametrize(
    ("file", "fields"),
    [
        (layout.CONFIG, {"activation_function": "os.system"}),
        (layout.CONFIG, {"architectures": 5}),
        (layout.CONFIG, {"dtype": "load"}),
        (layout.CONFIG, {"attribute_map": {"x": "y"}, "_attn_implementation": "other/kernel"}),
        (layout.CONFIG, {"to_dict": 1}),
        (layout.CONFIG, {"eos_token_id": {"a": 1}}),
        (layout.GENERATION_CONFIG, {"watermarking_config": 5}),
        (layout.GENERATION_CONFIG, {"custom_generate": "other/repo"}),
        (layout.GENERATION_CONFIG, {"temperature": "hot"}),
        (layout.GENERATION_CONFIG, {"num_beams": 10**9}),
        (layout.GENERATION_CONFIG, {"validate": 1}),
    ],
    ids=str,
)
def test_a_field_that_is_out_of_range_or_means_something_else_is_not_accepted(file, fields, package):
    edit_json(package / file, **fields)
    record_again(package)
    for reader in (inspect_package, load_package):
        with pytest.raises(errors.PackageError, match=list(fields)[-1]):
            reader(package)


def test_a_field_that_nobody_knows_is_not_shown_to_transformers(package):
    edit_json(package / layout.CONFIG, a_field_of_the_future="x")
    record_again(package)
    loaded = load_package(package)
    assert not hasattr(loaded.model.config, "a_field_of_the_future")
    assert loaded.package.unknown_fields == {layout.CONFIG: ("a_field_of_the_future",)}
    assert "a_field_of_the_future" in (package / layout.CONFIG).read_text()


def test_what_we_write_ourselves_has_no_unknown_field(with_tokenizer):
    assert inspect_package(with_tokenizer).unknown_fields == {}
    for file in (layout.CONFIG, layout.GENERATION_CONFIG, layout.TOKENIZER_CONFIG):
        fields = json.loads((with_tokenizer / file).read_text())
        kept = allowed_fields.reduce(file, fields)
        assert set(fields) - set(kept) <= allowed_fields._OF_NO_EFFECT[file]


def test_no_method_of_a_config_can_be_hidden_by_a_field():
    from transformers import GenerationConfig

    from configuration_gpt2_value import GPT2ValueConfig

    for kind in (GPT2ValueConfig, GenerationConfig):
        methods = {name for name in dir(kind) if callable(getattr(kind, name)) and not name.startswith("_")}
        assert methods <= allowed_fields.METHODS


# Errors are ours, say what is wrong, and cannot command a terminal or a shell


def test_an_error_does_not_pass_escape_sequences_on(package):
    hostile = "\x1b[31m\x07\u202egpt\u2066"
    edit_json(package / layout.CONFIG, model_type=hostile)
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


def loop(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    return tmp_path / "loop" / "x"


@pytest.mark.parametrize("folder", [lambda _: "a\0b", lambda home: home / ("x" * 300), loop, lambda _: 5], ids=range(4))
def test_a_place_that_cannot_be_a_folder_is_not_a_traceback(folder, tiny_model, tmp_path):
    with pytest.raises(errors.FolderRefusedError):
        save_package(tiny_model, folder(tmp_path))


@pytest.mark.parametrize("value", [{1, 2}, object(), print], ids=["a set", "an object", "a function"])
def test_a_config_that_json_cannot_hold_is_not_half_written(value, tiny_model, tmp_path):
    tiny_model.config.extra = value
    with pytest.raises(errors.UnsavableModelError):
        save_package(tiny_model, tmp_path / "p")
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_that_cannot_read_is_not_a_traceback(tmp_path):
    """One that needs a token which it does not have fails only when it is used."""
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[], unk_token="missing"))
    with pytest.raises(errors.TokenizerMismatchError, match="cannot read"):
        save_package(make_tiny_model(), tmp_path / "p", PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize("function", ["create", "export"])
def test_a_config_that_transformers_will_not_write_is_not_a_traceback(function, package, gpt2_value, tmp_path):
    edit_json(package / layout.CONFIG, output_attentions=True)
    record_again(package)
    command = ("create", "--base", package, "--no-tokenizer") if function == "create" else ("export", package)
    status, _, err = gpt2_value(*command, tmp_path / "out")
    assert "Traceback" not in err
    assert (status, (tmp_path / "out").exists()) in ((0, True), (1, False))


def test_a_tokenizer_with_other_ids_than_the_model_is_not_loaded(with_tokenizer):
    vocabulary = json.loads((with_tokenizer / "tokenizer.json").read_text())["model"]
    edit_json(with_tokenizer / "tokenizer.json", model={**vocabulary, "vocab": {**vocabulary["vocab"], "xyz": 200}})
    record_again(with_tokenizer)
    with pytest.raises(errors.TokenizerMismatchError, match="the id 200"):
        load_package(with_tokenizer)


def test_weights_that_are_finite_and_too_large_are_not_a_traceback(tiny_model, tmp_path):
    with torch.no_grad():
        tiny_model.transformer.wte.weight.fill_(3e38)
    with pytest.raises(errors.UnsavableModelError, match="too large"):
        save_package(tiny_model, tmp_path / "p")
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize("facts", [{"license": 5}, {"base_model": 5}, {"tags": 5}, {"tags": "ppo"}, {"repo_id": 5}])
def test_facts_of_the_wrong_type_do_not_reach_the_card(facts, tiny_model, tmp_path):
    with pytest.raises(errors.OptionsError, match=next(iter(facts))):
        save_package(tiny_model, tmp_path / "p", **facts)


@pytest.mark.parametrize("timeout", [float("inf"), float("nan"), 0, -1, 1e300])
def test_a_timeout_without_end_is_not_taken(timeout, package):
    with pytest.raises(errors.OptionsError, match="timeout"):
        verify_package(package, timeout=timeout)


@pytest.mark.parametrize(
    ("command", "options", "says"),
    [
        ("verify", ["--timeout", "inf"], "timeout"),
        ("respond", ["a", "--seed", "9" * 23], "seed"),
        ("respond", [""], "no tokens"),
        ("audit", ["--seed", "9" * 23], "seed"),
        ("audit", [""], "no tokens"),
        ("audit", ["--plot", "/nope/x.png"], "/nope"),
        ("audit", ["--tokens", 50, "--generate", "num_beams=0"], "num_beams"),
        ("audit", ["--tokens", 50, "--generate", "logits_processor=[1]"], "logits_processor"),
    ],
)
def test_an_argument_that_cannot_be_used_is_not_a_traceback(command, options, says, gpt2_value, with_tokenizer):
    status, out, err = gpt2_value(command, with_tokenizer, *options)
    assert (status, out) == (2, "")
    assert says in err
    assert "Traceback" not in err


def test_a_letter_that_a_terminal_cannot_show_is_not_a_traceback(with_tokenizer):
    edit_json(with_tokenizer / layout.TOKENIZER_CONFIG, tokenizer_class="Zürich")
    done = run_command("inspect", with_tokenizer, PYTHONIOENCODING="ascii")
    assert done.returncode == 3, done.stderr  # it is not as it was saved
    assert rb"Z\xfcrich" in done.stdout


def test_a_path_that_the_locale_cannot_spell_is_not_a_traceback(package, tmp_path):
    place = package.rename(tmp_path / "Zürich")
    for environment in ({"LC_ALL": "C"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}):
        done = run_command("inspect", os.fsencode(place).decode("utf-8"), **environment)
        assert (done.returncode, done.stderr) == (0, b"")


# What is not a package says so


def test_a_repository_without_a_package_is_not_a_missing_cache_file(package, tmp_path):
    pickled = {layout.CONFIG: (package / layout.CONFIG).read_bytes(), "pytorch_model.bin": b"a pickle"}
    with serving(xet=False) as server:
        server.create("me/empty", {"README.md": b"nothing yet"})
        server.create("me/pickled", pickled)
        for reader in (load_package, inspect_package):
            with pytest.raises(errors.NotAPackageError, match=r"me/empty holds no package"):
                reader("me/empty", cache_dir=tmp_path / "cache")
            with pytest.raises(errors.PackageError, match=r"pytorch_model\.bin"):
                reader("me/pickled", cache_dir=tmp_path / "cache")


def test_a_git_lfs_pointer_is_not_taken_for_weights(package):
    (package / layout.WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    for reader in (load_package, inspect_package):
        with pytest.raises(errors.PackageError, match="git-lfs pointer") as refused:
            reader(package)
        assert "git lfs pull" in refused.value.next_step


def test_the_original_is_not_touched(package):
    before = {path.name: path.read_bytes() for path in package.iterdir()}
    loaded = load_package(package)
    assert {path.name: path.read_bytes() for path in package.iterdir()} == before
    held = load_file(package / layout.WEIGHTS)
    assert all(torch.equal(loaded.model.state_dict()[name], tensor) for name, tensor in held.items())
    assert same_weights(loaded.model, make_tiny_model())


# The documents


def test_security_md_does_not_name_a_test_that_is_not_there():
    named = re.findall(r"`(tests/\w+\.py)::(\w+)`", (ROOT / "SECURITY.md").read_text())
    assert len(named) >= 15
    for file, test in named:
        assert f"def {test}(" in (ROOT / file).read_text(), f"{file}::{test}"


def test_the_page_of_limits_does_not_differ_from_the_code():
    assert limits.tables() in (ROOT / "docs" / "limits.md").read_text()
