"""`export_policy` and `export_critic`: plain models of transformers, which know nothing of us, with equal numbers."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import make_tiny_model, plain_twin
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
)

from hub_tools import convert_checkpoint, errors, export_critic, export_policy, save_package
from modeling_gpt2_value import GPT2ValueModel

PROMPT = torch.tensor([[5, 7, 11, 13, 17], [3, 1, 4, 1, 5]])

# What somebody does who has transformers and has never heard of this package.
STRANGER = """
import sys
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
print(type(model).__name__, [n for n in sys.modules if n.endswith("gpt2_value") or n.startswith("hub_tools")])
"""


@torch.no_grad()
def logits_of(model):
    return model(PROMPT, return_dict=True).logits


def policy_in(folder):
    return GPT2LMHeadModel.from_pretrained(folder, dtype="auto").eval()


@pytest.mark.parametrize(
    ("fields", "dtype"),
    [({}, torch.float32), ({"tie_word_embeddings": False}, torch.bfloat16)],
    ids=["tied float32", "untied bfloat16"],
)
def test_a_stranger_loads_the_export_and_gets_the_same_logits_bit_for_bit(fields, dtype, tmp_path):
    model = make_tiny_model(**fields).to(dtype)
    assert export_policy(model, tmp_path / "policy").dtype == dtype
    command = [sys.executable, "-I", "-c", STRANGER, str(tmp_path / "policy")]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True).stdout
    assert found == "GPT2LMHeadModel []\n"
    assert torch.equal(logits_of(policy_in(tmp_path / "policy")), logits_of(model))


def test_the_export_is_what_a_plain_gpt2_would_have_saved(tiny_model, tmp_path):
    tiny_model.generation_config.max_new_tokens = 9
    export_policy(tiny_model, tmp_path / "policy")
    plain_twin(tiny_model).save_pretrained(tmp_path / "plain")
    exported, plain = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("policy", "plain"))
    for ours in ("summary_last_dropout", "detach_value_head", "value_head_initializer_range"):
        del plain[ours]  # the twin keeps what it was built from
    assert exported == plain
    names = sorted(path.name for path in (tmp_path / "policy").iterdir())
    assert names == ["config.json", "generation_config.json", "model.safetensors"]
    assert policy_in(tmp_path / "policy").generation_config.max_new_tokens == 9


def test_a_package_exports_like_its_model_and_with_its_tokenizer_also_without_its_head(
    tiny_model, tiny_tokenizer, tmp_path
):
    save_package(tiny_model, tmp_path / "package", tiny_tokenizer)
    exported = export_policy(tmp_path / "package", tmp_path / "policy")
    assert {"tokenizer.json", "tokenizer_config.json"} <= set(exported.files)
    assert torch.equal(logits_of(policy_in(tmp_path / "policy")), logits_of(tiny_model))
    weights = tmp_path / "package" / "model.safetensors"
    # Copies, since the file is mapped, and replaced here.
    body = {name: weight.clone() for name, weight in load_file(weights).items() if not name.startswith("v_head.")}
    save_file(body, weights, metadata={"format": "pt"})
    export_policy(tmp_path / "package", tmp_path / "headless")
    assert torch.equal(logits_of(policy_in(tmp_path / "headless")), logits_of(tiny_model))
    with pytest.raises(errors.MissingHeadError):
        export_critic(tmp_path / "package", tmp_path / "critic")


# The critic

TOKENS = torch.tensor([[0, 0, 5, 7, 11, 13, 17], [3, 1, 4, 1, 5, 9, 2]])
MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
POSITIONS = (MASK.cumsum(-1) - 1).clamp(min=0)


def model_with_bias(**fields):
    model = make_tiny_model(**fields)
    with torch.no_grad():
        model.v_head.summary.bias.fill_(-1.7)
    return model


@torch.no_grad()
def values_of(model):
    return model.eval()(TOKENS, attention_mask=MASK).value


@torch.no_grad()
def read_as_verl_does(folder):
    """`DataParallelPPOCritic`: one logit a token; flash attention's sharding asks for the number of key-value heads."""
    critic = AutoModelForTokenClassification.from_pretrained(folder).eval()
    assert type(critic) is GPT2ForTokenClassification
    assert critic.config.num_key_value_heads == critic.config.num_attention_heads
    return critic(TOKENS, attention_mask=MASK, position_ids=POSITIONS).logits.squeeze(-1)


@torch.no_grad()
def read_as_trl_and_openrlhf_do(folder):
    """TRL's `get_reward`: the body is the attribute `base_model_prefix`, `score` is applied to its last states."""
    critic = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).eval()
    assert type(critic) is GPT2ForSequenceClassification
    body = getattr(critic, critic.base_model_prefix)
    output = body(
        input_ids=TOKENS, attention_mask=MASK, position_ids=POSITIONS, output_hidden_states=True, use_cache=False
    )
    return critic.score(output.hidden_states[-1]).squeeze(-1)


READERS = {"token-classification": read_as_verl_does, "sequence-classification": read_as_trl_and_openrlhf_do}


@pytest.mark.parametrize("head", READERS)
def test_other_trainers_read_the_model_s_own_values_and_it_becomes_a_package_again(head, tmp_path, tiny_tokenizer):
    model = model_with_bias()
    expected = values_of(model)
    save_package(model, tmp_path / "package", tiny_tokenizer)
    for source, name in ((model, "of-model"), (tmp_path / "package", "of-package")):
        exported = export_critic(source, tmp_path / name, head=head)
        assert exported.architecture.startswith("GPT2For")
        assert ("tokenizer.json" in exported.files) == (name == "of-package")
        found = READERS[head](tmp_path / name)
        torch.testing.assert_close(found[MASK == 1], expected[MASK == 1], atol=1e-6, rtol=1e-6)
    assert torch.equal(values_of(model), expected), "the model is left as it is"
    convert_checkpoint(tmp_path / "of-package", tmp_path / "back")
    back = GPT2ValueModel.from_pretrained(tmp_path / "back")
    torch.testing.assert_close(values_of(back), expected, atol=2e-6, rtol=1e-6)


def test_what_a_classifier_cannot_express_is_refused(tmp_path):
    for fields in ({"summary_activation": "tanh"}, {"summary_use_proj": False}, {"summary_proj_to_labels": False}):
        with pytest.raises(errors.ConversionError, match="one linear layer"):
            export_critic(make_tiny_model(**fields), tmp_path / "critic")
    model = model_with_bias(value_head_initializer_range=0.0)
    with pytest.raises(errors.ConversionError, match="score has no bias"):
        export_critic(model, tmp_path / "critic", head="sequence-classification")
    export_critic(model, tmp_path / "constant")
    assert (read_as_verl_does(tmp_path / "constant") == -1.7).all()
    with pytest.raises(errors.OptionsError, match="token-classification or sequence-classification"):
        export_critic(model, tmp_path / "critic", head="causal-lm")


# What must not be lost


def test_a_folder_that_holds_something_is_refused_unless_it_is_an_older_export(tiny_model, tmp_path):
    policy = tmp_path / "policy"
    export_policy(tiny_model, policy)
    with pytest.raises(errors.FolderRefusedError, match="overwrite=True"):
        export_policy(tiny_model, policy)
    export_policy(tiny_model, policy, overwrite=True)
    (policy / "training.py").write_text("mine")
    with pytest.raises(errors.FolderRefusedError, match=r"training\.py"):
        export_policy(tiny_model, policy, overwrite=True)
    save_package(tiny_model, tmp_path / "package")
    with pytest.raises(errors.FolderRefusedError, match="would be lost"):
        export_policy(tmp_path / "package", tmp_path / "package", overwrite=True)


def test_what_is_not_a_value_head_model_is_refused(tiny_model, tmp_path):
    for other in (plain_twin(tiny_model), torch.nn.DataParallel(tiny_model)):
        with pytest.raises(errors.UnsavableModelError, match=type(other).__name__):
            export_policy(other, tmp_path / "policy")
    with pytest.raises(errors.OptionsError, match="revision"):
        export_policy(tiny_model, tmp_path / "policy", revision="main")
    with pytest.raises(errors.HubUnavailableError, match="nobody/nothing"):
        export_critic("nobody/nothing", tmp_path / "critic")
