"""`handler.py`, by which an Inference Endpoint answers: where it was asked for, reviewed, run by nobody else."""

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_model

from hub_tools import inspect_package, layout, load_package, push_to_hub, save_package, verify_package
from hub_tools.errors import ChangedFileError, FolderRefusedError, TokenizerMismatchError, UntrustedCodeError
from hub_tools.package import record as releases

OWN = "class EndpointHandler:\n    pass\n"


@pytest.fixture
def served(tiny_model, tiny_tokenizer, tmp_path):
    save_package(tiny_model, tmp_path / "served", tiny_tokenizer, handler=True)
    return tmp_path / "served"


def endpoint(folder):
    """As the endpoint imports it."""
    spec = importlib.util.spec_from_file_location("handler", folder / "handler.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.EndpointHandler(str(folder))


def test_no_package_has_a_handler_that_nobody_asked_for(tiny_model, tiny_tokenizer, tmp_path):
    save_package(tiny_model, tmp_path / "p", tiny_tokenizer)
    assert not (tmp_path / "p" / layout.HANDLER).exists()
    assert layout.HANDLER not in (tmp_path / "p" / layout.CARD).read_text()


def test_a_handler_is_part_of_the_package_hashed_and_known(served):
    report = verify_package(served).package
    (found,) = (file for file in report.code if file.name == layout.HANDLER)
    assert found.installed
    assert layout.__version__ in found.releases
    assert report.changed == report.missing == report.foreign == ()
    assert layout.HANDLER in json.loads((served / layout.RECORD).read_text())["sha256"]
    assert layout.HANDLER in (served / layout.CARD).read_text()
    assert load_package(served).code_version == layout.__version__


def test_a_handler_imports_only_torch_and_transformers(served):
    tree = ast.parse((served / layout.HANDLER).read_text())
    nodes = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {getattr(node, "module", None) or node.names[0].name for node in nodes}
    assert names == {"__future__", "typing", "torch", "transformers"}


@pytest.mark.shows("Inference Endpoints", "`handler.py` answers with the numbers of `rollout`, without this project")
def test_an_endpoint_without_this_project_answers_with_the_numbers_of_rollout(served, tiny_tokenizer, tmp_path):
    request = {"inputs": ["abc", "d"], "parameters": {"max_new_tokens": 6, "top_k": 20, "seed": 7}}
    script = (
        "import json, os, sys\n"
        "sys.path.insert(0, sys.argv[1])\n"  # and nothing else of ours
        "from handler import EndpointHandler\n"
        "print(json.dumps(EndpointHandler(sys.argv[1])(json.loads(sys.argv[2]))))"
    )
    command = [sys.executable, "-I", "-c", script, str(served), json.dumps(request)]
    done = subprocess.run(command, cwd=tmp_path, env={"HOME": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    prompts = [tiny_tokenizer(text, return_tensors="pt").input_ids[0] for text in request["inputs"]]
    drawn = make_tiny_model().rollout(
        prompts, max_new_tokens=6, top_k=20, eos_token_id=0, generator=torch.Generator().manual_seed(7)
    )
    assert [len(record["token_ids"]) for record in answer] == drawn.response_mask.sum(1).tolist()
    for row, record in enumerate(answer):
        mask = drawn.response_mask[row]
        assert record["token_ids"] == drawn.responses[row][mask].tolist()
        assert record["truncated"] == bool(drawn.truncated[row])
        torch.testing.assert_close(torch.tensor(record["logprobs"]), drawn.logprobs[row][mask], atol=1e-5, rtol=0)
        torch.testing.assert_close(torch.tensor(record["values"]), drawn.values[row][mask], atol=1e-5, rtol=0)
        assert record["generated_text"] == tiny_tokenizer.decode(record["token_ids"], skip_special_tokens=True)


def test_a_request_that_cannot_be_answered_is_refused_by_what_is_wrong(served):
    handler = endpoint(served)
    assert len(handler({"inputs": "a", "parameters": {"num_return_sequences": 3, "max_new_tokens": 2}})) == 3
    for request, said in (
        ({}, "inputs is not"),
        ({"inputs": ""}, "inputs is not"),
        ({"inputs": ["a", 5]}, "inputs is not"),
        ({"inputs": "a", "parameters": {"repetition_penalty": 1.5}}, "'repetition_penalty'"),
        ({"inputs": "a", "parameters": {"num_return_sequences": 65}}, "at most 64"),
        ({"inputs": ["a"] * 65}, "at most 64"),
        ({"inputs": "a", "parameters": {"seed": "x"}}, "seed='x'"),
        ({"inputs": "a", "parameters": {"max_new_tokens": 1000}}, "positions end at 64"),
        ({"inputs": "a", "parameters": {"temperature": 0}}, "temperature=0"),
    ):
        with pytest.raises(ValueError, match=said):
            handler(request)


def test_a_handler_that_was_changed_is_refused(served):
    (served / layout.HANDLER).write_text(OWN)
    assert layout.HANDLER in inspect_package(served).changed
    with pytest.raises(UntrustedCodeError, match=r"handler\.py"):
        verify_package(served)
    with pytest.raises(ChangedFileError, match=r"handler\.py"):
        verify_package(served, trust_remote_code=True)
    with pytest.raises(ChangedFileError, match=r"handler\.py"):
        load_package(served)


def test_somebody_s_own_handler_is_reported_and_not_run(package):
    (package / layout.HANDLER).write_text("raise SystemExit('it ran')\n")
    (found,) = (file for file in inspect_package(package).code if file.name == layout.HANDLER)
    assert not found.installed
    assert found.releases == ()
    with pytest.raises(UntrustedCodeError, match=r"handler\.py"):
        verify_package(package)
    assert load_package(package).model.config.model_type == layout.MODEL_TYPE
    edited = package / "modeling_gpt2_value.py"
    edited.write_text(edited.read_text() + "# mine\n")
    with pytest.raises(UntrustedCodeError, match=r"handler\.py"):  # other code: then everything must be reviewed
        load_package(package, reviewed_sha256={edited.name: layout.sha256_of(edited)})
    reviewed = {name: layout.sha256_of(package / name) for name in (edited.name, layout.HANDLER)}
    assert load_package(package, reviewed_sha256=reviewed).model.config.model_type == layout.MODEL_TYPE


def test_somebody_s_own_handler_is_not_overwritten_and_ours_is(served, tiny_model, tiny_tokenizer):
    save_package(tiny_model, served, tiny_tokenizer)
    assert not (served / layout.HANDLER).exists()  # a package is replaced whole
    (served / layout.HANDLER).write_text(OWN)
    for handler in (False, True):
        with pytest.raises(FolderRefusedError, match=r"handler\.py"):
            save_package(tiny_model, served, tiny_tokenizer, handler=handler)
    assert (served / layout.HANDLER).read_text() == OWN


def test_a_release_that_had_a_handler_is_known_with_it_and_without(served, package, monkeypatch, tmp_path):
    older = {layout.HANDLER: layout.sha256_of(served / layout.HANDLER)}
    for folder in (served, package):
        edited = folder / "modeling_gpt2_value.py"
        edited.write_text(edited.read_text() + "# an older release\n")
        (folder / layout.RECORD).unlink()
        older |= {name: layout.sha256_of(folder / name) for name in layout.REMOTE_CODE}
    (tmp_path / "releases.json").write_text(json.dumps({"0.0.9": older}))
    monkeypatch.setattr(releases, "RELEASES", tmp_path / "releases.json")
    assert load_package(served).code_version == load_package(package).code_version == "0.0.9"


def test_a_handler_needs_a_tokenizer(tiny_model, tmp_path):
    with pytest.raises(TokenizerMismatchError, match="a handler, and no tokenizer"):
        save_package(tiny_model, tmp_path / "p", handler=True)
    assert not Path(tmp_path / "p").exists()


def test_a_push_brings_a_handler_and_removes_nobodys(server, tiny_model, tiny_tokenizer):
    report = push_to_hub(tiny_model, "alice/value", tiny_tokenizer, handler=True)
    assert layout.HANDLER in report.added
    report = push_to_hub(tiny_model, "alice/value", tiny_tokenizer)
    assert layout.HANDLER not in report.deleted
    assert load_package("alice/value").code_version == layout.__version__
