"""`verify_package` proves that a package loads in a fresh interpreter and computes what it did when saved."""

import json
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_model
from safetensors.torch import load_file, save_file
from test_inspection import edit_json

from hub_tools import errors, layout, save_package, verify_package


def touching(path):
    """A line of code that shows that it ran."""
    return f"__import__('pathlib').Path({str(path)!r}).touch()\n"


def record_again(package):
    """Make the record's hashes those of the files, as an author who edits a package on purpose would."""
    record = json.loads((package / layout.RECORD).read_text())
    record["sha256"] = {name: layout.sha256_of(package / name) for name in record["sha256"]}
    (package / layout.RECORD).write_text(json.dumps(record))


def append_to_code(package, text):
    with open(package / "modeling_gpt2_value.py", "a") as file:
        file.write(text)
    record_again(package)


def change_weights(package, change):
    weights = load_file(package / layout.WEIGHTS)
    change(weights)
    save_file(weights, package / layout.WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sound_package_is_verified_by_one_tolerance(dtype, tiny_tokenizer, tmp_path):
    """Both sides compute in float32, and the head sees bfloat16 weights either way."""
    save_package(make_tiny_model().to(dtype), tmp_path / "p", tiny_tokenizer, max_shard_size=40_000)
    report = verify_package(tmp_path / "p")
    assert report.package.dtypes[str(dtype).removeprefix("torch.")] > 0
    assert max(report.max_logit_difference, report.max_value_difference) < 1e-3
    assert str(report).startswith(f"{tmp_path / 'p'} verified: logits differ by at most ")


def test_the_fresh_interpreter_sees_neither_this_checkout_nor_secrets_nor_caches(package, monkeypatch):
    """The package's own code looks around when it is loaded, and fails if it finds any of these."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    monkeypatch.chdir(Path(__file__).parent.parent)
    append_to_code(
        package,
        "import os as _os, sys as _sys, importlib as _importlib\n"
        "if 'HF_TOKEN' in _os.environ or _os.environ.get('HF_HUB_OFFLINE') != '1': raise RuntimeError('environment')\n"
        f"if {str(Path(__file__).parent.parent)!r} in (_os.getcwd(), *_sys.path): raise RuntimeError('path')\n"
        f"if not _os.environ['HF_HOME'].startswith({tempfile.gettempdir()!r}): raise RuntimeError('caches')\n"
        "for _name in ('hub_tools', 'modeling_gpt2_value', 'configuration_gpt2_value'):\n"
        "    try:\n        _importlib.import_module(_name)\n"
        "    except ImportError:\n        continue\n    raise RuntimeError(_name)\n",
    )
    assert verify_package(package, trust_remote_code=True)


def test_other_code_is_not_run_unless_trusted(package, tmp_path):
    append_to_code(package, touching(tmp_path / "ran") + "raise SystemError('the code ran')\n")
    with pytest.raises(errors.UntrustedCodeError, match=r"modeling_gpt2_value\.py.*not run"):
        verify_package(package)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(errors.LoadError, match="the code ran") as caught:
        verify_package(package, trust_remote_code=True)
    assert (tmp_path / "ran").exists()
    assert "Traceback" in caught.value.details


def another_value(weights):
    weights["v_head.summary.bias"] += 0.01


def infinite(weights):
    weights["transformer.h.0.ln_1.bias"][3] = float("inf")


@pytest.mark.parametrize(
    ("change", "error", "found"),
    [
        (another_value, errors.VerificationError, r"values differ .* by 0\.01"),
        (infinite, errors.LoadError, r"transformer\.h\.0\.ln_1\.bias"),
    ],
)
def test_other_weights_than_those_that_were_saved_are_refused(change, error, found, package):
    """Complete weights, also where an author has recorded their hash."""
    change_weights(package, change)
    with pytest.raises(errors.ChangedFileError, match=r"model\.safetensors"):
        verify_package(package)
    record_again(package)
    with pytest.raises(error, match=found):
        verify_package(package)


def test_an_interpreter_that_takes_too_long_is_stopped(saved):
    with pytest.raises(errors.LoadError, match=r"0\.02 s"):
        verify_package(saved, timeout=0.02)


def no_head(package):
    def remove(weights):
        del weights["v_head.summary.weight"], weights["v_head.summary.bias"]

    change_weights(package, remove)


def a_flipped_bit(package):
    data = bytearray((package / layout.WEIGHTS).read_bytes())
    data[-100] ^= 1
    (package / layout.WEIGHTS).write_bytes(data)


@pytest.mark.parametrize(
    ("spoil", "error", "names"),
    [
        (no_head, errors.MissingHeadError, "no value head"),
        (lambda package: (package / "generation_gpt2_value.py").unlink(), errors.PackageError, "generation_gpt2_value"),
        (lambda package: (package / layout.RECORD).unlink(), errors.PackageError, layout.RECORD),
        (lambda package: (package / "optimizer.pt").write_bytes(b""), errors.PackageError, "optimizer.pt"),
        (lambda package: (package / ".env").write_text("HF_TOKEN=hf_x"), errors.PackageError, r"\.env"),
        (
            lambda package: edit_json(package / layout.CONFIG, summary_activation="tanh"),
            errors.ChangedFileError,
            "config.json",
        ),
        (a_flipped_bit, errors.ChangedFileError, layout.WEIGHTS),
    ],
)
def test_what_is_not_a_complete_unchanged_package_is_refused(spoil, error, names, package, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/no/interpreter/is/needed")
    spoil(package)
    with pytest.raises(error, match=names):
        verify_package(package)
