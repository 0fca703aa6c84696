"""`save_package` writes a complete package or nothing, and leaves the model as it was."""

import copy
import hashlib
import os
import resource
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import make_tiny_model, plain_twin
from tokenizers import Tokenizer
from tokenizers.models import BPE
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from configuration_gpt2_value import AUTO_MAP
from hub_tools import errors, layout
from hub_tools.package.save import save_package
from modeling_gpt2_value import GPT2HeadWithValueModel, GPT2ValueModel

PROMPT = torch.tensor([[5, 7, 11, 13, 17]])


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def same_numbers(model, other):
    """Equal but for the rounding that depends on where in memory the weights lie."""
    with torch.no_grad():
        ours, theirs = (each(PROMPT, return_dict=True) for each in (model, other))
    return all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in ("logits", "value"))


# What is written


def test_a_package_loads_by_every_auto_class_with_the_same_numbers(tiny_model, tiny_tokenizer, tmp_path):
    folder = tmp_path / 'quoted "p"'
    saved = save_package(tiny_model, folder, tiny_tokenizer)
    assert AutoConfig.from_pretrained(folder, trust_remote_code=True).auto_map == AUTO_MAP == layout.AUTO_MAP
    for auto in (AutoModel, AutoModelForCausalLM):
        loaded = auto.from_pretrained(folder, trust_remote_code=True)
        assert type(loaded).__module__.startswith("transformers_modules.")
        assert same_numbers(tiny_model, loaded)
    assert saved.files.keys() == hashes(folder).keys()
    assert set(layout.REMOTE_CODE) | {"README.md", "verification.json", "generation_config.json"} <= set(saved.files)
    assert saved.parameters == sum(weight.numel() for weight in tiny_model.parameters())
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1  # others may read what they may list
    assert str(saved) == f"{folder} written: {saved.parameters:,} parameters, {len(saved.files)} files, " + (
        f"{sum(saved.files.values()) / 1e6:,.1f} MB\n{saved.load_lines}"
    )
    names = {}
    exec(saved.load_lines, names)
    assert same_numbers(tiny_model, names["model"])
    assert names["tokenizer"]("Hello")["input_ids"] == tiny_tokenizer("Hello")["input_ids"]


def test_the_same_model_gives_the_same_bytes_again_and_again_and_no_path(tiny_model, tiny_tokenizer, tmp_path):
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    # Loaded once before, since transformers 4 then writes more about special tokens than it had read.
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    for name in ("p", "q"):
        save_package(tiny_model, tmp_path / name, tokenizer)
    model = AutoModel.from_pretrained(tmp_path / "p", trust_remote_code=True)
    save_package(model, tmp_path / "r", AutoTokenizer.from_pretrained(tmp_path / "p", trust_remote_code=True))
    assert hashes(tmp_path / "p") == hashes(tmp_path / "q") == hashes(tmp_path / "r")
    for path in (tmp_path / "r").iterdir():
        assert os.fsencode(tmp_path) not in path.read_bytes(), path.name


def test_the_code_in_a_package_is_this_installation_s(tiny_model, tmp_path):
    """Also when the model came from a package whose code is another."""
    save_package(tiny_model, tmp_path / "p")
    with open(tmp_path / "p" / "modeling_gpt2_value.py", "a") as file:
        file.write("# another version\n")
    save_package(AutoModel.from_pretrained(tmp_path / "p", trust_remote_code=True), tmp_path / "q")
    assert layout.installed_hashes().items() <= hashes(tmp_path / "q").items()


VARIANTS = {
    "the seed's class": lambda: GPT2HeadWithValueModel(make_tiny_model().config).eval(),
    "bfloat16": lambda: make_tiny_model().to(torch.bfloat16),
    "float16": lambda: make_tiny_model().to(torch.float16),
    "untied": lambda: make_tiny_model(tie_word_embeddings=False),
    "detached": lambda: make_tiny_model(detach_value_head=True),
    "dropout": lambda: make_tiny_model(attn_pdrop=0.5, summary_first_dropout=0.25),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_was_saved_is_what_loads(variant, tmp_path):
    model = VARIANTS[variant]()
    saved = save_package(model, tmp_path / "p", max_shard_size=40_000)
    assert "model.safetensors" not in saved.files
    assert len([name for name in saved.files if layout.SHARD.fullmatch(name)]) > 1
    loaded = AutoModel.from_pretrained(tmp_path / "p", trust_remote_code=True, dtype="auto")
    assert type(loaded).__name__ == "GPT2ValueModel"
    assert loaded.dtype == model.dtype
    assert same_numbers(model, loaded)
    differing = {name for name, value in model.config.to_dict().items() if loaded.config.to_dict()[name] != value}
    assert differing <= {"_name_or_path", "architectures", "dtype"}


# What is left alone


def test_saving_changes_nothing_about_the_model(tiny_tokenizer, tmp_path):
    model = make_tiny_model(attn_pdrop=0.5)
    model.train()
    model.transformer.h[0].eval()
    model(PROMPT, labels=PROMPT).loss.backward()
    calls = []
    model.register_forward_hook(lambda *_: calls.append("model"))
    model.transformer.wte.register_forward_hook(lambda *_: calls.append("embedding"))
    model.transformer.wpe.weight.requires_grad_(False)

    def state():
        return {
            "config": copy.deepcopy(vars(model.config)),
            "generation": copy.deepcopy(vars(model.generation_config)),
            "modes": {name: module.training for name, module in model.named_modules()},
            "weights": {name: (id(w), w.data_ptr(), w.requires_grad) for name, w in model.named_parameters()},
            "gradients": {name: w.grad is not None and w.grad.sum() for name, w in model.named_parameters()},
            "random": torch.get_rng_state().tolist(),
            "tokenizer": copy.deepcopy(tiny_tokenizer.init_kwargs),
            "threads": torch.get_num_threads(),
        }

    before = state()
    save_package(model, tmp_path / "p", tiny_tokenizer)
    after = state()
    for name in before:
        assert after[name] == before[name], name
    assert calls == ["embedding", "model"]  # once: the model's own forward is compared with its copy's


# Replacing


def test_a_package_is_replaced_whole(tiny_model, tiny_tokenizer, tmp_path):
    (tmp_path / "p").mkdir()
    first = save_package(tiny_model, tmp_path / "p", tiny_tokenizer, max_shard_size=40_000, overwrite=False)
    with pytest.raises(errors.FolderRefusedError, match="overwrite"):
        save_package(make_tiny_model(seed=1), tmp_path / "p", overwrite=False)
    assert hashes(tmp_path / "p").keys() == first.files.keys()
    (tmp_path / "latest").symlink_to(tmp_path / "p")
    second = save_package(make_tiny_model(seed=1), tmp_path / "latest")
    assert hashes(tmp_path / "p").keys() == second.files.keys()
    assert not any("tokenizer" in name or "index" in name for name in second.files)
    assert sorted(os.listdir(tmp_path)) == ["latest", "p"]
    assert (tmp_path / "latest").is_symlink()
    assert same_numbers(make_tiny_model(seed=1), GPT2ValueModel.from_pretrained(tmp_path / "latest"))


def test_parallel_saves_of_one_folder_give_one_whole_package(tmp_path):
    models = [make_tiny_model(seed=seed) for seed in range(4)]
    alone = [save_package(model, tmp_path / f"alone{seed}").folder for seed, model in enumerate(models)]

    def save(model):
        for _ in range(3):
            save_package(model, tmp_path / "here" / "p")

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(save, models)) == [None] * 4
    assert hashes(tmp_path / "here" / "p") in [hashes(folder) for folder in alone]
    assert os.listdir(tmp_path / "here") == ["p"]


# What is refused


@pytest.fixture
def kept(tmp_path):
    """A package that stays as it is, whatever a test does."""
    folder = tmp_path / "kept" / "p"
    save_package(make_tiny_model(seed=7), folder)
    before = hashes(folder)
    yield folder
    assert hashes(folder) == before
    assert os.listdir(folder.parent) == ["p"]


def test_a_save_that_the_system_refuses_leaves_the_old_package(tiny_model, kept):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # the weights are larger
    try:
        with pytest.raises(errors.SaveFailedError, match="untouched"):
            save_package(tiny_model, kept)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def notes_alone(folder):
    (folder / "config.json").unlink()
    (folder / "thesis.tex").write_text("years of work")


def a_plain_gpt2(folder):
    plain_twin(make_tiny_model()).save_pretrained(folder)


@pytest.mark.parametrize(
    ("fill", "reason"),
    [
        (notes_alone, r"thesis\.tex"),
        (a_plain_gpt2, "type 'gpt2'"),
        (lambda folder: (folder / "optimizer.pt").write_bytes(b"moments"), r"optimizer\.pt"),
        (lambda folder: (folder / ".git").mkdir(), r"\.git"),
        (lambda folder: (folder / "config.json").unlink(), r"config\.json"),
        (os.chdir, "current directory"),
    ],
)
def test_what_is_not_a_package_is_not_replaced(fill, reason, package, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fill(package)
    before = sorted(os.listdir(package))
    with pytest.raises(errors.FolderRefusedError, match=reason):
        save_package(tiny_model, package)
    assert sorted(os.listdir(package)) == before
    with pytest.raises(errors.FolderRefusedError, match="Not a directory"):
        save_package(tiny_model, package / "README.md")


def with_adapters(model):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False))


@pytest.mark.parametrize(
    ("wrap", "way_out"),
    [
        (nn.DataParallel, "model.module"),
        (torch.compile, "model._orig_mod"),
        (with_adapters, "merge_and_unload"),
        (lambda model: "gpt2", "a str"),
        (lambda model: nn.Linear(2, 2), "GPT2ValueModel"),
    ],
)
def test_wrappers_and_strangers_are_refused_with_the_way_out(wrap, way_out, tiny_model, kept):
    with pytest.raises(errors.UnsavableModelError, match=way_out):
        save_package(wrap(tiny_model), kept)


def test_the_way_out_for_adapters_works(tiny_model, tmp_path):
    adapted = with_adapters(tiny_model).eval()
    save_package(copy.deepcopy(adapted).merge_and_unload(), tmp_path / "p")
    with torch.no_grad():
        loaded = GPT2ValueModel.from_pretrained(tmp_path / "p")(PROMPT)
        assert torch.allclose(adapted(input_ids=PROMPT).logits, loaded.logits, atol=1e-5)


def without_head(model):
    del model.v_head
    return model


@pytest.mark.parametrize("make", [without_head, plain_twin])
def test_a_model_without_its_head_is_refused(make, tiny_model, kept):
    with pytest.raises(errors.MissingHeadError):
        save_package(make(tiny_model), kept)


def not_finite(model):
    model.transformer.h[1].mlp.c_fc.bias.data[3] = float("nan")


def more_weights(model):
    model.second_head = nn.Linear(2, 2)


def another_shape(model):
    model.transformer.wpe = nn.Embedding(32, 32)


def another_config(model):
    model.config.summary_activation = "relu"


@pytest.mark.parametrize(
    ("spoil", "names"),
    [
        (not_finite, r"'transformer\.h\.1\.mlp\.c_fc\.bias'"),
        (
            lambda model: model.transformer.wpe.to("meta"),
            r"transformer\.wpe\.weight is torch.float32 on the device meta",
        ),
        (more_weights, r"second_head\.bias"),
        (another_shape, r"size mismatch for transformer\.wpe\.weight.*\[32, 32\]"),
        (lambda model: model.double(), "float64"),
        (another_config, "summary_activation"),
    ],
)
def test_a_model_that_could_not_be_loaded_again_is_refused(spoil, names, tiny_model, kept):
    spoil(tiny_model)
    with pytest.raises(errors.UnsavableModelError, match=names):
        save_package(tiny_model, kept)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tiny_model, tiny_tokenizer, tmp_path):
    tiny_tokenizer.add_special_tokens({"additional_special_tokens": ["<|pad|>", "<|sep|>"]})
    with pytest.raises(errors.TokenizerMismatchError, match="the id 97"):
        save_package(tiny_model, tmp_path / "p", tiny_tokenizer)


def test_what_is_no_tokenizer_is_refused(tiny_model, kept):
    # transformers 5 makes an empty one where a folder has no tokenizer files
    empty = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE()), eos_token="<|endoftext|>")
    for tokenizer, found in ((empty, "no tokens but special"), ("gpt2", "a str")):
        with pytest.raises(errors.TokenizerMismatchError, match=found):
            save_package(tiny_model, kept, tokenizer)


# What a save writes is what the model computes


class TwiceTheValue(GPT2ValueModel):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.value = 2 * output.value
        return output


class OfTexts(GPT2ValueModel):
    def forward(self, texts):
        return texts


def an_activation_in_memory(model):
    model.v_head.activation = nn.Tanh()


def a_hook_on_the_head(model):
    model.v_head.register_forward_hook(lambda module, args, output: output + 0.01)


def a_hook_before_a_layer(model):
    model.transformer.h[1].register_forward_pre_hook(lambda module, args: (args[0] * 1.01, *args[1:]))


def a_subclass(model):
    model.__class__ = TwiceTheValue


def other_arguments(model):
    model.__class__ = OfTexts


def a_forward_replaced(model):
    plain = model.v_head.forward
    model.v_head.forward = lambda hidden: plain(hidden) * 3


def untied(model):
    model.lm_head.weight = nn.Parameter(torch.ones_like(model.lm_head.weight))


def in_bfloat16(model):
    a_subclass(model.to(torch.bfloat16))


def only_padded_rows(model):
    def hook(module, args, kwargs, output):
        mask = kwargs.get("attention_mask")
        if mask is not None and not mask.all():
            output.value = output.value + 1
        return output

    model.register_forward_hook(hook, with_kwargs=True)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (an_activation_in_memory, r"value differ .* of v_head\.activation \(Tanh\)"),
        (a_hook_on_the_head, r"value differ .* of v_head \(ValueHead\)"),
        (a_hook_before_a_layer, r"logits differ .* of transformer\.h\.1 \(GPT2Block\)"),
        (a_subclass, r"of the model \(TwiceTheValue\)"),
        (in_bfloat16, r"of the model \(TwiceTheValue\)"),
        (a_forward_replaced, r"of v_head \(ValueHead\)"),
        (only_padded_rows, r"of the model \(GPT2ValueModel\)"),
        (untied, "logits differ"),
        (other_arguments, "batch of tokens"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_model_that_computes_otherwise_than_its_copy_is_refused(change, named, kept):
    model = make_tiny_model()
    nn.init.normal_(model.v_head.summary.weight, std=2.0)
    change(model)
    with pytest.raises(errors.UnsavableModelError, match=named) as refused:
        save_package(model, kept)
    assert "model.config" in refused.value.next_step


def test_what_changes_no_number_can_be_saved(tmp_path):
    """A subclass with methods of its own, a hook that looks, and dropout in training mode."""

    class Named(GPT2ValueModel):
        def name(self):
            return "mine"

    model = Named(make_tiny_model(attn_pdrop=0.5).config).train()
    model.register_forward_hook(lambda *_: None)
    assert save_package(model, tmp_path / "p").folder.is_dir()
