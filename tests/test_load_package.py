"""`load_package` loads what is known or was reviewed, by hash, and refuses the rest without running any of it."""

import dataclasses
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import make_tiny_model
from safetensors.torch import load_file, save_file
from support.hub_server import Fault
from test_inspection import edit_json
from test_verify import record_again, touching
from transformers import AutoModel

from generation_gpt2_value import rescore, rollout
from hub_tools import errors, inspect_package, layout, load_package, save_package, verify_package
from hub_tools.package import record as releases
from modeling_gpt2_value import GPT2ValueModel

REPO = "alice/value"
MODELING = "modeling_gpt2_value.py"
RELEASED = Path(__file__).parent / "released"


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def change_code(package, text, *, name=MODELING, recorded=True):
    with open(package / name, "a") as file:
        file.write(text)
    if recorded:
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


def test_code_that_was_reviewed_is_run_as_the_bytes_that_were_hashed(package, tiny_model, tmp_path):
    reviewed = change_code(package, f"__import__('pathlib').Path({str(tmp_path / 'ran')!r}).touch()\nREVIEWED = True\n")
    loaded = load_package(package, reviewed_sha256=reviewed)
    assert (tmp_path / "ran").exists()
    assert loaded.code_version is None
    assert type(loaded.model) is not GPT2ValueModel
    assert same_weights(loaded.model, tiny_model)
    module = sys.modules[type(loaded.model).__module__]
    assert module.REVIEWED
    assert sha256(Path(module.__file__)) == reviewed[MODELING]


def test_a_review_holds_for_those_bytes_alone(package, tmp_path):
    reviewed = change_code(package, "# reviewed\n")
    change_code(package, touching(tmp_path / "ran"))
    with pytest.raises(errors.UntrustedCodeError, match="was not reviewed"):
        load_package(package, reviewed_sha256=reviewed)
    assert not (tmp_path / "ran").exists()


def test_a_review_of_some_files_does_not_cover_the_others(package, tmp_path):
    reviewed = change_code(package, "# reviewed\n")
    change_code(package, touching(tmp_path / "ran"), name="sampling_gpt2_value.py")
    with pytest.raises(errors.UntrustedCodeError, match=r"sampling_gpt2_value\.py") as refused:
        load_package(package, reviewed_sha256=reviewed)
    assert MODELING not in refused.value.next_step
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("reviewed", "error"),
    [
        ({MODELING: "0" * 64}, errors.UntrustedCodeError),
        ({"not_there.py": "0" * 64}, errors.UntrustedCodeError),
        ({MODELING: "yes"}, errors.UntrustedCodeError),
        ({MODELING: True}, errors.UntrustedCodeError),
        (True, errors.OptionsError),
        ("*", errors.OptionsError),
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
    known = {file.name: (file.installed, file.releases) for file in loaded.package.code}
    assert known[MODELING] == (False, ("0.0.9",))
    assert known["sampling_gpt2_value.py"] == (True, (layout.__version__, "0.0.9"))


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")  # its own code asks for it
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


def test_a_release_is_recorded_once(tmp_path, monkeypatch):
    record = tmp_path / "releases.json"
    record.write_text("{}")
    monkeypatch.setattr(releases, "RELEASES", record)
    for _ in range(2):
        releases.record_release()
    assert json.loads(record.read_text()) == {layout.__version__: layout.installed_hashes()}
    record.write_text(json.dumps({layout.__version__: {MODELING: "0" * 64}}))
    with pytest.raises(errors.ChangedFileError, match=layout.__version__):
        releases.record_release()


def test_the_installed_code_is_what_was_released_under_its_version():
    """Fails when code changes after a release without a new version."""
    recorded = json.loads(releases.RELEASES.read_text())
    assert recorded.get(layout.__version__, layout.installed_hashes()) == layout.installed_hashes()
    assert set(recorded) <= set(
        re.findall(r"(?m)^## ([\w.]+)", (Path(__file__).parent.parent / "CHANGELOG.md").read_text())
    )


def test_code_that_is_missing_is_named(package):
    (package / "decoding_gpt2_value.py").unlink()
    record = json.loads((package / layout.RECORD).read_text())
    del record["sha256"]["decoding_gpt2_value.py"]
    (package / layout.RECORD).write_text(json.dumps(record))
    with pytest.raises(errors.UntrustedCodeError, match=r"decoding_gpt2_value\.py \(not there\)"):
        load_package(package)


def test_what_lies_beside_a_package_cannot_change_what_is_loaded(package, tiny_model, tmp_path):
    """transformers would follow an adapter to its base model, and run another generation loop."""
    reviewed = change_code(package, "# reviewed\n")
    (package / "adapter_config.json").write_text('{"base_model_name_or_path": "other/model", "peft_type": "LORA"}')
    (package / "custom_generate").mkdir()
    (package / "custom_generate" / "generate.py").write_text(touching(tmp_path / "ran"))
    (package / "pytorch_model.bin").write_bytes(b"a pickle")
    assert same_weights(load_package(package, reviewed_sha256=reviewed).model, tiny_model)
    assert not (tmp_path / "ran").exists()


# Strict about the weights


def rewrite(package, edit, *, recorded=True):
    weights = load_file(package / layout.WEIGHTS)
    edit(weights)
    save_file(weights, package / layout.WEIGHTS, metadata={"format": "pt"})
    if recorded:
        record_again(package)


def no_head(weights):
    del weights["v_head.summary.weight"], weights["v_head.summary.bias"]


def half_a_head(weights):
    del weights["v_head.summary.bias"]


def an_extra_key(weights):
    weights["v_head.extra"] = torch.zeros(1)


def a_missing_key(weights):
    del weights["transformer.h.1.ln_2.bias"]


def nan(weights):
    weights["transformer.wpe.weight"][3, 3] = float("nan")


def infinite(weights):
    weights["v_head.summary.bias"][0] = float("inf")


@pytest.mark.parametrize(
    ("edit", "error"),
    [
        (no_head, errors.MissingHeadError),
        (half_a_head, errors.PackageError),
        (an_extra_key, errors.PackageError),
        (a_missing_key, errors.PackageError),
        (nan, errors.UnsavableModelError),
        (infinite, errors.UnsavableModelError),
    ],
)
def test_weights_that_are_not_whole_and_finite_are_refused(edit, error, package):
    rewrite(package, edit)
    with pytest.raises(error):
        load_package(package)


def test_weights_that_are_not_the_saved_ones_are_refused_where_there_is_a_record(package):
    def a_little_more(weights):
        weights["v_head.summary.bias"] += 0.5

    rewrite(package, a_little_more, recorded=False)
    with pytest.raises(errors.ChangedFileError, match=layout.WEIGHTS):
        load_package(package)
    (package / layout.RECORD).unlink()
    assert load_package(package).model.v_head.summary.bias.item() == 0.5


@pytest.mark.parametrize(
    "fields",
    [
        {"attn_implementation": "somebody/kernel"},
        {"_attn_implementation": "somebody/kernel"},
        {"transformers_weights": "../elsewhere.safetensors"},
        {"quantization_config": {"quant_method": "bitsandbytes"}},
        {"num_labels": 10**9},
        {"n_positions": 1 << 20},
        {"pruned_heads": {"0": [0]}},
    ],
)
def test_a_config_that_would_fetch_run_or_fill_more_is_refused(fields, package):
    edit_json(package / layout.CONFIG, **fields)
    record_again(package)
    with pytest.raises(errors.PackageError, match=next(iter(fields))):
        load_package(package)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_is_the_package_s_own_unless_another_is_asked_for(stored, tmp_path):
    model = make_tiny_model().to(stored)
    save_package(model, tmp_path / "p")
    loaded = load_package(tmp_path / "p").model
    assert loaded.transformer.wte.weight.dtype == stored
    assert torch.equal(loaded.transformer.wte.weight, model.transformer.wte.weight)
    assert loaded.v_head.summary.weight.dtype == torch.float32
    assert load_package(tmp_path / "p", dtype=torch.float32).model.transformer.wte.weight.dtype == torch.float32


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


def test_no_pickle_and_nothing_foreign_is_downloaded(server, package, cache):
    extra = {
        "pytorch_model.bin": b"p",
        "optimizer.pt": b"p",
        "sub/modeling.py": b"x",
        "notes.txt": b"n",
        "sub/a.json": b"",
    }
    server.create(REPO, {**contents(package), **extra})
    loaded = load_package(REPO, cache_dir=cache)
    asked = {request.path.rsplit("/", 1)[1] for request in server.requests if request.route == "resolve"}
    assert asked == set(contents(package))
    assert {path.name for path in loaded.package.folder.iterdir()} == set(contents(package))


def test_changed_code_on_a_hub_is_refused_with_the_command_that_shows_it(server, package, cache, tmp_path):
    reviewed = change_code(package, touching(tmp_path / "ran"))
    server.create(REPO, contents(package))
    with pytest.raises(errors.UntrustedCodeError, match=server.history(REPO)[0].oid) as refused:
        load_package(REPO, cache_dir=cache)
    command = refused.value.next_step.removeprefix("read it: ").split(" , and")[0]
    assert command == f"gpt2-value inspect {REPO} --diff --revision {server.history(REPO)[0].oid}"
    assert not (tmp_path / "ran").exists()
    assert load_package(REPO, cache_dir=cache, reviewed_sha256=reviewed).code_version is None
    assert (tmp_path / "ran").exists()


def test_the_cache_is_enough(server, package, cache, tiny_model, monkeypatch):
    server.create(REPO, contents(package))
    online = load_package(REPO, cache_dir=cache)
    server.requests.clear()
    offline = [load_package(REPO, cache_dir=cache, local_files_only=True)]
    offline.append(load_package(REPO, revision=online.commit, cache_dir=cache, local_files_only=True))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    offline.append(load_package(REPO, cache_dir=cache))
    assert inspect_package(REPO, cache_dir=cache).commit == online.commit
    assert server.requests == []
    assert [loaded.commit for loaded in offline] == [online.commit] * 3
    assert all(same_weights(loaded.model, tiny_model) for loaded in offline)
    with pytest.raises(errors.HubUnavailableError, match="not in the cache"):
        load_package(REPO, revision="v2", cache_dir=cache)
    with pytest.raises(errors.HubUnavailableError, match="not in the cache"):
        load_package("alice/other", cache_dir=cache)


def test_what_the_hub_does_not_give_is_a_typed_error(server, package, cache):
    server.create("alice/secret", contents(package), private=True)
    server.create(REPO, contents(package))
    server.tokens["hf_bob"] = dataclasses.replace(server.tokens[server.token], name="bob")
    for function in (load_package, inspect_package):
        for source, options in (
            ("alice/nothing", {}),
            (REPO, {"revision": "nothing"}),
            ("alice/secret", {"token": "hf_bob"}),
        ):
            with pytest.raises(errors.RemoteNotFoundError, match=source):
                function(source, cache_dir=cache, **options)
        with pytest.raises(errors.GPT2ValueHubError, match="alice/secret") as refused:
            function("alice/secret", cache_dir=cache, token="hf_wrong")
        assert "hf_wrong" not in str(refused.value)
        with pytest.raises(errors.NotAPackageError, match="owner/name"):
            function("alice/bad--name", cache_dir=cache)


def test_a_hub_that_is_unwell_for_a_moment_is_asked_again(server, package, cache, monkeypatch):
    monkeypatch.setattr("hub_tools.hub.ask.FIRST_PAUSE", 0.01)
    server.create(REPO, contents(package))
    server.faults = [Fault(route="model_info", nth=1, status=503), Fault(route="resolve", nth=3, status=503)]
    assert load_package(REPO, cache_dir=cache).commit == server.history(REPO)[0].oid


# Looking at a repository


def test_inspecting_a_repository_downloads_no_weights(server, package, cache):
    extra = {"pytorch_model.bin": b"p" * 1000, "notes.txt": b"n", "runs/log.json": b"{}", "LICENSE": b"l"}
    server.create(REPO, {**contents(package), **extra})
    report, local = inspect_package(REPO, cache_dir=cache), inspect_package(package)
    assert (report.source, report.commit) == (REPO, server.history(REPO)[0].oid)
    for name in ("parameters", "dtypes", "weight_files", "head", "code", "versions", "missing", "changed"):
        assert getattr(report, name) == getattr(local, name)
    assert (report.pickles, report.foreign) == (("pytorch_model.bin",), ("notes.txt", "runs"))
    assert (report.folder / MODELING).read_bytes() == (package / MODELING).read_bytes()
    assert not (report.folder / layout.WEIGHTS).exists()
    asked = {request.path.rsplit("/", 1)[1] for request in server.requests if request.route == "resolve"}
    assert not asked & {"pytorch_model.bin", "notes.txt", "log.json"}


def test_inspecting_a_repository_reads_headers_by_range(server, cache, tmp_path, monkeypatch):
    save_package(make_tiny_model(n_embd=64, vocab_size=4000), tmp_path / "p", max_shard_size=400_000)
    server.create(REPO, contents(tmp_path / "p"))
    sent = 0
    handler = server._http.RequestHandlerClass
    plain_send = handler._send

    def count(self, answer):
        nonlocal sent
        sent += len(answer.body) if self.command == "GET" and ".safetensors" in self.path and answer.status < 300 else 0
        plain_send(self, answer)

    monkeypatch.setattr(handler, "_send", count)
    report = inspect_package(REPO, cache_dir=cache)
    assert len(report.weight_files) > 1
    assert 0 < sent < sum(report.weight_files.values()) / 10
    assert inspect_package(REPO, cache_dir=cache, hash_weights=True).parameters == report.parameters
    assert sent > sum(report.weight_files.values()) / 2


def test_a_repository_whose_weights_lie_is_refused_by_their_header(server, package, cache):
    for data in (b"", b"short", b"\xff" * 100, (package / layout.WEIGHTS).read_bytes()[:-1]):
        server.create(REPO, {**contents(package), layout.WEIGHTS: data})
        with pytest.raises(errors.PackageError, match=layout.WEIGHTS):
            inspect_package(REPO, cache_dir=cache)


@pytest.mark.parametrize("name", ["../out.py", "/abs.py", "sub/../../out.json", "a//b"])
def test_a_repository_with_names_that_lead_out_is_refused(name, server, package, cache, tmp_path):
    server.create(REPO, {**contents(package), name: b"x"})
    with pytest.raises(errors.HubRefusedError, match="lists a file"):
        inspect_package(REPO, cache_dir=cache)


def test_a_fresh_process_with_an_empty_cache_loads_a_pushed_package(server, package, tmp_path):
    server.create(REPO, contents(package))
    sha = server.history(REPO)[0].oid
    program = (
        "import sys, torch\nfrom hub_tools import load_package\n"
        f"loaded = load_package({REPO!r}, revision={sha!r})\n"
        "with torch.no_grad(): print(loaded.model(torch.arange(5)[None]).value[0].tolist())"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": server.url}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**environment, "PYTHONPATH": str(Path(__file__).parent.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    model = AutoModel.from_pretrained(package, trust_remote_code=True)
    with torch.no_grad():
        expected = model(torch.arange(5)[None]).value[0].tolist()
    assert json.loads(done.stdout) == pytest.approx(expected, abs=1e-6)
