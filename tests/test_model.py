"""The model: GPT-2's numbers bit for bit, values that padding cannot change, a head that is never lost."""

import copy
import inspect
import json
import pickle
import re

import pytest
import torch
from conftest import make_tiny_model, plain_twin, write_published_checkpoint
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    pipeline,
)

from modeling_gpt2_value import (
    CACHE,
    GPT2HeadWithValueModel,
    GPT2ValueModel,
    GPT2ValueOutput,
    ValueHead,
)

IDS = torch.tensor([[5, 17, 3, 80, 41, 9], [7, 7, 2, 64, 33, 12]])


# The same numbers as GPT-2


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_gpt2s_bit_for_bit(attention, dtype):
    model = make_tiny_model(attn_implementation=attention).to(dtype)
    twin = plain_twin(model).to(dtype)
    assert model.config._attn_implementation == twin.config._attn_implementation == attention
    assert torch.equal(model(IDS).logits, twin(IDS).logits)


def test_the_state_dict_is_gpt2s_and_the_head(tiny_model):
    added = set(tiny_model.state_dict()) - set(plain_twin(tiny_model).state_dict())
    assert added == {"v_head.summary.weight", "v_head.summary.bias"}


def test_every_argument_of_gpt2_gives_what_gpt2_gives(tiny_model):
    model, twin = tiny_model, plain_twin(tiny_model)
    labels = IDS.masked_fill(IDS == 7, -100)
    embeds = twin.transformer.wte(IDS)
    types = torch.ones_like(IDS)
    for arguments in (
        {"input_ids": IDS, "labels": labels},
        {"input_ids": IDS, "logits_to_keep": 2},
        {"input_ids": IDS, "logits_to_keep": torch.tensor([0, 3])},
        {"inputs_embeds": embeds},
        {"input_ids": IDS, "token_type_ids": types},
        {"input_ids": IDS, "position_ids": torch.arange(6).flip(0)[None]},
        {"input_ids": IDS, "output_hidden_states": True},
        {"input_ids": IDS, "use_cache": False},
    ):
        ours, theirs = model(**arguments), twin(**arguments)
        assert torch.equal(ours.logits, theirs.logits)
        assert (ours.loss is None) == (theirs.loss is None)
        if ours.loss is not None:
            assert torch.equal(ours.loss, theirs.loss)
        assert (CACHE in ours) == (CACHE in theirs)
        for a, b in zip(ours.hidden_states or (), theirs.hidden_states or (), strict=True):
            assert torch.equal(a, b)
        assert ours.value.shape == IDS.shape


def test_a_loss_is_computed_without_a_word(tiny_model, transformers_log):
    tiny_model(IDS, labels=IDS).loss.backward()
    assert not transformers_log.records


def test_attentions_are_gpt2s():
    model = make_tiny_model(attn_implementation="eager")
    ours = model(IDS, output_attentions=True).attentions
    theirs = plain_twin(model)(IDS, output_attentions=True).attentions
    assert len(ours) == 2
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_gives_the_same_logits_and_values(tiny_model, name):
    whole = tiny_model(IDS)
    first = tiny_model(IDS[:, :4], use_cache=True)
    rest = tiny_model(IDS[:, 4:], **{name: first[CACHE]})
    torch.testing.assert_close(rest.logits, whole.logits[:, 4:], atol=1e-5, rtol=0)
    torch.testing.assert_close(rest.value, whole.value[:, 4:], atol=1e-5, rtol=0)


def test_the_tuple_has_the_outputs_order(tiny_model):
    items = tiny_model(IDS, labels=IDS, output_hidden_states=True, return_dict=False)
    output = tiny_model(IDS, labels=IDS, output_hidden_states=True)
    assert isinstance(output, GPT2ValueOutput)
    assert list(output) == ["loss", "logits", CACHE, "hidden_states", "value"]
    assert torch.equal(items[0], output.loss)
    assert torch.equal(items[1], output.logits)
    assert torch.equal(items[-1], output.value)
    assert len(items) == 5


# Padding


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("amount", [1, 3, 20])
def test_padding_changes_nothing(side, amount, attention):
    model = make_tiny_model(attn_implementation=attention)
    alone = model(IDS)
    pad, zero = torch.full((2, amount), 95), torch.zeros((2, amount), dtype=torch.long)
    parts, masks = ([pad, IDS], [zero, torch.ones_like(IDS)])
    if side == "right":
        parts, masks = parts[::-1], masks[::-1]
    padded = model(torch.cat(parts, 1), attention_mask=torch.cat(masks, 1))
    tokens = slice(amount, None) if side == "left" else slice(0, IDS.shape[1])
    torch.testing.assert_close(padded.logits[:, tokens], alone.logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(padded.value[:, tokens], alone.value, atol=1e-5, rtol=0)
    assert padded.value.isfinite().all()


def test_plain_gpt2_gets_left_padding_wrong(tiny_model):
    """Why `forward` counts positions by the mask: GPT-2's own, with the same weights, does not."""
    twin = plain_twin(tiny_model)
    padded = torch.cat([torch.full((2, 3), 95), IDS], 1)
    mask = torch.cat([torch.zeros((2, 3), dtype=torch.long), torch.ones_like(IDS)], 1)
    assert (twin(padded, attention_mask=mask).logits[:, 3:] - twin(IDS).logits).abs().max() > 0.1


def test_padding_changes_nothing_with_a_cache(tiny_model):
    padded = torch.cat([torch.full((2, 3), 95), IDS], 1)
    mask = torch.cat([torch.zeros((2, 3), dtype=torch.long), torch.ones_like(IDS)], 1)
    first = tiny_model(padded[:, :5], attention_mask=mask[:, :5], use_cache=True)
    rest = tiny_model(padded[:, 5:], attention_mask=mask, **{CACHE: first[CACHE]})
    torch.testing.assert_close(rest.value, tiny_model(IDS).value[:, 2:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_mask_of_the_new_tokens_only_is_refused(tiny_model, name):
    first = tiny_model(IDS[:, :4], use_cache=True)
    with pytest.raises(ValueError, match="2 columns; expected 6"):
        tiny_model(IDS[:, 4:], attention_mask=torch.ones((2, 2)), **{name: first[CACHE]})


# What cannot be honoured


def test_what_is_not_known_here_is_handed_on(tiny_model):
    """As GPT-2 does: `generate(stop_strings=..., tokenizer=...)` sends such arguments through the model's forward."""
    labels = IDS.masked_fill(IDS == 7, -100)
    for arguments in (
        {"tokenizer": object(), "of_next_year": 3},
        {"labels": labels, "shift_labels": torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()},
        {"labels": labels, "num_items_in_batch": 3},
    ):
        ours, theirs = tiny_model(IDS, **arguments), plain_twin(tiny_model)(IDS, **arguments)
        assert torch.equal(ours.logits, theirs.logits)
        assert ours.loss is theirs.loss is None or torch.equal(ours.loss, theirs.loss)


def test_arguments_may_be_given_by_position(tiny_model):
    names = list(inspect.signature(GPT2LMHeadModel.forward).parameters)[1:]
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    given = [
        {"input_ids": IDS, "attention_mask": mask}.get(name) for name in names[: names.index("attention_mask") + 1]
    ]
    assert torch.equal(tiny_model(*given).logits, tiny_model(IDS, attention_mask=mask).logits)
    with pytest.raises(TypeError, match="input_ids twice"):
        tiny_model(IDS, input_ids=IDS)


def test_labels_under_two_names_are_refused(tiny_model):
    with pytest.raises(TypeError, match="lm_labels twice, or under two names"):
        tiny_model(IDS, labels=IDS, lm_labels=IDS)


# The head


def test_a_new_head_says_exactly_zero(tiny_config):
    value = GPT2ValueModel(tiny_config).eval()(IDS).value
    assert value.dtype == torch.float32
    assert (value == 0).all()


def test_the_head_starts_with_the_configured_spread():
    model = make_tiny_model(n_embd=256, value_head_initializer_range=0.3)
    assert 0.25 < model.v_head.summary.weight.std() < 0.35
    assert not model.v_head.summary.bias.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_head_computes_in_float32(dtype):
    model = make_tiny_model().to(dtype)
    output = model(IDS, output_hidden_states=True)
    assert output.logits.dtype == dtype
    assert output.value.dtype == torch.float32
    head = model.v_head.summary
    exact = output.hidden_states[-1].double() @ head.weight.double().T + head.bias.double()
    torch.testing.assert_close(output.value.double(), exact.squeeze(-1), atol=1e-5, rtol=1e-6)


def test_autocast_leaves_the_head_in_float32(tiny_model):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = tiny_model(IDS, output_hidden_states=True)
    assert output.logits.dtype == torch.bfloat16
    exact = tiny_model.v_head(output.hidden_states[-1].float()).squeeze(-1)
    assert torch.equal(output.value, exact)


def test_a_package_loaded_in_half_precision_keeps_its_head_in_float32(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    model = GPT2ValueModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert model.transformer.wte.weight.dtype == torch.bfloat16
    assert model.v_head.summary.weight.dtype == torch.float32
    assert torch.equal(model.v_head.summary.weight, tiny_model.v_head.summary.weight)


def test_tanh_bounds_the_values():
    linear = make_tiny_model()
    bounded = make_tiny_model(summary_activation="tanh")
    torch.testing.assert_close(bounded(IDS).value, linear(IDS).value.tanh())


def test_a_head_without_projection_to_one_label_gives_hidden_sizes():
    for fields in ({"summary_use_proj": False}, {"summary_proj_to_labels": False}):
        assert make_tiny_model(**fields)(IDS).value.shape == (*IDS.shape, 32)
    assert isinstance(make_tiny_model(summary_use_proj=False).v_head.summary, torch.nn.Identity)


@pytest.mark.parametrize("field", ["summary_first_dropout", "summary_last_dropout"])
def test_the_heads_dropouts_act_in_training_only(field):
    fields = {"summary_first_dropout": 0.0, "summary_last_dropout": 0.0, field: 0.5}
    head = ValueHead(make_tiny_model(**fields).config)
    torch.nn.init.ones_(head.summary.weight)
    torch.nn.init.zeros_(head.summary.bias)
    hidden = torch.ones(1, 1000, 32)
    assert head.eval()(hidden).std() < 1e-4
    outputs = head.train()(hidden)
    if field == "summary_last_dropout":
        assert 400 < (outputs == 0).sum() < 600
    else:
        assert 4 < outputs.std() < 8  # sum of 32 draws from {0, 2}: sqrt(32)


def body_gradient(model):
    model.zero_grad()
    model(IDS).value.sum().backward()
    return model.transformer.h[0].mlp.c_fc.weight.grad


def test_detaching_stops_the_gradient_at_the_head_and_attaching_lets_it_through(tiny_model):
    assert body_gradient(tiny_model).abs().sum() > 0
    tiny_model.detach_value_head()
    assert tiny_model.config.detach_value_head is True
    assert body_gradient(tiny_model) is None
    assert tiny_model.v_head.summary.weight.grad.abs().sum() > 0
    tiny_model.attach_value_head()
    assert body_gradient(tiny_model).abs().sum() > 0


def test_detaching_survives_save_and_load(tiny_model, tmp_path):
    tiny_model.detach_value_head()
    tiny_model.save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
    assert model.config.detach_value_head is True
    assert body_gradient(model) is None
    model.attach_value_head()
    assert body_gradient(model).abs().sum() > 0


# Loading


@pytest.mark.parametrize("safetensors", [True, False])
@pytest.mark.parametrize("cls", [GPT2ValueModel, GPT2HeadWithValueModel])
def test_a_published_checkpoint_loads_without_a_word(tmp_path, safetensors, cls, transformers_log):
    plain = write_published_checkpoint(tmp_path, safetensors=safetensors)
    model = cls.from_pretrained(tmp_path)
    assert not transformers_log.records
    assert torch.equal(model(IDS, return_dict=True).logits, plain(IDS).logits)
    assert model.config.n_ctx == 64
    assert model.config.summary_first_dropout == 0.1
    assert not model.training


def test_our_own_package_loads_without_a_word(tiny_model, tmp_path, transformers_log):
    tiny_model.save_pretrained(tmp_path)
    GPT2ValueModel.from_pretrained(tmp_path)
    AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
    assert not transformers_log.records


@pytest.mark.parametrize("n_layer", [1, 3])
def test_a_plain_checkpoint_of_any_size_loads(tmp_path, n_layer):
    plain = write_published_checkpoint(tmp_path, n_layer=n_layer, n_embd=16 * n_layer)
    assert torch.equal(GPT2ValueModel.from_pretrained(tmp_path)(IDS).logits, plain(IDS).logits)


def lose(folder, *keys):
    weights = load_file(folder / "model.safetensors")
    save_file({k: w for k, w in weights.items() if k not in keys}, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("keys", [("v_head.summary.weight", "v_head.summary.bias"), ("v_head.summary.bias",)])
def test_a_package_without_its_head_is_refused(tiny_model, tmp_path, keys):
    tiny_model.save_pretrained(tmp_path)
    lose(tmp_path, *keys)
    for load in (
        lambda **more: GPT2ValueModel.from_pretrained(tmp_path, **more),
        lambda **more: AutoModel.from_pretrained(tmp_path, trust_remote_code=True, **more),
    ):
        with pytest.raises(ValueError, match=re.escape("v_head.summary.bias") + ".*init_value_head=True"):
            load()
        assert torch.equal(load(init_value_head=True)(IDS).logits, tiny_model(IDS).logits)


def test_a_head_of_another_shape_is_refused_even_when_mismatches_are_ignored(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["v_head.summary.weight"] = torch.ones(2, 32)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="another shape"):
        GPT2ValueModel.from_pretrained(tmp_path, ignore_mismatched_sizes=True)


def test_loading_info_is_given_when_asked_for(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    model, info = GPT2ValueModel.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(model, GPT2ValueModel)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_a_plain_gpt2_config_is_enough_to_build_a_model():
    model = GPT2HeadWithValueModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=50, eos_token_id=0))
    assert model.config.model_type == "gpt2_value"
    assert model.v_head.summary.weight.shape == (1, 16)


# Saving


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForCausalLM])
def test_save_and_load_again_and_again_loses_nothing(tiny_model, tmp_path, auto):
    expected = tiny_model(IDS)
    model = tiny_model
    for generation in range(3):
        folder = tmp_path / f"generation{generation}"
        model.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        assert config["auto_map"] == {
            "AutoConfig": "configuration_gpt2_value.GPT2ValueConfig",
            "AutoModel": "modeling_gpt2_value.GPT2ValueModel",
            "AutoModelForCausalLM": "modeling_gpt2_value.GPT2ValueModel",
        }
        code = {path.name for path in folder.glob("*.py")}
        assert code == {
            f"{topic}_gpt2_value.py"
            for topic in ("configuration", "decoding", "generation", "modeling", "sampling", "scoring")
        }
        assert AutoConfig.from_pretrained(folder, trust_remote_code=True).model_type == "gpt2_value"
        model = auto.from_pretrained(folder, trust_remote_code=True)
        assert type(model).__module__.startswith("transformers_modules")
        output = model(IDS)
        assert torch.equal(output.logits, expected.logits)
        torch.testing.assert_close(output.value, expected.value, atol=1e-6, rtol=0)


def test_a_package_saved_over_itself_stays_whole(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
    assert torch.equal(again(IDS).logits, tiny_model(IDS).logits)


def test_the_seeds_class_saves_a_package_that_auto_model_loads(tmp_path):
    write_published_checkpoint(tmp_path / "plain")
    seed = GPT2HeadWithValueModel.from_pretrained(tmp_path / "plain")
    seed.save_pretrained(tmp_path / "package")
    model = AutoModel.from_pretrained(tmp_path / "package", trust_remote_code=True)
    assert isinstance(model(IDS), tuple) is False
    torch.testing.assert_close(model(IDS).value, seed(IDS)[-1], atol=1e-6, rtol=0)
    again = GPT2HeadWithValueModel.from_pretrained(tmp_path / "package")
    assert torch.equal(again(IDS)[0], seed(IDS)[0])


def test_a_model_can_be_copied_and_pickled(tiny_model):
    for twin in (copy.deepcopy(tiny_model), pickle.loads(pickle.dumps(tiny_model))):
        assert torch.equal(twin(IDS).value, tiny_model(IDS).value)
        twin.detach_value_head()
        assert body_gradient(twin) is None
        assert tiny_model.config.detach_value_head is False


# A citizen of transformers


def test_embeddings_stay_tied_through_resizing_and_saving(tiny_model, tmp_path):
    tiny_model.resize_token_embeddings(100)
    assert tiny_model.lm_head.weight is tiny_model.transformer.wte.weight
    assert tiny_model(IDS).logits.shape[-1] == 100
    tiny_model.save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
    assert model.lm_head.weight.data_ptr() == model.transformer.wte.weight.data_ptr()
    assert model.config.vocab_size == 100
    torch.testing.assert_close(model(IDS).value, tiny_model(IDS).value, atol=1e-6, rtol=0)


def test_gradient_checkpointing_gives_the_same_gradients():
    def gradients(checkpointing):
        model = make_tiny_model(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, summary_first_dropout=0.0).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        output = model(IDS, labels=IDS, use_cache=False)
        (output.loss + output.value.pow(2).mean()).backward()
        return {name: weight.grad for name, weight in model.named_parameters()}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient)


MODES = {
    "greedy": {"do_sample": False},
    "sample": {"do_sample": True, "top_k": 20, "temperature": 0.8},
    "beams": {"num_beams": 3, "do_sample": False},
    "beam sample": {"num_beams": 2, "do_sample": True},
    "several": {"do_sample": True, "num_return_sequences": 2},
    "assisted": {"do_sample": False, "prompt_lookup_num_tokens": 2},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
}


@pytest.mark.shows(
    "transformers", "`generate()`: greedy, sampling, beams, prompt lookup and static cache give GPT-2's tokens"
)
@pytest.mark.parametrize("mode", MODES)
def test_generate_gives_what_gpt2_gives(tiny_model, mode):
    prompts = IDS[:1] if mode == "assisted" else IDS
    arguments = {"max_new_tokens": 8, "pad_token_id": 0, "attention_mask": torch.ones_like(prompts), **MODES[mode]}
    outputs = []
    for model in (tiny_model, plain_twin(tiny_model)):
        torch.manual_seed(1)
        outputs.append(model.generate(prompts, **arguments))
    assert torch.equal(*outputs)


@pytest.mark.shows("transformers", "`generate()` with left padding")
def test_generate_with_left_padding_gives_what_the_prompt_alone_gives(tiny_model):
    alone = tiny_model.generate(IDS, max_new_tokens=8, do_sample=False, pad_token_id=0)
    padded = torch.cat([torch.full((2, 3), 95), IDS], 1)
    mask = torch.cat([torch.zeros((2, 3), dtype=torch.long), torch.ones_like(IDS)], 1)
    output = tiny_model.generate(padded, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(output[:, 3:], alone)


@pytest.mark.shows("transformers", '`pipeline("text-generation")` answers as GPT-2')
def test_pipelines_answer_as_gpt2(tiny_model, tiny_tokenizer, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    twin = plain_twin(tiny_model)
    arguments = {"do_sample": False, "max_new_tokens": 5}
    expected = pipeline("text-generation", model=twin, tokenizer=tiny_tokenizer)("abc", **arguments)
    from_folder = pipeline("text-generation", model=str(tmp_path), trust_remote_code=True)("abc", **arguments)
    from_model = pipeline("text-generation", model=tiny_model, tokenizer=tiny_tokenizer)("abc", **arguments)
    assert from_folder == from_model == expected


def test_the_same_seed_gives_the_weights_that_gpt2_would_have(tiny_config):
    torch.manual_seed(3)
    model = GPT2ValueModel(tiny_config)
    torch.manual_seed(3)
    plain = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=96, n_positions=64, eos_token_id=0))
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in plain.state_dict().items())
