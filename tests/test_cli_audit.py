"""`gpt2-value audit`: exit status 0 for an honest sampler, 1 for a dishonest one, and what scripts and people read."""

import json

import pytest
import torch
from conftest import make_tiny_model

from hub_tools.package.save import save_package


@pytest.fixture
def audit(gpt2_value):
    """Run `gpt2-value audit`; returns (exit status, stdout, stderr)."""
    return lambda *arguments: gpt2_value("audit", *arguments, "--seed", 0)


@pytest.fixture
def package(tiny_tokenizer, tmp_path):
    model = make_tiny_model()
    with torch.no_grad():
        model.transformer.ln_f.weight.mul_(3)  # about as sharp as a trained model
    model.generation_config.eos_token_id = [0, *range(1, 30)]
    save_package(model, tmp_path / "package", tiny_tokenizer)
    return tmp_path / "package"


def test_our_own_rollout_passes(audit, package, tmp_path):
    status, out, _ = audit(package, "--plot", tmp_path / "audit.png")
    assert status == 0
    assert out.startswith("honest")
    assert (tmp_path / "audit.png").read_bytes().startswith(b"\x89PNG")
    options = "--temperature 0.7 --top-k 9 --top-p 0.8 --min-new-tokens 3"
    assert audit(package, "Hello", "a", *options.split())[0] == 0


def test_generate_with_its_defaults_is_dishonest(audit, package):
    status, out, _ = audit(package, "--generate", "max_new_tokens=20", "--json")
    found = json.loads(out)
    assert status == 1
    assert (found["verdict"], found["sampler"]) == ("dishonest", "generate(max_new_tokens=20)")
    assert found["p_value"] < 1e-4
    assert found["tokens"] >= 4000


@pytest.mark.parametrize(
    ("options", "status"),
    [
        ("--generate top_k=20 --top-k 20", 0),
        ("--generate top_k=0 --generate min_new_tokens=10 --min-new-tokens 10", 0),
        ("--generate top_k=0 --generate min_new_tokens=10", 1),
    ],
)
def test_generate_passes_only_where_the_claim_says_what_it_does(audit, package, options, status):
    assert audit(package, *options.split())[0] == status


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--generate", "top_k"], "KEY=VALUE"),
        (["--generate", "top_kk=5"], "top_kk"),
        (["--generate", "custom_generate=/tmp/x"], "custom_generate"),
        (["--generate", "trust_remote_code=true"], "trust_remote_code"),
        (["--generate", "num_beams=1024"], "num_beams"),
        (["--top-p", "3"], "top_p=3"),
    ],
    ids=str,
)
def test_wrong_usage_is_status_2_with_the_reason(audit, package, arguments, words):
    status, out, err = audit(package, "--tokens", 50, *arguments)
    assert (status, out) == (2, "")
    assert words in err


def test_a_package_that_is_not_there_is_refused(audit, tmp_path):
    status, _, err = audit(tmp_path / "nothing")
    assert status == 1
    assert "no file or folder" in err
