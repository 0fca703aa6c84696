"""Draw, score, learn and save with any number of processes: the same lines for one, DistributedDataParallel and FSDP2.

    accelerate launch --config_file examples/accelerate/fsdp2.yaml examples/many_gpus.py --out runs/many

REINFORCE with the value head as its baseline, in as few lines as show which call belongs where. The
whole algorithm is gpt2_value/ppo.py.
"""

from pathlib import Path

import torch
import typer
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.distributed.fsdp import FSDPModule

from hub_tools import save_package
from modeling_gpt2_value import GPT2ValueConfig, GPT2ValueModel, rescore, rollout


def main(out: Path = Path("runs/many"), base: str = "", steps: int = 3, rows: int = 8, new_tokens: int = 16) -> None:
    """Train for a few steps, and write a package.

    Args:
        base: a GPT-2 checkpoint or a package; without one, a small model with random weights.
        rows: responses of each process at each step.
    """
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    set_seed(0)  # the same weights in all processes
    small = GPT2ValueConfig(
        n_layer=2, n_embd=64, n_head=4, vocab_size=256, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    model = GPT2ValueModel.from_pretrained(base) if base else GPT2ValueModel(small)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    set_seed(1, device_specific=True)  # other draws in each
    prompts = torch.randint(1, 200, (rows, 4))
    for step in range(steps):
        # The prepared model itself, not the one inside, in all processes. Under FSDP2 they return together.
        drawn = rollout(model, prompts, max_new_tokens=new_tokens, eos_token_id=0)
        mask = drawn.response_mask
        reward = ((drawn.responses % 2 == 0) & mask).sum(1) / mask.sum(1)  # the share of even ids
        scored = rescore(model, drawn)
        advantage = (reward[:, None] - drawn.values)[mask]
        of_policy = -(scored.logprobs[mask] * advantage).mean()
        of_values = (scored.values - reward[:, None])[mask].pow(2).mean()
        accelerator.backward(of_policy + 0.5 * of_values)
        optimizer.step()
        optimizer.zero_grad()
        accelerator.print(f"step {step}: reward {accelerator.gather(reward).mean():.3f}")
    # Each process holds a part of a model that FSDP2 shards: all of them save it. Else each holds all: one saves it.
    if isinstance(model, FSDPModule) or accelerator.is_main_process:
        save_package(accelerator.unwrap_model(model), out)
    # DistributedDataParallel, if it is the last to hold the process group, waits while holding Python's lock for a
    # thread that needs the lock (torch 2.13). So it goes first.
    model, optimizer = accelerator.free_memory(model, optimizer)
    accelerator.end_training()


if __name__ == "__main__":
    typer.run(main)
