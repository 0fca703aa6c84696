"""`export_policy`: a plain GPT-2 that knows nothing of us, with the policy's logits bit for bit."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from conftest import make_tiny_model, plain_twin
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel

from hub_tools import convert_checkpoint, errors, export_policy, save_package
from modeling_gpt2_value import GPT2HeadWithValueModel, GPT2ValueModel

PROMPT = torch.tensor([[5, 7, 11, 13, 17], [3, 1, 4, 1, 5]])

# What somebody does who has transformers and has never heard of this package.
STRANGER = """
import sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

folder, out = sys.argv[1:]
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
assert type(model) is GPT2LMHeadModel, type(model)
prompt = torch.tensor([[5, 7, 11, 13, 17], [3, 1, 4, 1, 5]])
with torch.no_grad():
    save_file({"logits": model.eval()(prompt).logits}, out)
ours = [name for name in sys.modules if name.endswith("gpt2_value") or name.startswith("hub_tools")]
assert not ours, ours
"""


def stranger_logits(folder, tmp_path):
    """The logits in a fresh, isolated interpreter, in another folder, without `trust_remote_code`."""
    out = tmp_path / "logits.safetensors"
    command = [sys.executable, "-I", "-c", STRANGER, str(folder), str(out)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    return load_file(out)["logits"]


@torch.no_grad()
def logits_of(model):
    return model(PROMPT, return_dict=True).logits


@pytest.mark.shows(
    "Engines that read a plain GPT-2", "`export_policy`: `GPT2LMHeadModel` with the same logits, bit for bit"
)
@pytest.mark.parametrize(
    ("fields", "dtype"),
    [({}, torch.float32), ({"tie_word_embeddings": False}, torch.bfloat16)],
    ids=["tied float32", "untied bfloat16"],
)
def test_a_stranger_loads_the_export_and_gets_the_same_logits_bit_for_bit(fields, dtype, tmp_path):
    save_package(make_tiny_model(**fields).to(dtype), tmp_path / "package")
    model = GPT2ValueModel.from_pretrained(tmp_path / "package", dtype="auto").eval()
    exported = export_policy(model, tmp_path / "policy")
    assert exported.dtype == dtype
    logits = stranger_logits(tmp_path / "policy", tmp_path)
    assert logits.dtype == dtype
    assert torch.equal(logits, logits_of(model))


def test_the_export_is_what_a_plain_gpt2_would_have_saved(tiny_model, tmp_path):
    export_policy(tiny_model, tmp_path / "policy")
    plain_twin(tiny_model).save_pretrained(tmp_path / "plain")

    exported, plain = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("policy", "plain"))
    for ours in ("summary_last_dropout", "detach_value_head", "value_head_initializer_range"):
        del plain[ours]  # the twin keeps what it was built from
    assert exported == plain
    assert exported["model_type"] == "gpt2"
    assert exported["architectures"] == ["GPT2LMHeadModel"]
    assert not [name for name in exported if "value" in name or name in ("auto_map", "num_labels", "id2label")]
    assert sorted(path.name for path in (tmp_path / "policy").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("policy", "plain"))
    assert set(ours) == set(theirs)
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


def test_a_packages_folder_exports_like_its_model_and_with_its_tokenizer(tiny_model, tiny_tokenizer, tmp_path):
    save_package(tiny_model, tmp_path / "package", tiny_tokenizer)
    exported = export_policy(tmp_path / "package", tmp_path / "policy")
    assert exported.tokenizer is not None
    assert {"tokenizer.json", "tokenizer_config.json"} <= set(exported.files)
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path / "policy").eval()
    assert torch.equal(logits_of(loaded), logits_of(GPT2ValueModel.from_pretrained(tmp_path / "package").eval()))


def test_a_package_that_lost_its_head_still_gives_its_policy(tiny_model, tmp_path):
    save_package(tiny_model, tmp_path / "package")
    weights = load_file(tmp_path / "package" / "model.safetensors")
    # Copies, since the file is mapped, and replaced here.
    body = {name: weight.clone() for name, weight in weights.items() if not name.startswith("v_head.")}
    save_file(body, tmp_path / "package" / "model.safetensors", metadata={"format": "pt"})
    export_policy(tmp_path / "package", tmp_path / "policy")
    exported = load_file(tmp_path / "policy" / "model.safetensors")
    assert set(exported) == set(body)
    assert all(torch.equal(weight, body[name]) for name, weight in exported.items())


def test_a_package_with_damaged_weights_is_refused(tiny_model, tmp_path):
    save_package(tiny_model, tmp_path / "package")
    weights = tmp_path / "package" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(errors.PackageError):
        export_policy(tmp_path / "package", tmp_path / "policy")
    assert not (tmp_path / "policy").exists()


def test_the_generation_config_travels(tiny_model, tmp_path):
    tiny_model.generation_config.max_new_tokens = 9
    export_policy(tiny_model, tmp_path / "policy")
    assert GPT2LMHeadModel.from_pretrained(tmp_path / "policy").generation_config.max_new_tokens == 9


def test_the_seeds_class_exports_too(tmp_path):
    model = GPT2HeadWithValueModel(make_tiny_model().config).eval()
    export_policy(model, tmp_path / "policy")
    assert torch.equal(logits_of(GPT2LMHeadModel.from_pretrained(tmp_path / "policy").eval()), logits_of(model))


def test_the_model_is_left_as_it_is(tiny_model, tmp_path):
    tiny_model.train()
    config, weights = tiny_model.config.to_dict(), copy.deepcopy(tiny_model.state_dict())
    generation_config = tiny_model.generation_config.to_dict()
    export_policy(tiny_model, tmp_path / "policy")
    assert tiny_model.training
    assert tiny_model.config.to_dict() == config
    assert tiny_model.generation_config.to_dict() == generation_config
    assert all(torch.equal(weight, weights[name]) for name, weight in tiny_model.state_dict().items())
    assert all(weight.requires_grad for weight in tiny_model.parameters())


def test_an_export_becomes_a_package_again(tiny_model, tmp_path):
    export_policy(tiny_model, tmp_path / "policy")
    convert_checkpoint(tmp_path / "policy", tmp_path / "package", init_value_head=True)
    assert torch.equal(logits_of(GPT2ValueModel.from_pretrained(tmp_path / "package").eval()), logits_of(tiny_model))


# What must not be lost


def test_a_folder_that_holds_something_is_refused_unless_it_is_an_older_export(tiny_model, tmp_path):
    export_policy(tiny_model, tmp_path / "policy")
    with pytest.raises(errors.FolderRefusedError, match="overwrite=True"):
        export_policy(tiny_model, tmp_path / "policy")
    other = make_tiny_model(seed=1)
    export_policy(other, tmp_path / "policy", overwrite=True)
    assert torch.equal(logits_of(GPT2LMHeadModel.from_pretrained(tmp_path / "policy").eval()), logits_of(other))


def test_a_package_is_never_overwritten_by_its_own_policy(tiny_model, tmp_path):
    save_package(tiny_model, tmp_path / "package")
    with pytest.raises(errors.FolderRefusedError, match="would be lost"):
        export_policy(tmp_path / "package", tmp_path / "package", overwrite=True)
    assert torch.equal(logits_of(GPT2ValueModel.from_pretrained(tmp_path / "package").eval()), logits_of(tiny_model))


@pytest.mark.parametrize("name", ["notes.txt", "pytorch_model.bin", "training.py"])
def test_a_foreign_file_is_never_overwritten(name, tiny_model, tmp_path):
    export_policy(tiny_model, tmp_path / "policy")
    (tmp_path / "policy" / name).write_text("mine")
    with pytest.raises(errors.FolderRefusedError, match=name):
        export_policy(tiny_model, tmp_path / "policy", overwrite=True)
    assert (tmp_path / "policy" / name).read_text() == "mine"


def test_a_file_in_the_folders_place_is_refused(tiny_model, tmp_path):
    (tmp_path / "policy").write_text("mine")
    with pytest.raises(errors.FolderRefusedError, match="is a file"):
        export_policy(tiny_model, tmp_path / "policy")


def test_a_git_checkout_and_the_current_directory_are_never_replaced(tiny_model, tmp_path, monkeypatch):
    export_policy(tiny_model, tmp_path / "policy")
    monkeypatch.chdir(tmp_path / "policy")
    with pytest.raises(errors.FolderRefusedError, match="current directory"):
        export_policy(tiny_model, tmp_path / "policy", overwrite=True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "policy" / ".git").mkdir()
    with pytest.raises(errors.FolderRefusedError, match="git checkout"):
        export_policy(tiny_model, tmp_path / "policy", overwrite=True)
    assert (tmp_path / "policy" / ".git").is_dir()


def test_a_write_that_the_system_refuses_is_a_save_that_failed(tiny_model, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(GPT2LMHeadModel, "save_pretrained", full)
    with pytest.raises(errors.SaveFailedError, match="No space left"):
        export_policy(tiny_model, tmp_path / "policy")
    assert list(tmp_path.iterdir()) == [], "nothing is left beside it"


def test_what_is_not_a_value_head_model_is_refused(tiny_model, tmp_path):
    for other in (plain_twin(tiny_model), torch.nn.DataParallel(tiny_model)):
        with pytest.raises(errors.UnsavableModelError, match=type(other).__name__):
            export_policy(other, tmp_path / "policy")
    with pytest.raises(errors.NotAPackageError):
        export_policy(tmp_path / "nowhere", tmp_path / "policy")
