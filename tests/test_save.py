"""`save_package` writes a complete package or nothing, and leaves the model as it was."""

import copy
import hashlib
import json
import os
import resource
import threading

import pytest
import torch
import transformers
from conftest import make_tiny_model, plain_twin
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import hub_tools
from configuration_gpt2_value import AUTO_MAP
from hub_tools import errors, layout
from hub_tools.package.save import save_package
from modeling_gpt2_value import GPT2HeadWithValueModel, GPT2ValueModel

PROMPT = torch.tensor([[5, 7, 11, 13, 17]])


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def same_numbers(model, other):
    """Equal weights, and equal outputs but for the rounding that depends on where in memory the weights lie."""
    with torch.no_grad():
        ours, theirs = model(PROMPT, return_dict=True), other(PROMPT, return_dict=True)
    close = all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in ("logits", "value"))
    weights = other.state_dict()
    return close and all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())


# What is written


def test_a_package_loads_by_every_auto_class_with_the_same_numbers(tiny_model, tiny_tokenizer, tmp_path):
    saved = save_package(tiny_model, tmp_path / "p", tiny_tokenizer)
    assert AutoConfig.from_pretrained(tmp_path / "p", trust_remote_code=True).auto_map == AUTO_MAP
    for auto in (AutoModel, AutoModelForCausalLM):
        loaded = auto.from_pretrained(tmp_path / "p", trust_remote_code=True)
        assert type(loaded).__module__.startswith("transformers_modules.")
        assert same_numbers(tiny_model, loaded)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "p", trust_remote_code=True)
    assert tokenizer("Hello")["input_ids"] == tiny_tokenizer("Hello")["input_ids"]
    assert saved.files.keys() == hashes(tmp_path / "p").keys()
    assert set(layout.REMOTE_CODE) | {"README.md", "verification.json", "generation_config.json"} <= set(saved.files)
    assert saved.parameters == sum(weight.numel() for weight in tiny_model.parameters())


def test_the_lines_that_load_it_run_as_they_stand(tiny_model, tiny_tokenizer, tmp_path):
    saved = save_package(tiny_model, tmp_path / 'quoted "p"', tiny_tokenizer)
    names = {}
    exec(saved.load_lines, names)
    assert same_numbers(tiny_model, names["model"])
    assert names["tokenizer"]("a")["input_ids"] == tiny_tokenizer("a")["input_ids"]


def test_saving_twice_gives_the_same_bytes(tiny_model, tiny_tokenizer, tmp_path):
    save_package(tiny_model, tmp_path / "p", tiny_tokenizer)
    save_package(tiny_model, tmp_path / "q", tiny_tokenizer)
    assert hashes(tmp_path / "p") == hashes(tmp_path / "q")


def test_a_loaded_package_saved_again_is_the_same_package(tiny_model, tiny_tokenizer, tmp_path):
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    # Loaded once before, since transformers 4 then writes more about special tokens than it had read.
    save_package(tiny_model, tmp_path / "p", AutoTokenizer.from_pretrained(tmp_path / "tokenizer"))
    again = AutoModel.from_pretrained(tmp_path / "p", trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "p", trust_remote_code=True)
    save_package(again, tmp_path / "q", tokenizer)
    assert hashes(tmp_path / "p") == hashes(tmp_path / "q")


def test_the_code_in_a_package_is_this_installation_s(tiny_model, tmp_path):
    """Also when the model came from a package whose code is another."""
    save_package(tiny_model, tmp_path / "p")
    with open(tmp_path / "p" / "modeling_gpt2_value.py", "a") as file:
        file.write("# another version\n")
    other = AutoModel.from_pretrained(tmp_path / "p", trust_remote_code=True)
    save_package(other, tmp_path / "q")
    written = hashes(tmp_path / "q")
    installed = layout.installed_hashes()
    assert [written[name] for name in layout.REMOTE_CODE] == [installed[name] for name in layout.REMOTE_CODE]


def test_layout_names_the_classes_that_the_model_names():
    assert layout.AUTO_MAP == AUTO_MAP


def test_the_seed_s_class_is_saved_as_the_model_that_auto_model_loads(tiny_config, tmp_path):
    model = GPT2HeadWithValueModel(tiny_config).eval()
    save_package(model, tmp_path / "p")
    loaded = AutoModel.from_pretrained(tmp_path / "p", trust_remote_code=True)
    assert type(loaded).__name__ == "GPT2ValueModel"
    assert same_numbers(model, loaded)
    assert json.loads((tmp_path / "p" / "config.json").read_text())["architectures"] == ["GPT2ValueModel"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_is_kept(dtype, tmp_path):
    model = make_tiny_model().to(dtype)
    save_package(model, tmp_path / "p")
    loaded = GPT2ValueModel.from_pretrained(tmp_path / "p", dtype="auto")
    assert loaded.transformer.wte.weight.dtype == dtype
    assert torch.equal(loaded.transformer.wte.weight, model.transformer.wte.weight)


def test_large_weights_are_sharded(tiny_model, tmp_path):
    saved = save_package(tiny_model, tmp_path / "p", max_shard_size=40_000)
    assert "model.safetensors" not in saved.files
    assert len([name for name in saved.files if layout.SHARD.fullmatch(name)]) > 1
    assert same_numbers(tiny_model, AutoModel.from_pretrained(tmp_path / "p", trust_remote_code=True))


def test_untied_embeddings_are_kept_apart(tmp_path):
    model = make_tiny_model(tie_word_embeddings=False)
    save_package(model, tmp_path / "p")
    assert not torch.equal(model.lm_head.weight, model.transformer.wte.weight)
    assert same_numbers(model, AutoModel.from_pretrained(tmp_path / "p", trust_remote_code=True))


def test_a_detached_head_stays_detached(tiny_model, tmp_path):
    tiny_model.detach_value_head()
    save_package(tiny_model, tmp_path / "p")
    assert AutoModel.from_pretrained(tmp_path / "p", trust_remote_code=True).config.detach_value_head


def test_no_path_of_this_machine_is_written(tiny_model, tiny_tokenizer, tmp_path):
    save_package(tiny_model, tmp_path / "first", tiny_tokenizer)
    model = GPT2ValueModel.from_pretrained(tmp_path / "first")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "first", trust_remote_code=False)
    save_package(model, tmp_path / "second", tokenizer)
    for path in (tmp_path / "second").iterdir():
        assert os.fsencode(tmp_path) not in path.read_bytes(), path.name


def test_others_may_read_what_they_may_list(tiny_model, tmp_path):
    save_package(tiny_model, tmp_path / "p")
    assert len({path.stat().st_mode for path in (tmp_path / "p").iterdir()}) == 1


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
            "gradients": {
                name: None if w.grad is None else w.grad.sum().item() for name, w in model.named_parameters()
            },
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
    first = save_package(tiny_model, tmp_path / "p", tiny_tokenizer, max_shard_size=40_000)
    second = save_package(make_tiny_model(seed=1), tmp_path / "p")
    assert (first.replaced, second.replaced) == (False, True)
    assert hashes(tmp_path / "p").keys() == second.files.keys()
    assert not any("tokenizer" in name or "index" in name for name in second.files)
    assert os.listdir(tmp_path) == ["p"]


def test_a_link_to_a_package_stays_a_link(tiny_model, tmp_path):
    save_package(tiny_model, tmp_path / "runs" / "p")
    (tmp_path / "latest").symlink_to(tmp_path / "runs" / "p")
    save_package(make_tiny_model(seed=1), tmp_path / "latest")
    assert (tmp_path / "latest").is_symlink()
    assert os.listdir(tmp_path / "runs") == ["p"]
    assert same_numbers(make_tiny_model(seed=1), GPT2ValueModel.from_pretrained(tmp_path / "latest"))


def test_parallel_saves_of_one_folder_give_one_whole_package(tmp_path):
    models = [make_tiny_model(seed=seed) for seed in range(4)]
    for seed, model in enumerate(models):
        save_package(model, tmp_path / f"alone{seed}")
    alone = [hashes(tmp_path / f"alone{seed}") for seed in range(4)]
    failures = []

    def save(model):
        try:
            for _ in range(3):
                save_package(model, tmp_path / "here" / "p")
        except errors.GPT2ValueHubError as error:
            failures.append(error)

    threads = [threading.Thread(target=save, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert hashes(tmp_path / "here" / "p") in alone
    assert os.listdir(tmp_path / "here") == ["p"]


def test_a_save_that_the_system_refuses_leaves_the_old_package(tiny_model, tmp_path):
    save_package(tiny_model, tmp_path / "p")
    before = hashes(tmp_path / "p")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # the weights are larger
    try:
        with pytest.raises(errors.SaveFailedError, match="untouched"):
            save_package(make_tiny_model(seed=1), tmp_path / "p")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert hashes(tmp_path / "p") == before
    assert os.listdir(tmp_path) == ["p"]


# What is refused


def fill_with_notes(folder):
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")


def fill_with_plain_gpt2(folder):
    plain_twin(make_tiny_model()).save_pretrained(folder)


def fill_with_package_and_notes(folder):
    save_package(make_tiny_model(), folder)
    (folder / "optimizer.pt").write_bytes(b"moments")


def fill_with_git_checkout(folder):
    save_package(make_tiny_model(), folder)
    (folder / ".git").mkdir()


def fill_as_file(folder):
    folder.write_text("not a folder")


@pytest.mark.parametrize(
    ("fill", "reason"),
    [
        (fill_with_notes, "thesis.tex"),
        (fill_with_plain_gpt2, "type 'gpt2'"),
        (fill_with_package_and_notes, "optimizer.pt"),
        (fill_with_git_checkout, "git checkout"),
        (fill_as_file, "is a file"),
    ],
)
def test_what_is_not_a_package_is_not_replaced(fill, reason, tiny_model, tmp_path):
    folder = tmp_path / "p"
    fill(folder)
    before = sorted(os.listdir(folder)) if folder.is_dir() else folder.read_text()
    with pytest.raises(errors.FolderRefusedError, match=reason):
        save_package(tiny_model, folder)
    assert (sorted(os.listdir(folder)) if folder.is_dir() else folder.read_text()) == before


def test_a_package_is_kept_when_overwrite_is_off(tiny_model, tmp_path):
    save_package(tiny_model, tmp_path / "p")
    before = hashes(tmp_path / "p")
    with pytest.raises(errors.FolderRefusedError, match="overwrite"):
        save_package(make_tiny_model(seed=1), tmp_path / "p", overwrite=False)
    assert hashes(tmp_path / "p") == before
    (tmp_path / "empty").mkdir()
    save_package(tiny_model, tmp_path / "empty", overwrite=False)


def test_the_current_directory_is_not_replaced(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(errors.FolderRefusedError, match="current directory"):
        save_package(tiny_model, ".")


def compiled(model):
    return torch.compile(model)


def with_adapters(model):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))


@pytest.mark.parametrize(
    ("wrap", "way_out"),
    [
        (torch.nn.DataParallel, "model.module"),
        (compiled, "model._orig_mod"),
        (with_adapters, "merge_and_unload"),
        (lambda model: "gpt2", "the model itself"),
        (lambda model: torch.nn.Linear(2, 2), "GPT2ValueModel"),
    ],
)
def test_wrappers_and_strangers_are_refused_with_the_way_out(wrap, way_out, tiny_model, tmp_path):
    with pytest.raises(errors.UnsavableModelError, match=way_out):
        save_package(wrap(tiny_model), tmp_path / "p")
    assert os.listdir(tmp_path) == []


def test_the_way_out_for_adapters_works(tiny_model, tmp_path):
    adapted = with_adapters(tiny_model)
    save_package(copy.deepcopy(adapted).merge_and_unload(), tmp_path / "p")
    loaded = GPT2ValueModel.from_pretrained(tmp_path / "p")
    with torch.no_grad():
        assert torch.allclose(adapted.eval()(input_ids=PROMPT).logits, loaded(PROMPT).logits, atol=1e-5)


def test_the_way_out_for_transformers_own_adapters_works(tiny_model, tmp_path):
    import peft
    from peft import LoraConfig, PeftModel

    if transformers.__version__ >= "5.24" and peft.__version__ < "0.22":
        pytest.skip("transformers 5.24 adds adapters with PEFT 0.22 and newer")

    tiny_model.save_pretrained(tmp_path / "base")
    tiny_model.add_adapter(LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False))
    with pytest.raises(errors.UnsavableModelError) as refusal:
        save_package(tiny_model, tmp_path / "p")
    names = {"model": tiny_model.eval(), "save_package": save_package, "PeftModel": PeftModel}
    names |= {"GPT2ValueModel": GPT2ValueModel, "BASE": tmp_path / "base"}
    lines = refusal.value.next_step.partition(": ")[2]
    exec(lines.replace('"adapter"', repr(str(tmp_path / "adapter"))).replace("...", repr(str(tmp_path / "p"))), names)
    with torch.no_grad():
        loaded = GPT2ValueModel.from_pretrained(tmp_path / "p").eval()
        assert torch.allclose(tiny_model(input_ids=PROMPT).logits, loaded(PROMPT).logits, atol=1e-5)


def without_head(model):
    del model.v_head
    return model


@pytest.mark.parametrize("make", [without_head, plain_twin])
def test_a_model_without_its_head_is_refused(make, tiny_model, tmp_path):
    with pytest.raises(errors.MissingHeadError):
        save_package(make(tiny_model), tmp_path / "p")
    assert os.listdir(tmp_path) == []


def not_finite(model):
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.bias[3] = float("nan")


def on_meta(model):
    model.transformer.wpe.to("meta")


def more_weights(model):
    model.second_head = torch.nn.Linear(2, 2)


def another_shape(model):
    model.transformer.wpe = torch.nn.Embedding(32, 32)


def another_dtype(model):
    model.double()


def untied(model):
    model.lm_head.weight = torch.nn.Parameter(torch.ones_like(model.lm_head.weight))


@pytest.mark.parametrize(
    ("spoil", "error", "names"),
    [
        (not_finite, errors.UnsavableModelError, r"transformer\.h\.1\.mlp\.c_fc\.bias has 1 "),
        (on_meta, errors.UnsavableModelError, r"transformer\.wpe\.weight is on the meta device"),
        (more_weights, errors.UnsavableModelError, r"second_head\.bias"),
        (another_shape, errors.UnsavableModelError, r"transformer\.wpe\.weight has shape \[32, 32\]"),
        (another_dtype, errors.UnsavableModelError, r"float64"),
        (untied, errors.UnsavableModelError, r"tie_word_embeddings"),
    ],
)
def test_weights_that_could_not_be_loaded_again_are_refused(spoil, error, names, tiny_model, tmp_path):
    save_package(tiny_model, tmp_path / "p")
    before = hashes(tmp_path / "p")
    spoil(tiny_model)
    with pytest.raises(error, match=names):
        save_package(tiny_model, tmp_path / "p")
    assert hashes(tmp_path / "p") == before
    assert os.listdir(tmp_path) == ["p"]


def test_a_config_that_could_not_be_loaded_again_is_refused(tiny_model, tmp_path):
    tiny_model.config.summary_activation = "relu"
    with pytest.raises(errors.UnsavableModelError, match="summary_activation"):
        save_package(tiny_model, tmp_path / "p")


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tiny_model, tiny_tokenizer, tmp_path):
    tiny_tokenizer.add_special_tokens({"additional_special_tokens": ["<|pad|>", "<|sep|>"]})
    with pytest.raises(errors.TokenizerMismatchError, match=r"resize_token_embeddings\(98\)"):
        save_package(tiny_model, tmp_path / "p", tiny_tokenizer)
    tiny_model.resize_token_embeddings(98)
    save_package(tiny_model, tmp_path / "p", tiny_tokenizer)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "p", trust_remote_code=True)
    assert loaded("<|sep|>")["input_ids"] == tiny_tokenizer("<|sep|>")["input_ids"] == [97]


def test_a_tokenizer_that_is_none_is_refused(tiny_model, tmp_path):
    with pytest.raises(errors.TokenizerMismatchError, match="str"):
        save_package(tiny_model, tmp_path / "p", "gpt2")


def test_an_empty_tokenizer_is_refused(tiny_model, tmp_path):
    """transformers 5 makes such a one where a folder has no tokenizer files."""
    empty = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE()), eos_token="<|endoftext|>")
    with pytest.raises(errors.TokenizerMismatchError, match="none of them"):
        save_package(tiny_model, tmp_path / "p", empty)


def test_hub_tools_offers_what_it_names():
    for name in hub_tools.__all__:
        assert getattr(hub_tools, name) is not None
    assert not hasattr(hub_tools, "no_such_name")


# What a save writes is what the model computes


class TwiceTheValue(GPT2ValueModel):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.value = 2 * output.value
        return output


def an_activation_in_memory(model):
    model.v_head.activation = torch.nn.Tanh()


def a_hook_on_the_head(model):
    model.v_head.register_forward_hook(lambda module, args, output: output + 0.01)


def a_hook_before_a_layer(model):
    model.transformer.h[1].register_forward_pre_hook(lambda module, args: (args[0] * 1.01, *args[1:]))


def a_subclass(model):
    model.__class__ = TwiceTheValue


def a_forward_replaced(model):
    plain = model.v_head.forward
    model.v_head.forward = lambda hidden: plain(hidden) * 3


def another_norm(model):
    model.transformer.ln_f.eps = 1.0


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
        (an_activation_in_memory, "v_head.activation is a Tanh, not a Identity"),
        (a_hook_on_the_head, "v_head has hooks"),
        (a_hook_before_a_layer, "transformer.h.1 has hooks"),
        (a_subclass, "the model is a TwiceTheValue"),
        (a_forward_replaced, "the forward of v_head was replaced"),
        (another_norm, "logits differ by"),
        (only_padded_rows, "the model has hooks"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_that_computes_otherwise_than_its_copy_is_refused(change, named, dtype, tmp_path):
    model = make_tiny_model()
    torch.nn.init.normal_(model.v_head.summary.weight, std=2.0)
    model.to(dtype)
    change(model)
    if dtype == torch.bfloat16 and change in (a_hook_on_the_head, a_hook_before_a_layer):
        pytest.skip("a change that is within the rounding of bfloat16")
    with pytest.raises(errors.UnsavableModelError, match=named) as refused:
        save_package(model, tmp_path / "p")
    assert "model.config" in refused.value.next_step
    assert list(tmp_path.iterdir()) == []


def test_what_changes_no_number_can_be_saved(tmp_path):
    """A subclass with methods of its own, a hook that looks, and dropout in training mode."""

    class Named(GPT2ValueModel):
        def name(self):
            return "mine"

    model = Named(make_tiny_model(attn_pdrop=0.5).config).train()
    model.register_forward_hook(lambda *_: None)
    assert save_package(model, tmp_path / "p").folder.is_dir()


def test_a_model_whose_forward_takes_other_arguments_is_refused(tmp_path):
    class OfTexts(GPT2ValueModel):
        def forward(self, texts):
            return texts

    with pytest.raises(errors.UnsavableModelError, match="batch of tokens"):
        save_package(OfTexts(make_tiny_model().config), tmp_path / "p")


def test_a_saved_package_prints_as_people_read(tiny_model, tmp_path):
    text = str(save_package(tiny_model, tmp_path / "p"))
    assert text.startswith(f"{tmp_path / 'p'} written: ")
    assert "AutoModel.from_pretrained(" in text
