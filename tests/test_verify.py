"""`verify_package` proves that a package loads in a fresh interpreter and computes what it did when saved."""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_model
from safetensors.torch import load_file, save_file
from test_inspection import edit_json

from hub_tools import errors, layout
from hub_tools.package.save import save_package
from hub_tools.package.verify import TOLERANCE, verify_package


def touching(path):
    """A line of code that shows that it ran."""
    return f"__import__('pathlib').Path({str(path)!r}).touch()\n"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "package"
    save_package(make_tiny_model().to(torch.bfloat16), folder)
    return folder


@pytest.fixture
def package(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "package"))


def record_again(package):
    """Make the record's hashes those of the files, as an author who edits a package on purpose would."""
    record = json.loads((package / layout.RECORD).read_text())
    record["sha256"] = {name: layout.sha256_of(package / name) for name in record["sha256"]}
    (package / layout.RECORD).write_text(json.dumps(record))


def append_to_code(package, text):
    with open(package / "modeling_gpt2_value.py", "a") as file:
        file.write(text)
    record_again(package)


def test_a_sound_package_is_verified(tiny_model, tiny_tokenizer, tmp_path):
    save_package(tiny_model, tmp_path / "p", tiny_tokenizer, max_shard_size=40_000)
    report = verify_package(tmp_path / "p")
    assert report.max_logit_difference <= report.logit_tolerance
    assert report.max_value_difference <= report.value_tolerance
    assert TOLERANCE <= report.value_tolerance < 1e-2
    assert report.loaded_with["torch"] == torch.__version__
    assert report.peak_memory_bytes > 1 << 20
    assert report.seconds > report.load_seconds > 0
    json.dumps(report.to_json())


def test_one_tolerance_holds_for_bfloat16(saved):
    """Both sides compute in float32, and the head sees bfloat16 weights either way."""
    report = verify_package(saved)
    assert report.package.dtypes["bfloat16"] > 0
    assert report.max_logit_difference <= report.logit_tolerance


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
        "    try:\n"
        "        _importlib.import_module(_name)\n"
        "    except ImportError:\n"
        "        continue\n"
        "    raise RuntimeError(_name)\n",
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


def test_other_numbers_are_refused(package):
    """Weights that are finite, complete and hashed, and not the ones whose numbers were recorded."""
    weights = load_file(package / layout.WEIGHTS)
    weights["v_head.summary.bias"] += 0.01
    save_file(weights, package / layout.WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(errors.ChangedFileError, match=r"model\.safetensors"):
        verify_package(package)
    record_again(package)
    with pytest.raises(errors.VerificationError, match=r"values differ .* by 0\.01"):
        verify_package(package)


def test_weights_that_are_not_finite_are_refused(package):
    weights = load_file(package / layout.WEIGHTS)
    weights["transformer.h.0.ln_1.bias"][3] = float("inf")
    save_file(weights, package / layout.WEIGHTS, metadata={"format": "pt"})
    record_again(package)
    with pytest.raises(errors.UnsavableModelError, match=r"transformer\.h\.0\.ln_1\.bias"):
        verify_package(package)


def test_an_interpreter_that_takes_too_long_is_stopped(saved):
    with pytest.raises(errors.ResourceLimitError, match=r"0\.02 s"):
        verify_package(saved, timeout=0.02)


def no_head(package):
    weights = load_file(package / layout.WEIGHTS)
    body = {name: weight for name, weight in weights.items() if not name.startswith("v_head.")}
    save_file(body, package / layout.WEIGHTS, metadata={"format": "pt"})


def no_code(package):
    (package / "generation_gpt2_value.py").unlink()


def no_record(package):
    (package / layout.RECORD).unlink()


def pickle_beside(package):
    (package / "optimizer.pt").write_bytes(b"")


def secret_beside(package):
    (package / ".env").write_text("HF_TOKEN=hf_x")


def edited_config(package):
    edit_json(package / layout.CONFIG, summary_activation="tanh")


def a_flipped_bit(package):
    data = bytearray((package / layout.WEIGHTS).read_bytes())
    data[-100] ^= 1
    (package / layout.WEIGHTS).write_bytes(data)


@pytest.mark.parametrize(
    ("spoil", "error", "names"),
    [
        (no_head, errors.MissingHeadError, "no value head"),
        (no_code, errors.PackageError, "generation_gpt2_value.py"),
        (no_record, errors.PackageError, layout.RECORD),
        (pickle_beside, errors.PackageError, "optimizer.pt"),
        (secret_beside, errors.PackageError, r"\.env"),
        (edited_config, errors.ChangedFileError, "config.json"),
        (a_flipped_bit, errors.ChangedFileError, layout.WEIGHTS),
    ],
)
def test_what_is_not_a_complete_unchanged_package_is_refused(spoil, error, names, package, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/no/interpreter/is/needed")
    spoil(package)
    with pytest.raises(error, match=names):
        verify_package(package)
