"""The model: GPT-2's arguments and numbers, values that padding cannot change, a head that is never lost."""

import copy
import inspect
import json
import pickle
import re
import warnings

import pytest
import torch
from conftest import make_tiny_model, plain_twin, write_published_checkpoint
from huggingface_hub.errors import StrictDataclassFieldValidationError
from safetensors.torch import load_file, save_file
from support.settings import assert_close
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    TextIteratorStreamer,
    pipeline,
)

from configuration_gpt2_value import AUTO_MAP, GPT2ValueConfig
from generation_gpt2_value import respond_to_batch
from modeling_gpt2_value import GPT2HeadWithValueModel, GPT2ValueModel, GPT2ValueOutput

IDS = torch.tensor([[5, 17, 3, 80, 41, 9], [7, 7, 2, 64, 33, 12]])
ONES = torch.ones_like(IDS)
FORWARD = inspect.signature(GPT2LMHeadModel.forward).parameters
CACHE = "cache" if "cache" in FORWARD else "past_key_values"  # transformers 5.24 renames it


def padded(amount, side="left"):
    """IDS with padding, and the mask."""
    columns = (amount, 0) if side == "left" else (0, amount)
    return torch.nn.functional.pad(IDS, columns, value=95), torch.nn.functional.pad(ONES, columns)


# The same numbers as GPT-2


def test_every_argument_of_gpt2_gives_what_gpt2_gives():
    model, crossing = (make_tiny_model(attn_implementation="eager", add_cross_attention=c) for c in (False, True))
    labels, encoder = IDS.masked_fill(IDS == 7, -100), torch.randn(2, 3, 32)
    embeddings = model.transformer.wte(IDS)
    encoder_mask = torch.tensor([[1, 1, 0]] * 2)
    each = {
        "input_ids": {},
        "inputs_embeds": {"input_ids": None, "inputs_embeds": embeddings},
        "attention_mask": {"attention_mask": ONES},
        "token_type_ids": {"token_type_ids": ONES},
        "position_ids": {"position_ids": torch.arange(6).flip(0)[None]},
        "encoder_hidden_states": {"encoder_hidden_states": encoder},
        "encoder_attention_mask": {"encoder_hidden_states": encoder, "encoder_attention_mask": encoder_mask},
        "labels": {"labels": labels, "output_hidden_states": True},
        "logits_to_keep": {"logits_to_keep": 2},
        "use_cache": {"use_cache": False},
        "output_hidden_states": {"output_hidden_states": True},
        "output_attentions": {"output_attentions": True},
        "head_mask": {"head_mask": torch.tensor([[1.0, 0, 1, 0]] * 2)} if "head_mask" in FORWARD else {},
        "return_dict": {"labels": labels, "return_dict": False},
        "some logits": {"logits_to_keep": torch.tensor([0, 3])},
        "shift_labels": {"labels": labels, "shift_labels": IDS.roll(-1, 1)},
        "num_items_in_batch": {"labels": labels, "num_items_in_batch": 5},
        "cache_position": {"cache_position": torch.arange(6)},
    }
    assert set(FORWARD) - {"self", "kwargs", "past_key_values", "cache"} <= set(each)
    for name, arguments in each.items():
        own = crossing if "encoder" in name else model
        plain = plain_twin(own)
        plain.loss_type = "ForCausalLM"
        ours, theirs = own(**{"input_ids": IDS, **arguments}), plain(**{"input_ids": IDS, **arguments})
        if name != "return_dict":
            assert isinstance(ours, GPT2ValueOutput)
            assert list(ours) == [*theirs, "value"], name
            ours, theirs = ours.to_tuple(), theirs.to_tuple()
        assert ours[-1].shape == IDS.shape
        for a, b in zip(ours[:-1], theirs, strict=True):
            for x, y in zip(*((t if isinstance(t, tuple) else (t,)) for t in (a, b)), strict=True):
                assert torch.equal(x, y) if isinstance(x, torch.Tensor) else type(x) is type(y), name


def test_an_argument_that_nobody_knows_yet_is_handed_on(tiny_model):
    """As generate(tokenizer=...), outlines and pipelines do; what GPT-2 does with it, it does here."""
    for arguments in ({"tokenizer": object()}, {"argument_of_next_year": 1}):
        try:
            expected = plain_twin(tiny_model)(IDS, **arguments).logits
        except TypeError:
            with pytest.raises(TypeError):
                tiny_model(IDS, **arguments)
        else:
            assert torch.equal(tiny_model(IDS, **arguments).logits, expected)


def test_logits_are_gpt2s_bit_for_bit():
    for attention in ("eager", "sdpa"):
        for dtype in (torch.float32, torch.bfloat16):
            model = make_tiny_model(attn_implementation=attention).to(dtype)
            twin = plain_twin(model).to(dtype)
            assert model.config._attn_implementation == twin.config._attn_implementation == attention
            assert torch.equal(model(IDS).logits, twin(IDS).logits)


def test_the_state_dict_and_the_seeded_weights_are_gpt2s_and_the_head(tiny_config):
    states = []
    for cls in (GPT2ValueModel, GPT2LMHeadModel):
        torch.manual_seed(3)
        fields = {name: getattr(tiny_config, name) for name in ("n_layer", "n_embd", "n_head", "vocab_size")}
        states.append(cls(GPT2Config(**fields, n_positions=64, eos_token_id=0)).state_dict())
    ours, theirs = states
    assert ours.keys() - theirs.keys() == {"v_head.summary.weight", "v_head.summary.bias"}
    assert all(torch.equal(ours[name], weight) for name, weight in theirs.items())


def test_nothing_is_said_and_nothing_of_tomorrow_is_called(tiny_model, transformers_log):
    """A loss, a cache, a rollout and its score, with every FutureWarning as an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny_model(IDS, labels=IDS).loss.backward()
        tiny_model(IDS[:, 4:], **{CACHE: tiny_model(IDS[:, :4]).past_key_values if CACHE != "cache" else None})
        tiny_model.rescore(tiny_model.rollout(list(IDS), max_new_tokens=3))
        tiny_model.generate(IDS, max_new_tokens=2, pad_token_id=0, attention_mask=ONES)
    assert not transformers_log.records


def test_labels_under_two_names_are_refused(tiny_model):
    assert torch.equal(tiny_model(IDS, lm_labels=IDS).loss, tiny_model(IDS, labels=IDS).loss)
    with pytest.raises(TypeError, match="lm_labels"):
        tiny_model(IDS, labels=IDS, lm_labels=IDS)


# Caches and padding


def cache_of(output):
    return getattr(output, CACHE, None) or output.past_key_values


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padding_changes_nothing(side, attention):
    model = make_tiny_model(attn_implementation=attention)
    alone = model(IDS)
    for amount in (1, 20):
        ids, mask = padded(amount, side)
        output = model(ids, attention_mask=amount * mask)  # any number but 0 is a token, as for GPT-2
        assert_close(output.logits[mask.bool()], alone.logits.flatten(0, 1))
        assert_close(output.value[mask.bool()], alone.value.flatten())
        assert output.value.isfinite().all()


def test_a_cache_gives_the_same_numbers_with_padding_or_without(tiny_model):
    whole, (ids, mask) = tiny_model(IDS), padded(3)
    for tokens, seen, cut in ((IDS, ONES, 4), (ids, mask, 5)):
        cache = cache_of(tiny_model(tokens[:, :cut], attention_mask=seen[:, :cut], use_cache=True))
        n = tokens.shape[1] - cut
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # transformers', of the name that goes
            for name in {CACHE, "past_key_values"}:
                with pytest.raises(ValueError, match=f"{n} columns; expected {n + cut}"):  # the new tokens' only
                    tiny_model(tokens[:, cut:], attention_mask=seen[:, cut:], **{name: cache})
        rest = tiny_model(tokens[:, cut:], attention_mask=seen, **{CACHE: cache})
        assert_close(rest.logits, whole.logits[:, -n:])
        assert_close(rest.value, whole.value[:, -n:])


# The head


def test_a_head_starts_with_the_configured_spread_and_at_zero_by_default(tiny_config):
    value = GPT2ValueModel(tiny_config).eval()(IDS).value
    assert value.dtype == torch.float32
    assert (value == 0).all()
    model = make_tiny_model(n_embd=256, value_head_initializer_range=0.3)
    assert 0.25 < model.v_head.summary.weight.std() < 0.35
    assert not model.v_head.summary.bias.any()
    seed = GPT2HeadWithValueModel(GPT2Config(n_layer=1, n_embd=256, n_head=2, vocab_size=50, eos_token_id=0))
    assert seed.config.model_type == "gpt2_value"  # a plain config is enough
    assert 0.015 < seed.v_head.summary.weight.std() < 0.025  # as GPT-2's own layers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_head_computes_in_float32(dtype, tmp_path):
    model = make_tiny_model().to(dtype)
    output = model(IDS, output_hidden_states=True)
    assert output.logits.dtype == dtype
    assert output.value.dtype == torch.float32
    head = model.v_head.summary
    exact = output.hidden_states[-1].double() @ head.weight.double().T + head.bias.double()
    torch.testing.assert_close(output.value.double(), exact.squeeze(-1), atol=1e-5, rtol=1e-6)
    # The head of a package, and the new one of a plain GPT-2, are float32 too.
    make_tiny_model().save_pretrained(tmp_path / "package")
    write_published_checkpoint(tmp_path / "plain")
    for name in ("package", "plain"):
        loaded = GPT2ValueModel.from_pretrained(tmp_path / name, dtype=dtype)
        assert loaded.v_head.summary.weight.dtype == torch.float32
        assert loaded.transformer.wte.weight.dtype == dtype


@pytest.mark.parametrize("field", ["summary_use_proj", "summary_proj_to_labels"])
def test_a_head_without_projection_to_one_label_gives_hidden_sizes_and_no_rollout(field):
    drawn = make_tiny_model().rollout(list(IDS), max_new_tokens=2)
    model = make_tiny_model(**{field: False})
    assert model(IDS).value.shape == (*IDS.shape, 32)
    for use, given in ((model.rollout, list(IDS)), (model.rescore, drawn)):
        with pytest.raises(ValueError, match="one scalar for each token"):
            use(given)


@pytest.mark.parametrize("field", ["summary_first_dropout", "summary_last_dropout"])
def test_the_heads_dropouts_act_in_training_only(field):
    none = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_first_dropout"), 0.0)
    model = make_tiny_model(**{**none, field: 0.5})
    evaluated, trained = model(IDS), model.train()(IDS)
    assert torch.equal(trained.logits, evaluated.logits)
    assert not torch.allclose(trained.value, evaluated.value)
    zeros = (trained.value == 0).sum()
    assert zeros > 0 if field == "summary_last_dropout" else zeros == 0


def body_learns(model):
    """Whether the gradient of the values reaches the body; it always reaches the head."""
    model.zero_grad()
    model(IDS, return_dict=True).value.sum().backward()
    assert model.v_head.summary.weight.grad.abs().sum() > 0
    return model.transformer.h[0].mlp.c_fc.weight.grad is not None


def test_detaching_stops_the_gradient_at_the_head_and_is_saved_and_copied(tiny_model, tmp_path):
    assert body_learns(tiny_model)
    twins = copy.deepcopy(tiny_model), pickle.loads(pickle.dumps(tiny_model))
    tiny_model.detach_head()  # the seed's word; it is detach_value_head
    tiny_model.save_pretrained(tmp_path)
    for each in (tiny_model, AutoModel.from_pretrained(tmp_path, trust_remote_code=True)):
        assert each.config.detach_value_head is True
        assert not body_learns(each)
        each.attach_value_head()
        assert body_learns(each)
    for twin in twins:
        assert torch.equal(twin(IDS).value, tiny_model(IDS).value)
        twin.detach_value_head()
        assert not body_learns(twin)
    assert body_learns(tiny_model)


# Loading and saving


@pytest.mark.parametrize("safetensors", [True, False])
def test_a_published_checkpoint_of_any_size_loads_without_a_word(tmp_path, safetensors, transformers_log):
    for layers, cls in ((1, GPT2ValueModel), (3, GPT2HeadWithValueModel)):
        folder = tmp_path / f"{layers}"
        plain = write_published_checkpoint(folder, safetensors=safetensors, n_layer=layers, n_embd=16 * layers)
        model = cls.from_pretrained(folder)
        assert not transformers_log.records
        assert torch.equal(model(IDS, return_dict=True).logits, plain(IDS).logits)
        assert model.config.n_ctx == 64
        assert model.config.summary_first_dropout == 0.1
        assert not model.training


LOST = {
    "whole": {"v_head.summary.weight": None, "v_head.summary.bias": None},
    "half": {"v_head.summary.bias": None},
    "another shape": {"v_head.summary.weight": torch.ones(2, 32)},
}


@pytest.mark.parametrize("how", LOST)
def test_a_package_without_its_head_is_refused(tiny_model, tmp_path, how):
    tiny_model.save_pretrained(tmp_path)
    weights = {**load_file(tmp_path / "model.safetensors"), **LOST[how]}
    weights = {name: weight for name, weight in weights.items() if weight is not None}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    for load, more in (
        (GPT2ValueModel.from_pretrained, {"ignore_mismatched_sizes": True}),
        (AutoModel.from_pretrained, {"ignore_mismatched_sizes": True, "trust_remote_code": True}),
    ):
        with pytest.raises(ValueError, match=re.escape("v_head.summary.") + ".*init_value_head=True"):
            load(tmp_path, **more)
        assert torch.equal(load(tmp_path, init_value_head=True, **more)(IDS).logits, tiny_model(IDS).logits)


def test_save_and_load_again_and_again_loses_nothing(tiny_model, tmp_path, transformers_log):
    expected, model = tiny_model(IDS), tiny_model
    for generation, auto in enumerate((AutoModel, AutoModelForCausalLM, AutoModel)):
        folder = tmp_path / f"{min(generation, 1)}"  # the last is saved over the one that it was loaded from
        model.save_pretrained(folder)
        assert json.loads((folder / "config.json").read_text())["auto_map"] == AUTO_MAP
        topics = ("configuration", "decoding", "generation", "modeling", "sampling", "scoring")
        assert {path.name for path in folder.glob("*.py")} == {f"{topic}_gpt2_value.py" for topic in topics}
        model, info = auto.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert type(model).__module__.startswith("transformers_modules")
        assert torch.equal(model(IDS).logits, expected.logits)
        assert_close(model(IDS).value, expected.value, 1e-6)
    assert not transformers_log.records


# The config


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("summary_activation", "relu"),
        ("summary_use_proj", "yes"),
        ("num_labels", 2),
    ],
)
def test_a_bad_field_is_refused_by_name(field, value):
    with pytest.raises((ValueError, StrictDataclassFieldValidationError), match=field):
        GPT2ValueConfig(**{"n_head": 4, "n_embd": 32, field: value})


def test_a_rate_out_of_range_is_refused_by_torch():
    with pytest.raises(ValueError, match="between 0 and 1"):
        make_tiny_model(summary_last_dropout=-1.0)


def test_every_field_survives_save_and_load(tmp_path):
    fields = {"n_layer": 3, "n_ctx": 1024, "summary_activation": "tanh", "summary_last_dropout": 0.25}
    fields |= {"detach_value_head": True, "value_head_initializer_range": 0.1, "num_labels": 1}
    config = GPT2ValueConfig(**fields)
    config.auto_map = {"AutoConfig": "somebody/else--configuration_gpt2_value.GPT2ValueConfig"}
    config.save_pretrained(tmp_path)
    for loaded in (
        GPT2ValueConfig.from_pretrained(tmp_path),
        AutoConfig.from_pretrained(tmp_path, trust_remote_code=True),
    ):
        assert {name: getattr(loaded, name) for name in fields} == fields


def test_a_plain_gpt2_config_loses_only_what_says_which_class_it_is_for(tmp_path):
    fields = {"n_layer": 3, "resid_pdrop": 0.0, "task_specific_params": {"text-generation": {"do_sample": True}}}
    plain = GPT2Config(**fields)
    plain.save_pretrained(tmp_path)
    for config in (GPT2ValueConfig.from_pretrained(tmp_path), GPT2ValueConfig.from_gpt2(plain)):
        assert {name: getattr(config, name) for name in (*fields, "num_labels")} == {**fields, "num_labels": 1}


def test_what_this_model_cannot_be_is_refused_with_the_reason(tmp_path):
    with pytest.raises(ValueError, match="summary_type='attn'; expected one of"):
        GPT2ValueConfig(summary_type="attn")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="type 'llama'; expected 'gpt2' or 'gpt2_value'"):
        GPT2ValueConfig.from_pretrained(tmp_path)


# generate() and pipelines, which are transformers' own


MODES = {
    "sample": {"do_sample": True, "top_k": 20, "temperature": 0.8, "num_return_sequences": 2},
    "beams": {"num_beams": 3, "do_sample": False},
    "beam sample": {"num_beams": 2, "do_sample": True},
    "prompt lookup": {"do_sample": False, "prompt_lookup_num_tokens": 2},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
    "stop strings": {"do_sample": False, "stop_strings": ["A"]},
}


@pytest.mark.parametrize("mode", MODES)
def test_generate_gives_what_gpt2_gives(tiny_model, tiny_tokenizer, mode):
    prompts = IDS[:1]
    arguments = {"max_new_tokens": 8, "pad_token_id": 0, "attention_mask": torch.ones_like(prompts), **MODES[mode]}
    if mode == "stop strings":
        arguments["tokenizer"] = tiny_tokenizer
    outputs = []
    for model in (tiny_model, plain_twin(tiny_model)):
        torch.manual_seed(1)
        outputs.append(model.generate(prompts, **arguments))
    assert torch.equal(*outputs)


def test_generate_with_left_padding_a_streamer_or_a_draft_gives_what_the_prompt_alone_gives(tiny_model, tiny_tokenizer):
    arguments = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": 95}
    alone = tiny_model.generate(IDS, **arguments)
    ids, mask = padded(3)
    assert torch.equal(tiny_model.generate(ids, attention_mask=mask, **arguments)[:, 3:], alone)
    streamer = TextIteratorStreamer(tiny_tokenizer, skip_prompt=True)
    tiny_model.generate(IDS[:1], streamer=streamer, **arguments)
    assert "".join(streamer) == tiny_tokenizer.decode(alone[0, 6:])
    for draft in (plain_twin(tiny_model), make_tiny_model(seed=1)):
        assert torch.equal(tiny_model.generate(IDS[:1], assistant_model=draft, **arguments), alone[:1])


def test_pipelines_answer_as_gpt2(tiny_model, tiny_tokenizer, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    plain, *ours = (
        pipeline("text-generation", tokenizer=tiny_tokenizer, trust_remote_code=True, model=model)
        for model in (plain_twin(tiny_model), tiny_model, str(tmp_path))
    )
    for how in ({}, {"stop_sequence": "A"}):
        how = {"do_sample": False, "max_new_tokens": 5, **how}
        expected = plain("abc", **how)
        assert [each("abc", **how) for each in ours] == [expected] * 2


# The seed notebook's cells, in order


def test_the_cells_in_order(tiny_tokenizer, tmp_path):
    write_published_checkpoint(tmp_path / "plain")
    model, tokenizer = GPT2HeadWithValueModel.from_pretrained(tmp_path / "plain"), tiny_tokenizer
    input_txt = "I liked the movie Transformers!" + tokenizer.eos_token
    input_ids = tokenizer.encode(input_txt, add_special_tokens=True, return_tensors="pt")
    logits, _transformer_outputs, values = model(input_ids)
    tokens = input_ids.shape[1]
    assert logits.shape == (1, tokens, 96)
    assert values.shape == (1, tokens)
    assert [type(item).__name__ for item in model(input_ids, use_cache=False)] == ["Tensor", "Tensor"]

    queries = torch.cat([tokenizer.encode(text, return_tensors="pt") for text in ("My most", "My best")])
    responses = respond_to_batch(model, queries, txt_len=10)
    assert responses.shape == (2, 10)
    assert responses.dtype == torch.long
    greedy = model(queries[:1])[0][0, -1].argmax()
    for settings in ({"top_k": 1}, {"top_p": 1e-9}):
        assert (respond_to_batch(model, queries[:1].repeat(50, 1), txt_len=1, **settings) == greedy).all()

    model.save_pretrained(tmp_path / "package")
    assert torch.equal(GPT2HeadWithValueModel.from_pretrained(tmp_path / "package")(IDS)[0], model(IDS)[0])
