"""In one environment, without the checkout: load packages and measure them.

    python measure.py [--peft LIBRARIES] PACKAGE...    # JSON: name of the package -> measurements

With `--peft` a LoRA adapter is measured, by the PEFT in that folder.
"""

import argparse
import json
import sys
import warnings
from pathlib import Path

import torch
from transformers import AutoModel, AutoModelForCausalLM

torch.set_num_threads(1)  # in make.py, too: sums in another order differ by 1e-6
IDS = torch.arange(24).view(2, 12) * 11 % 300
MASK = torch.ones_like(IDS).index_put((torch.tensor([1] * 5), torch.arange(5)), torch.tensor(0))


def as_json(tokens, *tensors):
    """`tokens`, which must be equal everywhere, and `numbers`, which may differ a little."""
    return {
        "tokens": [each.tolist() for each in tokens],
        "numbers": [number for tensor in tensors for number in tensor.flatten().tolist()],
    }


def draw(model):
    settings = {"max_new_tokens": 16, "top_p": 0.9, "temperature": 0.8, "eos_token_id": [1, 2, 3]}
    return model.rollout(IDS, attention_mask=MASK, generator=torch.Generator().manual_seed(0), **settings)


def measurements(model):
    """Logits, values, rollout, rescored rollout, greedy generation."""
    output, drawn = model(IDS, attention_mask=MASK), draw(model)
    greedy = model.generate(IDS, attention_mask=MASK, max_new_tokens=12, do_sample=False, pad_token_id=0)
    seen = output.logits[MASK.bool()], output.value[MASK.bool()]
    return as_json((drawn.responses, greedy), *seen, drawn.logprobs, model.rescore(drawn).logprobs)


def adapted(package):
    """An adapted model: what it draws, how that is scored, also against its own base, and the gradients."""
    import peft

    model = AutoModelForCausalLM.from_pretrained(package, trust_remote_code=True)
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
    drawn = draw(model)
    scored = rescore(model, drawn, reference="disable_adapter", with_entropy=True)
    (scored.kl.mean() - scored.logprobs.mean() + scored.values.pow(2).mean()).backward()
    gradients = [weight.grad.norm() for weight in model.parameters() if weight.requires_grad]
    scores = scored.logprobs, scored.values, scored.entropy, scored.kl
    return as_json([drawn.responses], drawn.logprobs, *scores, *gradients)


def measured(package):
    model, info = AutoModel.from_pretrained(package, trust_remote_code=True, output_loading_info=True)
    if info["missing_keys"] or info["unexpected_keys"]:
        raise SystemExit(f"{package} did not load whole: {info}")
    return measurements(model)


def main():
    warnings.simplefilter("error", FutureWarning)
    warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)  # PEFT's own call
    parser = argparse.ArgumentParser()
    parser.add_argument("--peft")
    parser.add_argument("packages", type=Path, nargs="+")
    given = parser.parse_args()
    if given.peft:
        sys.path.append(given.peft)  # an isolated interpreter reads no PYTHONPATH
    measure = adapted if given.peft else measured
    print(json.dumps({package.name: measure(package) for package in given.packages}))


if __name__ == "__main__":
    main()
