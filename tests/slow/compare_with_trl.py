"""Do converted checkpoints give the numbers that TRL itself gave? Two steps, in two environments.

    TRL-PYTHON tests/slow/compare_with_trl.py write FOLDER     with TRL 1.12.0 (the last with the head) and peft
    python tests/slow/compare_with_trl.py compare FOLDER       with this package and peft

The first writes checkpoints with TRL itself, in every layout that it leaves behind, and what TRL computes
with them; the second converts each one, compares, and prints a table. pytest does not collect this file: it
needs an environment that this project does not ask for. `make compare-trl` makes it and runs both.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from trl_steps import run_step

CASES = "cases.json"
NUMBERS = "numbers.safetensors"
SEED = 11
# Body dropout is off, so that training mode shows the head's dropout alone.
SIZES = {
    "n_layer": 3,
    "n_embd": 48,
    "n_head": 4,
    "vocab_size": 97,
    "n_positions": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
# Largest differences allowed, as shares of the largest number. The same operations on the same numbers
# differ by nothing; in bfloat16 (8 bits) TRL rounds once more, after the head's dropout; a merged LoRA's
# product is added at another place, which three layers of large weights amplify, and in bfloat16 the weights
# round the sum.
EXACT, ROUNDED, MERGED, MERGED_BFLOAT16 = 1e-6, 5e-3, 1e-4, 1e-1


def write(folder: Path) -> None:
    """Checkpoints by TRL, each with the logits and values that TRL computed."""
    import peft
    import transformers
    from trl.experimental.ppo import AutoModelForCausalLMWithValueHead as WithValueHead

    torch.manual_seed(SEED)
    base = transformers.GPT2LMHeadModel(transformers.GPT2Config(**SIZES))
    with torch.no_grad():
        for weight in base.parameters():
            if weight.dim() == 2:
                weight.mul_(5)
    base.save_pretrained(folder / "base")

    def wrap(**kwargs):
        model = WithValueHead.from_pretrained(str(folder / "base"), v_head_init_strategy="normal", **kwargs)
        with torch.no_grad():  # as after training: nothing is at its initial value
            for name, weight in model.named_parameters():
                if "v_head" in name or "lora_" in name:
                    weight.add_(0.2 * torch.randn_like(weight))
        return model

    def save_pretrained(model, case, **kwargs):
        model.save_pretrained(str(case), **kwargs)

    def wrapper_pickled(model, case):  # what DeepSpeed and FSDP gather: the wrapper's own names
        torch.save(nn.Module.state_dict(model), case / "pytorch_model.bin")
        model.pretrained_model.config.save_pretrained(case)

    def as_pushed(model, case):  # what its push_to_hub does before it uploads
        model.pretrained_model.v_head = model.v_head
        model.pretrained_model.save_pretrained(case)

    def lora(**kwargs):
        modules = ["c_attn", "c_fc", "c_proj"]
        return peft.LoraConfig(r=4, lora_alpha=16, target_modules=modules, task_type="CAUSAL_LM", **kwargs)

    bf16 = {"dtype": torch.bfloat16}
    plans = [
        ("save_pretrained", {}, save_pretrained, EXACT),
        ("save_pretrained, shards", {}, lambda m, c: save_pretrained(m, c, max_shard_size="100KB"), EXACT),
        ("save_pretrained, bfloat16", bf16, save_pretrained, ROUNDED),
        ("summary_dropout_prob=0.4", {"summary_dropout_prob": 0.4}, save_pretrained, EXACT),
        ("push_to_hub", {}, as_pushed, EXACT),
        ("pretrained_model., pickle", {}, wrapper_pickled, EXACT),
        ("LoRA", {"peft_config": lora()}, save_pretrained, MERGED),
        ("DoRA", {"peft_config": lora(use_dora=True)}, save_pretrained, MERGED),
        ("LoRA, bfloat16", {"peft_config": lora(), **bf16}, save_pretrained, MERGED_BFLOAT16),
    ]
    cases = []
    for number, (name, kwargs, save, bound) in enumerate(plans):
        case = folder / f"case-{number:02d}"
        case.mkdir()
        model = wrap(**kwargs)
        numbers = measure(model)
        save(model, case)
        save_file(numbers, folder / f"{case.name}-{NUMBERS}")
        dropout = kwargs.get("summary_dropout_prob")
        options = {} if dropout is None else {"summary_first_dropout": dropout}
        cases.append({"name": name, "folder": case.name, "options": options, "bound": bound})
    (folder / CASES).write_text(json.dumps(cases))


def measure(model: nn.Module) -> dict[str, torch.Tensor]:
    """float32 `logits`, `value` and `training_value` (dropout from a fixed seed), a row per token."""
    input_ids = torch.randint(SIZES["vocab_size"], (4, 24), generator=torch.Generator().manual_seed(SEED))
    lengths = torch.tensor([[24], [21], [15], [7]])  # padded on the right: on the left TRL counts padding as positions
    real = torch.arange(24) < lengths
    found = {}
    for mode in ("training_value", "value"):
        model.train(mode == "training_value")
        torch.manual_seed(SEED)
        with torch.no_grad():
            output = model(input_ids=input_ids, attention_mask=real.long())
        logits, value = (output[0], output[2]) if isinstance(output, tuple) else (output.logits, output.value)
        found |= {mode: value[real].float(), "logits": logits[real].float()}
    return found


def compare(folder: Path) -> int:
    """Convert every checkpoint and print how far it is from TRL: the largest difference, as a share of
    TRL's largest number. Returns how many checkpoints are too far."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from hub_tools import convert_checkpoint
    from modeling_gpt2_value import GPT2ValueModel

    print("| checkpoint | read as | logits | value | value, training mode | bound |\n|---|---|---|---|---|---|")
    failed = 0
    cases = json.loads((folder / CASES).read_text())
    for case in cases:
        record = convert_checkpoint(folder / case["folder"], folder / f"{case['folder']}-package", **case["options"])
        model = GPT2ValueModel.from_pretrained(record.package.folder, dtype="auto")
        theirs, ours = load_file(folder / f"{case['folder']}-{NUMBERS}"), measure(model)
        gaps = [
            ((ours[name] - theirs[name]).abs().max() / theirs[name].abs().max()).item()
            for name in ("logits", "value", "training_value")
        ]
        failed += not max(gaps) <= case["bound"]
        cells = [case["name"], record.source_format, *(f"{gap:.1e}" for gap in gaps), f"{case['bound']:.0e}"]
        print(f"| {' | '.join(cells)} |")
    print(f"\n{failed} of {len(cases)} are too far" if failed else "\nall within their bounds")
    return failed


if __name__ == "__main__":
    sys.exit(run_step(__doc__, write=write, compare=compare))
