"""The configurations in examples/accelerate: accelerate reads, launches and shards by them, and the numbers stay.

Without a GPU accelerate's launcher starts gloo processes, and its Accelerator then leaves the FSDP2 settings alone. So
the sharding by accelerate's own code is tested in processes that are told to do it.
"""

import copy
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from conftest import make_tiny_model
from support.two_processes import free_port, in_two_processes
from torch.distributed.fsdp import FSDPModule

from generation_gpt2_value import rescore, rollout
from hub_tools import save_package, verify_package

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "examples" / "accelerate").glob("*.yaml"))
KINDS = {"ddp": DistributedType.MULTI_GPU, "fsdp2": DistributedType.FSDP, "two-machines": DistributedType.MULTI_GPU}
PAGE = (ROOT / "docs" / "many-gpus.md").read_text(encoding="utf-8")
LINES = re.findall(r"^accelerate launch .*", PAGE, re.MULTILINE)
PROMPTS = [torch.tensor(prompt) for prompt in ([5, 17, 3], [80], [41, 9, 7, 2, 64], [33, 12])]

pytestmark = pytest.mark.timeout(240)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_each_configuration(path):
    config = load_config_from_file(str(path))
    assert config.distributed_type == KINDS[path.stem]
    assert config.num_processes == 8 * config.num_machines
    options = vars(launch_command_parser().parse_args(["script.py"]))
    fields = yaml.safe_load(path.read_text(encoding="utf-8")).get("fsdp_config", {})
    assert set(fields) <= set(options)  # accelerate hands unknown ones on without a word


def config_in(line):
    return re.search(r"accelerate/(.*)\.yaml", line)[1]


def launch(line, out, *options):
    """Start a line of the page with some of its options replaced, and few steps."""
    _, _, *arguments = shlex.split(line)
    script = arguments.index("examples/many_gpus.py")
    own = ["--out", str(out), "--steps", "1", "--rows", "2"]
    arguments = [*arguments[:script], *options, arguments[script], *own]
    command = [sys.executable, "-m", "accelerate.commands.launch", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def output_of(process):
    """What it printed, once it has succeeded."""
    try:
        output = process.communicate(timeout=200)[0].decode()
    finally:
        process.terminate()
    assert process.returncode == 0, output
    return output


@pytest.mark.parametrize("line", [line for line in LINES if "--machine_rank" not in line], ids=config_in)
def test_one_machine_starts_its_processes_and_saves_one_package(line, tmp_path):
    process = launch(line, tmp_path / "package", "--num_processes", "2", "--main_process_port", str(free_port()))
    assert output_of(process).count("step 0: reward") == 1
    assert verify_package(tmp_path / "package")


@pytest.mark.parametrize("line", [line for line in LINES if "--machine_rank 0" in line], ids=config_in)
def test_two_machines_find_each_other(line, tmp_path):
    """Two launchers, each of which starts one process of the two."""
    assert line.replace("--machine_rank 0", "--machine_rank 1") in LINES
    where = ["--num_processes", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port())]
    machines = [launch(line, tmp_path / str(rank), *where, "--machine_rank", str(rank)) for rank in (0, 1)]
    for machine in machines:
        output_of(machine)
    assert (tmp_path / "0").is_dir()
    assert not (tmp_path / "1").exists()


def combined_loss(model, drawn, advantages):
    """PPO's clipped policy loss and the value loss, summed over these rows."""
    scored, mask = rescore(model, drawn), drawn.response_mask
    ratio = (scored.logprobs - drawn.logprobs).exp()
    of_policy = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    return (of_policy + 0.5 * (scored.values - drawn.values - advantages).pow(2))[mask].sum()


def shard_by_accelerate(rank, folder):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    arguments = ["--config_file", str(ROOT / "examples/accelerate/fsdp2.yaml"), "script.py"]
    settings, *_ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    environment = prepare_multi_gpu_env(settings)
    os.environ.update({name: value for name, value in environment.items() if name.startswith("FSDP_")})
    accelerator = Accelerator(cpu=True)
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
    accelerator.state.distributed_type = DistributedType.FSDP
    whole = make_tiny_model()
    model = copy.deepcopy(whole)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert isinstance(model, FSDPModule)
    assert all(isinstance(block, FSDPModule) for block in model.transformer.h)

    everything = rollout(whole, PROMPTS, max_new_tokens=9, generator=torch.Generator().manual_seed(0))
    advantages = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    rows = slice(2 * rank, 2 * rank + 2)
    combined_loss(whole, everything, advantages).backward()
    accelerator.backward(combined_loss(model, everything[rows], advantages[rows]))  # before any forward pass
    for (name, part), alone in zip(model.named_parameters(), whole.parameters(), strict=True):
        # FSDP2 takes the mean of both processes' sums.
        torch.testing.assert_close(2 * part.grad.full_tensor(), alone.grad, atol=1e-5, rtol=1e-5, msg=name)
    optimizer.step()
    optimizer.zero_grad()

    settings = {"max_new_tokens": 20, "eos_token_id": [*range(1 + 40 * rank)]}
    drawn = rollout(model, PROMPTS[rows], generator=torch.Generator().manual_seed(rank), **settings)
    torch.testing.assert_close(rescore(model, drawn).logprobs, drawn.logprobs, atol=1e-5, rtol=0)
    save_package(accelerator.unwrap_model(model), folder / "package")
    loaded = type(whole).from_pretrained(folder / "package")
    torch.testing.assert_close(rescore(loaded, drawn).logprobs, drawn.logprobs, atol=1e-5, rtol=0)


def test_a_model_that_accelerate_shards_has_the_gradients_of_one_process_and_is_saved(tmp_path):
    in_two_processes(shard_by_accelerate, tmp_path)
    assert verify_package(tmp_path / "package")
