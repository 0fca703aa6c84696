"""`load_package` loads what is known or was reviewed, by hash, and refuses the rest without running any of it."""

import dataclasses
import hashlib
import json
import re
import shlex
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_model
from safetensors.torch import load_file, save_file
from test_verify import record_again, touching

from gpt2_value import rescore, rollout
from hub_tools import errors, inspect_package, layout, load_package, save_package, verify_package
from hub_tools.hub.download import FIRST_BYTES
from hub_tools.package import record as releases
from modeling_gpt2_value import GPT2ValueModel

REPO = "alice/value"
MODELING, SAMPLING = "modeling_gpt2_value.py", "sampling_gpt2_value.py"
RELEASED = Path(__file__).parent / "released"


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def change_code(package, text, *, name=MODELING):
    with open(package / name, "a") as file:
        file.write(text)
    record_again(package)
    return {name: sha256(package / name)}


def same_weights(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# Which code runs


def test_a_package_with_this_version_s_code_loads_and_runs_none_of_its_own(package, tiny_model, monkeypatch):
    def refuse(*_, **__):
        raise SystemError("the package's code was asked for")

    monkeypatch.setattr("transformers.dynamic_module_utils.get_cached_module_file", refuse)
    loaded = load_package(package)
    assert type(loaded.model) is GPT2ValueModel
    assert not loaded.model.training
    assert same_weights(loaded.model, tiny_model)
    assert (loaded.commit, loaded.code_version, loaded.tokenizer) == (None, layout.__version__, None)
    assert loaded.model.name_or_path == str(package)


def test_changed_code_is_refused_unread_and_the_advised_command_shows_it(gpt2_value, package, tmp_path):
    package = package.rename(tmp_path / "it's a package")
    change_code(package, touching(tmp_path / "ran"))
    with pytest.raises(errors.UntrustedCodeError, match=MODELING) as refused:
        load_package(package)
    assert not (tmp_path / "ran").exists()
    assert sha256(package / MODELING) in refused.value.found
    command = re.fullmatch(r"read it: (.+) , and if it is good pass reviewed_sha256=(.+)", refused.value.next_step)
    program, *arguments = shlex.split(command[1])
    assert program == "gpt2-value"
    assert f"+__import__('pathlib').Path({str(tmp_path / 'ran')!r}).touch()" in gpt2_value(*arguments)[1]
    assert json.loads(command[2].replace("'", '"')) == {MODELING: sha256(package / MODELING)}


@pytest.mark.parametrize("name", [MODELING, SAMPLING])
def test_a_review_holds_for_those_files_and_bytes_alone(name, package, tmp_path):
    reviewed = change_code(package, "# reviewed\n")
    change_code(package, touching(tmp_path / "ran"), name=name)
    with pytest.raises(errors.UntrustedCodeError, match=f"was not reviewed: {name}") as refused:
        load_package(package, reviewed_sha256=reviewed)
    assert (MODELING in refused.value.next_step) == (name == MODELING)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("reviewed", "error"),
    [
        ({MODELING: "0" * 64}, errors.UntrustedCodeError),
        ({"not_there.py": "0" * 64}, errors.UntrustedCodeError),
        ({MODELING: "yes"}, errors.UntrustedCodeError),
        ("*", ValueError),
    ],
)
def test_a_review_that_is_not_of_this_code_is_refused_though_the_code_is_known(reviewed, error, package):
    with pytest.raises(error):
        load_package(package, reviewed_sha256=reviewed)


def test_code_of_another_release_runs_as_it_was_released(package, tiny_model, monkeypatch, tmp_path):
    change_code(package, "RELEASE = 'an older one'\n")
    record = tmp_path / "releases.json"
    code = {name: sha256(package / name) for name in layout.REMOTE_CODE}
    record.write_text(json.dumps({"0.0.9": code}))
    with pytest.raises(errors.UntrustedCodeError):
        load_package(package)
    monkeypatch.setattr(releases, "RELEASES", record)
    loaded = load_package(package)
    assert loaded.code_version == "0.0.9"
    assert sys.modules[type(loaded.model).__module__].RELEASE == "an older one"
    assert same_weights(loaded.model, tiny_model)
    assert loaded.package.code == code


@pytest.mark.filterwarnings("ignore:.*past_key_values.:FutureWarning")  # which its own code passes on
def test_a_package_that_0_2_0_wrote_is_loaded_and_verified(tmp_path):
    """The archive was written by the code of 0.2.0 itself; its record holds the numbers that it computed."""
    zipfile.ZipFile(RELEASED / "gpt2-value-0.2.0.zip").extractall(tmp_path / "old")
    loaded = load_package(tmp_path / "old")
    assert loaded.code_version in ("0.2.0", layout.__version__)
    assert verify_package(tmp_path / "old", trust_remote_code=True).max_logit_difference <= 1e-6
    drawn = rollout(loaded.model, [torch.tensor([5, 17, 3])], max_new_tokens=8, top_p=0.9)
    torch.testing.assert_close(rescore(loaded.model, drawn).logprobs, drawn.logprobs, atol=1e-5, rtol=0)
    of_its_own = loaded.model.rollout([torch.tensor([5, 17, 3])], max_new_tokens=8)
    torch.testing.assert_close(loaded.model.rescore(of_its_own).values, of_its_own.values, atol=1e-5, rtol=0)


def test_the_installed_code_is_what_was_released_under_its_version():
    """Fails when code changes after a release without a new version."""
    recorded = json.loads(releases.RELEASES.read_text())
    assert recorded.get(layout.__version__, layout.installed_hashes()) == layout.installed_hashes()
    assert set(recorded) <= set(
        re.findall(r"(?m)^## ([\w.]+)", (Path(__file__).parent.parent / "CHANGELOG.md").read_text())
    )


def test_code_that_is_missing_is_named(package):
    (package / "decoding_gpt2_value.py").unlink()
    with pytest.raises(errors.UntrustedCodeError, match=r"decoding_gpt2_value\.py \(not there\)"):
        load_package(package)


# Strict about the weights


def rewrite(package, edit):
    weights = load_file(package / layout.WEIGHTS)
    edit(weights)
    save_file(weights, package / layout.WEIGHTS, metadata={"format": "pt"})


BIAS = "v_head.summary.bias"


@pytest.mark.parametrize(
    ("edit", "error"),
    [
        (lambda w: [w.pop(name) for name in list(w) if name.startswith("v_head.")], errors.MissingHeadError),
        (lambda w: w.pop(BIAS), errors.PackageError),
        (lambda w: w.update({"v_head.extra": torch.zeros(1)}), errors.PackageError),
        (lambda w: w[BIAS].fill_(float("nan")), errors.UnsavableModelError),
        (lambda w: w["transformer.wpe.weight"][3].fill_(float("inf")), errors.UnsavableModelError),
        (lambda w: w["transformer.wte.weight"].mul_(1e36), errors.LoadError),
    ],
    ids=["no head", "half a head", "an extra tensor", "NaN", "infinite", "overflow"],
)
def test_weights_that_are_not_whole_and_finite_are_refused(edit, error, package):
    rewrite(package, edit)
    record_again(package)
    with pytest.raises(error):
        load_package(package)


def test_weights_that_are_not_the_saved_ones_are_refused_where_there_is_a_record(package):
    rewrite(package, lambda weights: weights[BIAS].add_(0.5))
    with pytest.raises(errors.ChangedFileError, match=layout.WEIGHTS):
        load_package(package)
    (package / layout.RECORD).unlink()
    assert load_package(package).model.v_head.summary.bias == 0.5


def test_the_dtype_is_the_package_s_own_unless_another_is_asked_for(tmp_path):
    model = make_tiny_model().to(torch.bfloat16)
    save_package(model, tmp_path / "p")
    loaded = load_package(tmp_path / "p").model
    assert torch.equal(loaded.transformer.wte.weight, model.transformer.wte.weight)
    assert loaded.v_head.summary.weight.dtype == torch.float32
    loaded = load_package(tmp_path / "p", dtype=torch.float64).model
    assert loaded.dtype == loaded.v_head.summary.weight.dtype == torch.float64


def test_shards_and_the_tokenizer_are_loaded(tiny_model, tiny_tokenizer, tmp_path):
    save_package(tiny_model, tmp_path / "p", tiny_tokenizer, max_shard_size=40_000)
    loaded = load_package(tmp_path / "p")
    assert same_weights(loaded.model, tiny_model)
    assert loaded.tokenizer("Hello")["input_ids"] == tiny_tokenizer("Hello")["input_ids"]
    assert loaded.tokenizer.name_or_path == str(tmp_path / "p")


def test_options_for_the_hub_are_refused_for_a_folder(package):
    for options in ({"revision": "main"}, {"token": "hf_x"}, {"local_files_only": True}, {"cache_dir": "x"}):
        for function in (load_package, inspect_package):
            with pytest.raises(errors.OptionsError, match=next(iter(options))) as refused:
                function(package, **options)
            assert "hf_x" not in str(refused.value)
    with pytest.raises(errors.NotAPackageError):
        load_package(package / "nothing" / "here")


# From a Hub


def test_a_revision_becomes_a_commit_and_the_commit_loads_the_same_again(server, package, cache, tiny_model):
    server.create(REPO, contents(package))
    first = server.history(REPO)[0].oid
    loaded = load_package(REPO, cache_dir=cache)
    assert loaded.commit == loaded.package.commit == first
    assert loaded.model.config._commit_hash == first
    assert (loaded.model.name_or_path, loaded.package.source) == (REPO, REPO)
    save_package(make_tiny_model(seed=1), package)
    server.create(REPO, contents(package))  # the branch moves on
    repo = server.repos[REPO]
    repo.commits[first] = dataclasses.replace(repo.history()[0], oid=first, files=repo.history()[0].files)
    moved = load_package(REPO, cache_dir=cache)
    assert moved.commit != first
    assert not same_weights(moved.model, tiny_model)
    assert same_weights(load_package(REPO, revision=first, cache_dir=cache).model, tiny_model)


def test_what_the_hub_does_not_give_is_a_typed_error(server, package, cache):
    server.create("alice/secret", contents(package), private=True)
    server.tokens["hf_bob"] = "bob"
    for function in (load_package, inspect_package):
        with pytest.raises(errors.RemoteNotFoundError, match="alice/secret"):
            function("alice/secret", cache_dir=cache, token="hf_bob")
        with pytest.raises(errors.GPT2ValueHubError, match="alice/secret") as refused:
            function("alice/secret", cache_dir=cache, token="hf_wrong")
        assert "hf_wrong" not in str(refused.value)
        with pytest.raises(errors.HubUnavailableError, match="not in the cache"):
            function("alice/secret", cache_dir=cache, local_files_only=True)


def test_inspecting_a_repository_downloads_no_weights(server, cache, tmp_path):
    package = tmp_path / "p"
    save_package(make_tiny_model(n_embd=64, vocab_size=4000), package, max_shard_size=400_000)
    extra = {"pytorch_model.bin": b"p" * 1000, "notes.txt": b"n", "runs/log.json": b"{}", "LICENSE": b"l"}
    server.create(REPO, {**contents(package), **extra})

    def sent():
        return sum(size for path, size in server.sent.items() if path.endswith(".safetensors"))

    report, local = inspect_package(REPO, cache_dir=cache), inspect_package(package)
    assert (report.source, report.commit) == (REPO, server.history(REPO)[0].oid)
    for name in ("parameters", "dtypes", "weight_files", "head", "code", "versions", "missing", "changed"):
        assert getattr(report, name) == getattr(local, name)
    assert (report.pickles, report.foreign) == (("pytorch_model.bin",), ("notes.txt", "runs"))
    assert (report.folder / MODELING).read_bytes() == (package / MODELING).read_bytes()
    asked = {request.path.rsplit("/", 1)[1] for request in server.requests if request.route == "resolve"}
    assert not asked & {"pytorch_model.bin", "notes.txt", "log.json"}
    assert len(report.weight_files) > 1
    starts = sum(min(size, FIRST_BYTES) for size in report.weight_files.values())  # which have the headers
    assert 0 < sent() <= starts < sum(report.weight_files.values()) / 2
    whole = inspect_package(REPO, cache_dir=cache, hash_weights=True)
    assert sent() > sum(report.weight_files.values())
    assert {path.name for path in whole.folder.iterdir()} == {*contents(package)}  # no pickle, and nothing foreign


def test_a_repository_whose_weights_lie_is_refused_by_their_header(server, package, cache):
    for data in (b"", b"short", b"\xff" * 100, (package / layout.WEIGHTS).read_bytes()[:-1]):
        server.create(REPO, {**contents(package), layout.WEIGHTS: data})
        with pytest.raises(errors.PackageError, match=layout.WEIGHTS):
            inspect_package(REPO, cache_dir=cache)
