"""The tools that people train with: PEFT, transformers' Trainer and its continuous batching. What must not happen."""

import os
import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers
from conftest import make_tiny_model, plain_twin
from support.two_processes import start_two
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from generation_gpt2_value import rescore, rollout

peft = pytest.importorskip("peft")

RAGGED = [torch.tensor(prompt) for prompt in ([5, 17, 3], [80], [41, 9, 7, 2, 64], [33, 12])]


def lora(model, **fields):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True, **fields)
    return peft.get_peft_model(model, config)


# PEFT


def body_gradient(model, drawn):
    model.zero_grad()
    rescore(model, drawn).values.sum().backward()
    return sum(
        float(w.grad.abs().sum()) for name, w in model.named_parameters() if "lora" in name and w.grad is not None
    )


@pytest.mark.shows("PEFT", "a head in `modules_to_save` obeys `detach_value_head`")
def test_a_head_that_peft_copied_is_detached_and_attached_again():
    model = lora(make_tiny_model(), modules_to_save=["v_head"])
    drawn = rollout(model, RAGGED, max_new_tokens=4)
    assert body_gradient(model, drawn) > 0
    model.base_model.model.detach_value_head()
    assert body_gradient(model, drawn) == 0
    model(drawn.sequences).value.sum().backward()
    assert body_gradient(model, drawn) == 0
    model.base_model.model.attach_value_head()
    assert body_gradient(model, drawn) > 0


@pytest.mark.shows("PEFT", "LoRA: KL to its own base, without a second copy")
@pytest.mark.parametrize("fields", [{}, {"modules_to_save": ["v_head"]}], ids=["body", "body and head"])
def test_the_base_of_an_adapter_is_its_reference_without_a_second_copy(fields):
    model = lora(make_tiny_model(), **fields).train()
    drawn = rollout(model, RAGGED, max_new_tokens=6, top_k=20)
    scored = rescore(model, drawn, reference="disable_adapter")
    expected = rescore(model, drawn, reference=plain_twin(make_tiny_model()))
    assert scored.kl.mean() > 0.01
    torch.testing.assert_close(scored.kl, expected.kl, atol=1e-5, rtol=0)
    torch.testing.assert_close(scored.logprobs, drawn.logprobs, atol=1e-5, rtol=0)  # the adapter is on again
    scored.kl.mean().backward()
    assert model.base_model.model.transformer.h[0].attn.c_attn.lora_B["default"].weight.grad.abs().sum() > 0


def test_the_base_is_the_reference_also_where_the_output_layer_has_an_adapter():
    base = make_tiny_model(tie_word_embeddings=False)
    config = peft.LoraConfig(r=4, target_modules=["c_attn", "lm_head"], init_lora_weights=False)
    reference = plain_twin(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft on fan_in_fan_out, which it sets right
        model = peft.get_peft_model(base, config)
    drawn = rollout(model, RAGGED, max_new_tokens=6)
    expected = rescore(model, drawn, reference=reference).kl
    assert expected.mean() > 0.01
    torch.testing.assert_close(rescore(model, drawn, reference="disable_adapter").kl, expected, atol=1e-5, rtol=0)


@pytest.mark.shows("PEFT", "an adapted model is refused as its own reference")
def test_an_adapted_model_is_refused_as_its_own_reference():
    model = lora(make_tiny_model())
    drawn = rollout(model, RAGGED, max_new_tokens=4)
    for reference in (model, model.base_model.model):
        with pytest.raises(ValueError, match='pass reference="disable_adapter"'):
            rescore(model, drawn, reference=reference)
        with pytest.raises(ValueError, match='pass reference="disable_adapter"'):
            model.rescore(drawn, reference=reference)
    added = make_tiny_model()
    added.add_adapter(peft.LoraConfig(r=4, target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True))
    with pytest.raises(ValueError, match='pass reference="disable_adapter"'):
        rescore(added, drawn, reference=added)
    with model.disable_adapter(), pytest.raises(ValueError, match='pass reference="disable_adapter"'):
        rescore(model, drawn, reference=model)
    with pytest.raises(ValueError, match="expected a model, or"):
        rescore(model, drawn, reference="base")
    with pytest.raises(ValueError, match="with a PeftModel"):
        model.rescore(drawn, reference="disable_adapter")  # a method of the inner model, which knows no PeftModel
    with pytest.raises(ValueError, match="with a PeftModel"):
        rescore(make_tiny_model(), drawn, reference="disable_adapter")


@pytest.mark.shows("PEFT", "a frozen head of zeros is named")
def test_a_head_of_zeros_that_nothing_trains_is_named():
    model = lora(make_tiny_model(value_head_initializer_range=0.0))
    drawn = rollout(model, RAGGED, max_new_tokens=4)
    with pytest.warns(UserWarning, match=r'modules_to_save=\["v_head"\]'):
        rescore(model, drawn)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with torch.no_grad():
            rescore(model, drawn)
        rescore(lora(make_tiny_model(value_head_initializer_range=0.0), modules_to_save=["v_head"]), drawn)
        rescore(lora(make_tiny_model()), drawn)  # a head that has learnt may be frozen
        without_adapter = make_tiny_model(value_head_initializer_range=0.0)
        without_adapter.v_head.requires_grad_(False)  # as for a trainer that has no use for values
        rescore(without_adapter, drawn)


@pytest.mark.shows("PEFT", "prefix and prompt tuning are refused by name")
@pytest.mark.parametrize("kind", ["PrefixTuningConfig", "PromptTuningConfig"])
def test_virtual_tokens_are_refused_by_name(kind):
    config = getattr(peft, kind)(num_virtual_tokens=3, task_type="CAUSAL_LM")
    model = peft.get_peft_model(make_tiny_model(), config)
    with pytest.raises(TypeError, match=f"the virtual tokens of a {kind}"):
        rollout(model, RAGGED, max_new_tokens=4)


# Trainer


class Texts(Dataset):
    """Rows of tokens in which each token is followed by the next number: easy to learn, and not by copying."""

    def __len__(self):
        return 64

    def __getitem__(self, row):
        tokens = (torch.arange(16) + 7 * row) % 90
        return {"input_ids": tokens, "labels": tokens.clone()}


def trained(model, folder, **fields):
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
        seed=0,
        **{"max_steps": 3, **fields},
    )
    trainer = Trainer(model, arguments, train_dataset=Texts(), eval_dataset=Texts())
    return trainer, trainer.train().training_loss


def plain_model():
    """GPT2LMHeadModel; told that its loss shifts, else Trainer divides by one token too many in each row."""
    model = plain_twin(model_without_dropout())
    model.loss_type = "ForCausalLM"
    return model


def model_without_dropout():
    """The head's dropout draws random numbers too, which would change those of the body's."""
    return make_tiny_model(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, summary_first_dropout=0.0)


@pytest.mark.shows("Trainer", "label smoothing: losses and weights of such a `GPT2LMHeadModel`")
def test_label_smoothing_does_not_teach_the_model_to_copy_its_input(tmp_path):
    """Trainer shifts the labels itself there, for the models that it takes for language models."""
    ours, plain = model_without_dropout(), plain_model()
    _, loss = trained(ours, tmp_path / "ours", label_smoothing_factor=0.1)
    _, expected = trained(plain, tmp_path / "plain", label_smoothing_factor=0.1)
    assert loss == pytest.approx(expected, abs=1e-6)
    for name, weight in plain.named_parameters():
        torch.testing.assert_close(ours.state_dict()[name], weight, atol=1e-6, rtol=0)


def test_label_smoothing_shifts_for_an_adapter_and_for_the_seed_s_class(tmp_path):
    from modeling_gpt2_value import GPT2HeadWithValueModel

    seed = GPT2HeadWithValueModel(model_without_dropout().config)
    seed.load_state_dict(model_without_dropout().state_dict())
    _, expected = trained(plain_model(), tmp_path / "plain", label_smoothing_factor=0.1, max_steps=1)
    _, adapted = trained(lora(model_without_dropout()), tmp_path / "adapted", label_smoothing_factor=0.1, max_steps=1)
    _, base = trained(lora(plain_model()), tmp_path / "base", label_smoothing_factor=0.1, max_steps=1)
    assert adapted == pytest.approx(base, abs=1e-6)
    _, loss = trained(seed, tmp_path / "seed", label_smoothing_factor=0.1, max_steps=1)
    assert loss == pytest.approx(expected, abs=1e-6)


@pytest.mark.shows("Trainer", "`compute_metrics` gets the logits alone")
def test_compute_metrics_gets_the_logits_alone(tmp_path):
    found = {}

    def metrics(prediction):
        found["predictions"] = prediction.predictions
        return {}

    trainer, _ = trained(make_tiny_model(), tmp_path, max_steps=1)
    trainer.compute_metrics = metrics
    trainer.evaluate()
    assert isinstance(found["predictions"], np.ndarray)
    assert found["predictions"].shape == (64, 16, 96)


def train_in_two_processes(rank, folder, checkpointing):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model = make_tiny_model()
    trained(model, folder / f"{rank}", gradient_checkpointing=checkpointing, ddp_backend="gloo", max_steps=3)
    torch.save(model.state_dict(), folder / f"{rank}.pt")
    dist.barrier()
    os._exit(0)  # gloo's destructors wait for a peer that may be gone


@pytest.mark.shows("Trainer", "two processes, with gradient checkpointing")
@pytest.mark.timeout(120)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer_goes_on_in_two_processes_though_the_loss_does_not_use_the_head(tmp_path, checkpointing):
    start_two(train_in_two_processes, tmp_path, checkpointing)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["transformer.wte.weight"], make_tiny_model().transformer.wte.weight)


# Continuous batching


@pytest.mark.skipif(transformers.__version__ < "5", reason="transformers 4.57 batches so on a GPU only")
@pytest.mark.shows("transformers", "`generate_batch`: the tokens of `generate()`")
def test_generate_batch_answers_as_generate_does():
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model = make_tiny_model()
    config = GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=-1, pad_token_id=0)
    small = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)  # by default its cache fills the memory
    prompts = [prompt.tolist() for prompt in RAGGED]
    answers = model.generate_batch(prompts, generation_config=config, continuous_batching_config=small)
    found = [answer.generated_tokens for _, answer in sorted(answers.items())]
    expected = [
        model.generate(prompt[None], max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None)[
            0, len(prompt) :
        ].tolist()
        for prompt in RAGGED
    ]
    assert sorted(found) == sorted(expected)
