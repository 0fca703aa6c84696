"""Tools that know nothing of this package: export, files, loaders of data, streamers, drafts, tokenizers."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import make_tiny_model, plain_twin
from tensordict import TensorDict
from torch.utils.data import BatchSampler, DataLoader, RandomSampler
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, TextIteratorStreamer
from transformers.integrations.executorch import register_dynamic_cache_export_support

from generation_gpt2_value import Rollout, Sampling, rescore
from hub_tools import save_package

ROOT = Path(__file__).parent.parent
IDS = torch.tensor([[5, 17, 3, 9], [41, 9, 7, 2]])
MASK = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])


@pytest.fixture
def drawn(tiny_model):
    return tiny_model.rollout(IDS.repeat(6, 1), max_new_tokens=5, top_k=20, eos_token_id=[1, 2, 3])


# torch.export


@pytest.mark.shows("torch.export", "logits and values, other sizes of batch and text, with and without a cache")
@pytest.mark.parametrize("cached", [False, True], ids=["without a cache", "with the default cache"])
def test_an_exported_model_gives_the_same_logits_and_values_for_other_sizes(tiny_model, cached):
    if cached:  # transformers' own registration: torch.export does not know its DynamicCache, of any model
        register_dynamic_cache_export_support()
    arguments = {"attention_mask": MASK, **({} if cached else {"use_cache": False})}
    sizes = {0: torch.export.Dim("rows", max=64), 1: torch.export.Dim("tokens", max=64)}
    shapes = {"input_ids": sizes, "attention_mask": sizes, **({} if cached else {"use_cache": None})}
    with torch.no_grad():
        program = torch.export.export(
            tiny_model, (), {"input_ids": IDS, **arguments}, dynamic_shapes=shapes, strict=False
        )
    ids = torch.randint(1, 96, (3, 7))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    found = program.module()(input_ids=ids, **{**arguments, "attention_mask": mask})
    expected = tiny_model(ids, attention_mask=mask, use_cache=cached)
    torch.testing.assert_close(found.logits[mask.bool()], expected.logits[mask.bool()], atol=1e-6, rtol=0)
    torch.testing.assert_close(found.value[mask.bool()], expected.value[mask.bool()], atol=1e-6, rtol=0)
    assert (found.past_key_values is not None) == cached


# Files


@pytest.mark.shows("torch.save", "a rollout is read in another process, `weights_only=True`")
def test_a_rollout_is_read_in_another_process_without_unpickling_code(drawn, tmp_path):
    torch.save(drawn, tmp_path / "rollout.pt")
    torch.save(vars(drawn) | {"sampling": dataclasses.asdict(drawn.sampling)}, tmp_path / "dict.pt")
    script = (
        "import sys, torch\n"
        "from generation_gpt2_value import Rollout, Sampling\n"
        "rollout = torch.load(sys.argv[1], weights_only=True)\n"
        "fields = torch.load(sys.argv[2], weights_only=True)\n"
        "again = Rollout(**{**fields, 'sampling': Sampling(**fields['sampling'])})\n"
        "assert rollout.sampling == again.sampling\n"
        "assert torch.equal(rollout.logprobs, again.logprobs)\n"
        "print(float(again.logprobs.sum()))"
    )
    command = [sys.executable, "-c", script, tmp_path / "rollout.pt", tmp_path / "dict.pt"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == float(drawn.logprobs.sum())


@pytest.mark.shows("torch.save", "the rollout of a package, as a dict of tensors")
def test_a_rollout_of_a_loaded_package_is_stored_as_a_dict_that_needs_no_package(package, tmp_path):
    """Its class is the package's own, which another process does not have."""
    model = AutoModelForCausalLM.from_pretrained(package, trust_remote_code=True)
    theirs = model.rollout(IDS, max_new_tokens=4, top_p=0.9)
    assert type(theirs) is not Rollout
    torch.save({**vars(theirs), "sampling": dataclasses.asdict(theirs.sampling)}, tmp_path / "rollout.pt")
    fields = torch.load(tmp_path / "rollout.pt", weights_only=True)
    ours = Rollout(**{**fields, "sampling": Sampling(**fields["sampling"])})
    torch.testing.assert_close(rescore(model, ours).logprobs, theirs.logprobs, atol=1e-5, rtol=0)


# Minibatches


@pytest.mark.shows("DataLoader", "minibatches of a rollout, each row once")
def test_a_data_loader_gives_every_row_once_as_rollouts(tiny_model, drawn):
    sampler = BatchSampler(RandomSampler(drawn), batch_size=5, drop_last=False)
    batches = list(DataLoader(drawn, sampler=sampler, batch_size=None))
    assert [len(batch) for batch in batches] == [5, 5, 2]
    for batch in batches:
        assert type(batch) is Rollout
        torch.testing.assert_close(tiny_model.rescore(batch).logprobs, batch.logprobs, atol=1e-5, rtol=0)
    rows = torch.cat([batch.responses for batch in batches]).tolist()
    assert sorted(rows) == sorted(drawn.responses.tolist())


@pytest.mark.shows("TensorDict", "holds a rollout and gives it back")
def test_a_tensordict_holds_a_rollout_and_gives_it_back(tiny_model, drawn):
    tensors = {name: value for name, value in vars(drawn).items() if isinstance(value, torch.Tensor)}
    batch = TensorDict(tensors, batch_size=[len(drawn)])
    part = dataclasses.replace(drawn, **batch[3:7])
    assert part.sampling == drawn.sampling
    assert len(part) == 4
    torch.testing.assert_close(tiny_model.rescore(part).logprobs, drawn.logprobs[3:7], atol=1e-5, rtol=0)


# The untouched generate(); tests/test_model.py has beams, static caches, left padding and pipelines


@pytest.mark.shows("transformers", "streamers")
def test_a_streamer_gets_the_text_of_generate(tiny_model, tiny_tokenizer):
    streamer = TextIteratorStreamer(tiny_tokenizer, skip_prompt=True, timeout=10)
    tokens = tiny_model.generate(IDS[:1], streamer=streamer, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert "".join(streamer) == tiny_tokenizer.decode(tokens[0, 4:])


@pytest.mark.shows("transformers", "assisted generation with a draft model")
def test_a_draft_model_changes_no_greedy_token(tiny_model):
    arguments = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": 95}
    alone = tiny_model.generate(IDS[:1], **arguments)
    for draft in (plain_twin(tiny_model), make_tiny_model(seed=1)):
        assert torch.equal(tiny_model.generate(IDS[:1], assistant_model=draft, **arguments), alone)


# The tokenizer of a package


@pytest.fixture
def with_tokenizer(tiny_model, tiny_tokenizer, tmp_path):
    save_package(tiny_model, tmp_path / "package", tiny_tokenizer)
    return tmp_path / "package"


@pytest.fixture
def questions(monkeypatch):
    """What transformers asked on the terminal; the answer is no."""
    asked = []
    monkeypatch.setattr("builtins.input", lambda question="": asked.append(question) or "n")
    return asked


@pytest.mark.shows("transformers", "the tokenizer of a package loads without its code")
def test_a_tokenizer_is_loaded_without_a_question_and_without_running_code(with_tokenizer, tiny_tokenizer, questions):
    told = AutoTokenizer.from_pretrained(with_tokenizer, trust_remote_code=False)
    direct = PreTrainedTokenizerFast.from_pretrained(with_tokenizer)
    assert told("abc").input_ids == direct("abc").input_ids == tiny_tokenizer("abc").input_ids
    assert questions == []
    assert not any(name.startswith("transformers_modules.package") for name in sys.modules)


def test_a_question_about_code_is_asked_by_transformers_5_alone_and_no_is_a_good_answer(
    with_tokenizer, tiny_tokenizer, questions
):
    """transformers 4 stops at `tokenizer_class`, which we write. 5 reads the model's config first, whatever it says."""
    tokenizer = AutoTokenizer.from_pretrained(with_tokenizer)
    assert tokenizer("abc").input_ids == tiny_tokenizer("abc").input_ids
    assert len(questions) == (0 if transformers.__version__.startswith("4.") else 1)
