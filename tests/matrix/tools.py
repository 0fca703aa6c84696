"""In one environment, without the checkout: a package under PEFT and in Trainer, whose libraries lie in a folder.

    python tools.py LIBRARIES PACKAGE

prints the numbers of a LoRA adapter (which must be the same in every environment), and the largest difference between
Trainer's steps on the package and on a `GPT2LMHeadModel` of the same weights (which must be 0 in each).
"""

import json
import sys
import tempfile
import warnings

sys.path.append(sys.argv[1])  # an isolated interpreter reads no PYTHONPATH

import peft
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
from transformers.utils import logging

PROMPTS = [torch.tensor(prompt) for prompt in ([5, 17, 3], [80], [41, 9, 7, 2, 64], [33, 12])]


def load(package):
    model = AutoModelForCausalLM.from_pretrained(package, trust_remote_code=True)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # a plain GPT-2 draws other random numbers, having no head
    return model


def adapted(package):
    """Numbers of an adapted model: what it draws, how that is scored, against its own base, and the gradients."""
    model = load(package)
    rescore = sys.modules[type(model).__module__].rescore
    config = peft.LoraConfig(
        r=4, target_modules=["c_attn"], fan_in_fan_out=True, lora_dropout=0.1, modules_to_save=["v_head"]
    )
    model = peft.get_peft_model(model, config).train()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.empty_like(weight).normal_(std=0.2, generator=generator))
    drawn = model.rollout(PROMPTS, max_new_tokens=12, top_k=20, temperature=0.8, generator=generator)
    scored = rescore(model, drawn, reference="disable_adapter", with_entropy=True)
    (scored.kl.mean() - scored.logprobs.mean() + scored.values.pow(2).mean()).backward()
    gradients = [float(w.grad.norm()) for name, w in model.named_parameters() if w.requires_grad]
    return {
        "drawn": drawn.responses.tolist(),
        "logprobs": drawn.logprobs.flatten().tolist(),
        "rescored": scored.logprobs.flatten().tolist(),
        "values": scored.values.flatten().tolist(),
        "kl": scored.kl.flatten().tolist(),
        "entropy": scored.entropy.flatten().tolist(),
        "gradients": gradients,
    }


def plain(package):
    """A `GPT2LMHeadModel` of the package's body."""
    model = load(package)
    fields = {name: value for name, value in model.config.to_dict().items() if name in GPT2Config().to_dict()}
    for name in ("model_type", "architectures", "auto_map"):
        fields.pop(name, None)
    twin = GPT2LMHeadModel(GPT2Config(**fields | dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)))
    twin.load_state_dict({name: w for name, w in model.state_dict().items() if not name.startswith("v_head.")})
    twin.loss_type = "ForCausalLM"  # else Trainer divides by one token too many in each row
    return twin


def losses(model, smoothing):
    """The loss of each of four steps."""
    rows = [(torch.arange(16) + 7 * row) % 90 for row in range(32)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=8,
            max_steps=4,
            learning_rate=1e-3,
            label_smoothing_factor=smoothing,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            seed=0,
        )
        trainer = Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row.clone()} for row in rows])
        trainer.train()
    return [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


def trained(package):
    found = {}
    for smoothing in (0.0, 0.1):
        ours, theirs = load(package), plain(package)
        of_ours, of_theirs = losses(ours, smoothing), losses(theirs, smoothing)
        weights = [(ours.get_parameter(name) - w).abs().max() for name, w in theirs.named_parameters()]
        found[f"losses, smoothing {smoothing}"] = of_ours
        found[f"difference of losses, smoothing {smoothing}"] = max(
            abs(a - b) for a, b in zip(of_ours, of_theirs, strict=True)
        )
        found[f"difference of weights, smoothing {smoothing}"] = float(max(weights))
    return found


if __name__ == "__main__":
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    warnings.simplefilter("error", FutureWarning)
    warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)  # PEFT's own call
    print(json.dumps({"PEFT": adapted(sys.argv[2]), "Trainer": trained(sys.argv[2]), "version": peft.__version__}))
