"""The `gpt2-value` command: results on stdout, errors as one message, exit statuses that scripts can use."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_model, write_published_checkpoint
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from support.settings import seeded
from test_verify import record_again

from hub_tools import layout
from hub_tools.package.save import save_package
from modeling_gpt2_value import GPT2ValueModel


@pytest.fixture
def base(tiny_tokenizer, tmp_path):
    write_published_checkpoint(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def package(tiny_tokenizer, tmp_path):
    save_package(make_tiny_model(), tmp_path / "package", tiny_tokenizer)
    return tmp_path / "package"


def test_create_makes_a_package_of_a_checkpoint(gpt2_value, base, tmp_path):
    status, out, _ = gpt2_value("create", "--base", base, tmp_path / "out", "--license", "mit")
    assert status == 0
    assert f'AutoModel.from_pretrained("{tmp_path / "out"}", trust_remote_code=True)' in out
    model = GPT2ValueModel.from_pretrained(tmp_path / "out")
    assert torch.count_nonzero(model(torch.tensor([[1, 2, 3]])).value) == 0  # the head starts at zero
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.license, card.data.base_model) == ("mit", None)  # a folder is nobody's base model
    assert (tmp_path / "out" / "tokenizer.json").exists()
    status, out, err = gpt2_value("create", "--base", base, tmp_path / "out", "--no-overwrite")
    assert (status, out) == (1, "")
    assert "overwrite" in err
    status, out, _ = gpt2_value("create", "--base", base, tmp_path / "out", "--dtype", "bfloat16", "--json")
    assert status == 0
    assert set(json.loads(out)["files"]) == set(os.listdir(tmp_path / "out"))
    assert GPT2ValueModel.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16


def test_respond_gives_a_script_the_numbers_that_python_gives(gpt2_value, package, tiny_tokenizer):
    command = ("respond", package, "Hello", "--max-new-tokens", 4, "--seed", 1)
    assert gpt2_value(*command)[1].count("log-prob") == 1
    status, out, _ = gpt2_value(*command, "--json")
    assert status == 0
    assert gpt2_value(*command, "--json")[1] == out  # the seed makes it repeatable
    (response,) = json.loads(out)["responses"]
    model, end = GPT2ValueModel.from_pretrained(package), tiny_tokenizer.eos_token_id
    prompt = torch.tensor([tiny_tokenizer("Hello")["input_ids"]])
    drawn = model.rollout(prompt, max_new_tokens=4, eos_token_id=end, generator=seeded(1))
    for name, column in {"id": drawn.responses, "logprob": drawn.logprobs, "value": drawn.values}.items():
        numbers = column[drawn.response_mask].tolist()
        assert [token[name] for token in response["tokens"]] == pytest.approx(numbers, abs=1e-5)


def test_respond_runs_only_code_that_is_known_or_was_reviewed(gpt2_value, package, tmp_path):
    name = "configuration_gpt2_value.py"
    with open(package / name, "a") as file:
        file.write(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    record_again(package)
    respond = ("respond", package, "a", "--max-new-tokens", 1)
    status, out, err = gpt2_value(*respond)
    assert (status, out) == (1, "")
    assert "was not run" in err
    assert gpt2_value("audit", package)[0] == gpt2_value("app", package, "--port", 0)[0] == 1
    assert not (tmp_path / "ran").exists()
    assert gpt2_value(*respond, "--reviewed", f"{name}={layout.sha256_of(package / name)}")[0] == 0
    assert (tmp_path / "ran").exists()
    assert gpt2_value(*respond, "--reviewed", name)[0] == 2


def test_inspect_exits_with_3_where_verify_would_refuse(gpt2_value, package):
    status, out, _ = gpt2_value("inspect", package)
    assert status == 0
    assert "this version's" in out
    lines = out.splitlines()  # each hash in one piece, to be copied
    assert all(f"{layout.installed_hashes()[name]}  {name}" in lines for name in layout.REMOTE_CODE)
    (package / "optimizer.pt").write_bytes(b"")
    status, out, _ = gpt2_value("inspect", package, "--json")
    assert status == 3
    assert json.loads(out)["pickles"] == ["optimizer.pt"]
    assert "optimizer.pt" in json.loads(out)["findings"][0]
    status, _, err = gpt2_value("verify", package)
    assert status == 1
    assert "optimizer.pt" in err


def test_verify_reports_the_differences(gpt2_value, package):
    status, out, _ = gpt2_value("verify", package, "--json")
    assert status == 0
    assert json.loads(out)["max_value_difference"] < 1e-4


@pytest.mark.parametrize(
    ("status", "says", "command"),
    [
        (1, "/no/such/folder", "inspect /no/such/folder"),
        (1, "/no/such/folder", "verify /no/such/folder"),
        (1, "no-such-user/no-such-repo is not in the cache", "respond no-such-user/no-such-repo a"),
        (1, "no file or folder /no/such/folder", "create --base /no/such/folder /tmp/never-written"),
        (2, "--base", "create /tmp/never-written"),
        (2, "int3", "create --base gpt2 --dtype int3 /tmp/never-written"),
        (2, "no-such-command", "no-such-command"),
        (2, "temperature", "respond PACKAGE a --temperature 0"),
        (2, "top_p", "respond PACKAGE a --top-p 2"),
        (2, "64", "respond PACKAGE a --max-new-tokens 1000"),
        (2, "revision", "respond PACKAGE a --revision main"),
        (2, "/no/[bold]such", "respond PACKAGE a --html /no/[bold]such/page.html"),
    ],
)
def test_what_goes_wrong_is_one_message_on_stderr(status, says, command, gpt2_value, package):
    found, out, err = gpt2_value(*command.replace("PACKAGE", str(package)).split())
    assert (found, out) == (status, "")
    assert says in err
    assert "Traceback" not in err
    assert status == 2 or "next: " in err


def test_a_base_without_a_tokenizer_names_the_option(gpt2_value, base, tmp_path):
    for file in base.glob("*token*"):
        file.unlink()
    status, _, err = gpt2_value("create", "--base", base, tmp_path / "out")
    assert status == 1
    assert "--no-tokenizer" in err
    assert gpt2_value("create", "--base", base, tmp_path / "out", "--no-tokenizer")[0] == 0


def test_what_a_package_says_cannot_command_the_terminal(gpt2_value, package):
    settings = json.loads((package / layout.TOKENIZER_CONFIG).read_text())
    settings["tokenizer_class"] = "\x1b[2J[red]Evil[/red]"
    (package / layout.TOKENIZER_CONFIG).write_text(json.dumps(settings))
    (package / "\x1b]0;title\x07").write_text("")
    _, out, err = gpt2_value("inspect", package)
    assert "\x1b" not in out + err
    assert r"\x1b[2J[red]Evil[/red]" in out + err


HIDDEN = {
    "escapes": ("x = 1  # \x1b[2K\x1b[1A\n", r"x = 1  # \x1b[2K\x1b[1A"),
    "bidi": ("ok = '\u202e'  # \u2066\n", r"ok = '\u202e'  # \u2066"),
    "a line break that only Python sees": ("# a comment\rimport os\n", r"# a comment\rimport os"),
    "a line break that only viewers see": ("# a\u2028b\x0cc\n", r"# a\u2028b\x0cc"),
}


@pytest.mark.parametrize("what", HIDDEN)
def test_a_diff_shows_what_would_hide_from_a_reader(what, gpt2_value, package):
    hidden, shown = HIDDEN[what]
    with open(package / "sampling_gpt2_value.py", "a", newline="") as file:
        file.write(f"{hidden}evil = 1\n")
    status, out, _ = gpt2_value("inspect", package, "--diff")
    assert status == 3
    assert f"+{shown}\n" in out
    assert "+evil = 1\n" in out
    assert "DANGER: characters" in out
    assert not set(out) & set("\x1b\u202e\u2066\r\u2028\x0c")


@pytest.mark.parametrize(
    ("name", "data", "danger"),
    [
        ("x.py", b"#!/usr/bin/python\n# vim: set fileencoding=utf-7 :\n+AAo-evil\n", "declares an encoding"),
        ("x.py", b"\n# -*- coding: raw_unicode_escape -*-\n# \\u000aevil\n", "declares an encoding"),
        ("x.py", "# é".encode("utf-16"), "not UTF-8"),
        ("x.pyc", b"\x00", "compiled code"),
        ("x.py", b"#" * 300_000, "more than 200,000 bytes"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_a_diff_names_what_nobody_can_read(name, data, danger, gpt2_value, package):
    (package / name).write_bytes(data)
    _, out, _ = gpt2_value("inspect", package, "--diff")
    assert f"{name}  sha256 {layout.sha256_of(package / name)}\nDANGER: " in out
    assert danger in out
    assert len(out) < 2_000


def test_a_name_of_a_file_forges_no_line_of_a_diff(gpt2_value, package):
    (package / "x.py  sha256 0\nall code is version 9.py").write_text("import os\n")
    _, out, _ = gpt2_value("inspect", package, "--diff")
    assert "x.py  sha256 0\\nall code is version 9" in out
    assert "\nall code" not in out


def test_a_diff_names_code_in_folders_and_of_our_own_code_is_empty(gpt2_value, package):
    assert gpt2_value("inspect", package, "--diff")[:2] == (0, f"all code is version {layout.__version__}'s\n")
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "modeling_gpt2_value.cpython-311.pyc").write_bytes(b"\x00")
    status, out, _ = gpt2_value("inspect", package, "--diff")
    assert status == 3
    assert out.startswith("DANGER: code in folders")
    assert "__pycache__/modeling_gpt2_value.cpython-311.pyc" in out


def test_weights_that_overflow_are_the_packages_fault(gpt2_value, package):
    weights = load_file(package / layout.WEIGHTS)
    weights["transformer.ln_f.weight"].fill_(3e38)
    save_file(weights, package / layout.WEIGHTS, {"format": "pt"})
    record_again(package)
    for command in ("respond", package, "a"), ("audit", package):
        status, out, err = gpt2_value(*command)
        assert (status, out) == (1, ""), err
        assert "finite" in err


@pytest.mark.parametrize(
    ("command", "named"),
    [
        ("", "[-h]"),
        ("app", "--compare"),
        ("create", "--base"),
        ("respond", "--top-p"),
        ("ppo", "--reward"),
    ],
)
def test_help_teaches(command, named, gpt2_value):
    status, out, _ = gpt2_value(*command.split(), "--help")
    assert status == 0
    assert "usage" in out.lower()
    assert named in out


@pytest.mark.parametrize(
    ("encoding", "command", "said"),
    [
        ("utf-8", "--help", "usage"),
        ("utf-8", "--version", layout.__version__),
        ("latin-1", "inspect", r"ko\u0161"),
        ("ascii", "inspect", "ko"),
    ],
)
def test_the_command_needs_no_torch_to_inspect_and_any_terminal_shows_it(encoding, command, said, package, tmp_path):
    """A letter that the terminal lacks is shown as its escape."""
    package.rename(tmp_path / "koš")
    program = "import sys; sys.modules['torch'] = None; from hub_tools import cli; cli.main(sys.argv[1:])"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "PYTHONIOENCODING": encoding}
    folder = [tmp_path / "koš"] if command == "inspect" else []
    arguments = [sys.executable, "-c", program, command, *folder]
    done = subprocess.run(arguments, env=environment, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert said in done.stdout


def test_inspect_looks_into_a_repository_on_the_hub(gpt2_value, package, server):
    with open(package / "modeling_gpt2_value.py", "a") as file:
        file.write("# another\n")
    server.create("alice/value", {path.name: path.read_bytes() for path in package.iterdir()})
    commit = server.history("alice/value")[0].oid
    status, out, _ = gpt2_value("inspect", "alice/value", "--revision", "main")
    assert status == 3
    assert "NOT a released version's" in out
    assert f"read it: gpt2-value inspect alice/value --diff --revision {commit}" in out
    _, out, _ = gpt2_value("inspect", "alice/value", "--diff", "--revision", commit)
    assert "+# another\n" in out
    assert out.count("\n+") == 2  # the name of the file, and its new line
    assert json.loads(gpt2_value("inspect", "alice/value", "--json")[1])["commit"] == commit
