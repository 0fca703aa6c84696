"""DistributedDataParallel, FSDP2, Trainer and Accelerate in two processes: sampled, scored, trained and saved as one.

One pair of processes runs all checks in turn; each test asks whether its own was passed.
"""

import copy
import itertools
import os
import subprocess
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import yaml
from conftest import make_tiny_model
from slow.fault_sweep import serving, talking_to
from support.forks import Forked
from support.settings import RAGGED, SETTINGS, assert_as_drawn, assert_close, seeded
from support.two_processes import LAYOUTS, in_two_processes, sharded
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import ProcessException
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from gpt2_value import rescore, rollout
from hub_tools import CheckpointPusher, CheckpointPusherCallback, push_to_hub, save_package, verify_package
from hub_tools.errors import FolderRefusedError, OptionsError, SaveFailedError, UnsavableModelError
from hub_tools.package import sharded as sharded_saves

ROOT = Path(__file__).parent.parent
CHECKS = []
pytestmark = pytest.mark.timeout(240)


def check(function):
    """A function of (rank, folder, url and token of the server) that both processes run at the same time."""
    CHECKS.append(function)
    return function


def run_all(rank, folder, server):
    for each in CHECKS:
        (folder / each.__name__).mkdir(exist_ok=True)
        each(rank, folder / each.__name__, server)
        (folder / f"{each.__name__}-{rank}").touch()
        dist.barrier()


@pytest.fixture(scope="module")
def passed(tmp_path_factory):
    """The folder in which each check has left a file for each process, and why the last one that began failed."""
    folder, why = tmp_path_factory.mktemp("pair"), None
    with serving() as hub:
        try:
            in_two_processes(run_all, folder, (hub.url, hub.token))
        except ProcessException as error:
            why = error
        yield folder, why, hub


def make_policy(**fields):
    return make_tiny_model(n_layer=3, n_embd=64, vocab_size=300, **fields)


def mine(rank, rows=RAGGED):
    return rows[2 * rank : 2 * rank + 2]


def gradients_of(model, loss):
    """The whole gradient of each weight; zeros where there is none."""
    loss.backward()
    gradients = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in model.parameters()]
    return [each.full_tensor() if isinstance(each, DTensor) else each for each in gradients]


# Sampling and learning


@check
def gradients_are_the_mean_of_what_each_has_alone(rank, folder, server):
    for kind, (number, settings) in itertools.product((DistributedDataParallel, sharded), enumerate(SETTINGS[-2:])):
        plain = make_policy(resid_pdrop=0.3).train(number == 0)
        wrapped = kind(copy.deepcopy(plain))
        drawn = rollout(plain, mine(rank), max_new_tokens=8, generator=seeded(rank), **settings)
        gradients = []
        for model in (wrapped, plain):  # the wrapped one scores before any forward pass
            scored = rescore(model, drawn, with_entropy=True, reference=model)
            assert_as_drawn(scored, drawn)
            assert scored.kl.abs().max() < 1e-5
            gradients.append(gradients_of(model, scored.logprobs.sum() + 0.3 * scored.values.pow(2).sum()))
        for found, alone in zip(*gradients, strict=True):
            dist.all_reduce(alone)
            torch.testing.assert_close(found, alone / 2, atol=1e-5, rtol=1e-4)
        drawn = rollout(wrapped, mine(rank), max_new_tokens=4, eos_token_id=None)
        assert_as_drawn(rescore(plain, drawn), drawn)


# How many ids end a text, of process 0 and of process 1.
UNEQUAL = [(1, 120), (300, 1), (40, 80), (200, 1)]


@check
def rows_that_end_at_different_times_do_not_stop_the_other_process(rank, folder, server):
    for number, (layout, ends) in enumerate(zip([*LAYOUTS, "blocks"], UNEQUAL, strict=True)):
        plain = make_policy(resid_pdrop=0.3).train(number % 2 == 0)
        settings = {"max_new_tokens": 30, "eos_token_id": [*range(ends[rank])], "top_k": 40}
        drawn, expected = (
            rollout(each, mine(rank), generator=seeded(rank), **settings) for each in (sharded(plain, layout), plain)
        )
        assert torch.equal(drawn.sequences, expected.sequences)
        assert_as_drawn(drawn, expected)
        steps = [torch.zeros((), dtype=torch.long) for _ in range(2)]
        dist.all_gather(steps, drawn.response_mask.any(0).sum())
        assert steps[0] != steps[1]  # else nothing was tested


@check
def in_bfloat16_the_mean_importance_ratio_is_1(rank, folder, server):
    plain = make_policy(resid_pdrop=0.3).train()
    model = sharded(plain, "accelerate", mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    settings = {"max_new_tokens": 24, "eos_token_id": [*range(1 + 30 * rank)], "num_return_sequences": 32}
    drawn = rollout(model, RAGGED, generator=seeded(rank), top_p=0.9, **settings)
    scored = rescore(model, drawn, reference=plain)
    ratios = (scored.logprobs - drawn.logprobs)[drawn.response_mask].double().exp()
    assert abs(ratios.mean() - 1) < 5 * ratios.std() / len(ratios) ** 0.5 + 1e-5
    assert scored.values.dtype == drawn.values.dtype == torch.float32
    assert scored.kl.min() > -1e-4
    assert all(each.isfinite().all() for each in gradients_of(model, scored.logprobs.sum() + scored.values.sum()))


@check
def an_adapter_whose_wrapper_is_sharded_too(rank, folder, server):
    from peft import LoraConfig, get_peft_model

    fields = {"modules_to_save": ["v_head"], "init_lora_weights": False, "fan_in_fan_out": True}
    torch.manual_seed(0)
    model = get_peft_model(make_policy(), LoraConfig(target_modules=["c_attn"], **fields))
    alone = copy.deepcopy(model)
    for block in model.get_base_model().transformer.h:
        fully_shard(block)
    fully_shard(model)
    drawn = rollout(model, RAGGED, generator=seeded(rank), max_new_tokens=20, eos_token_id=[*range(1 + 120 * rank)])
    scored, expected = (rescore(each, drawn, reference="disable_adapter") for each in (model, alone))
    assert_as_drawn(expected, drawn)
    assert_as_drawn(scored, drawn)
    assert_close(scored.kl, expected.kl)
    assert scored.kl.max() > 0.01


@check
def fsdp1_is_refused_by_name(rank, folder, server):
    model = FullyShardedDataParallel(make_policy(), device_id=torch.device("cpu"), use_orig_params=True)
    drawn = rollout(make_policy(), RAGGED, max_new_tokens=2)
    for call in (lambda: rollout(model, RAGGED), lambda: rescore(model, drawn)):
        with pytest.raises(TypeError, match="got a FullyShardedDataParallel: use DistributedDataParallel or FSDP2"):
            call()
    with pytest.raises(UnsavableModelError, match="FullyShardedDataParallel"):
        save_package(model, folder / "package")


@check
def a_loss_without_the_value_head_learns_where_ddp_is_told(rank, folder, server):
    model = make_policy()
    drawn = rollout(model, RAGGED, max_new_tokens=6, generator=seeded())
    frozen, untold = make_policy(), DistributedDataParallel(make_policy())
    frozen.v_head.requires_grad_(False)
    expected = gradients_of(alone := make_policy(), rescore(alone, drawn).logprobs.sum())
    for wrapped in (
        DistributedDataParallel(make_policy(), find_unused_parameters=True),
        DistributedDataParallel(copy.deepcopy(frozen)),
        DistributedDataParallel(torch.compile(frozen, backend="eager"), static_graph=True),
        sharded(model, "accelerate"),
    ):
        for _ in range(2):  # what was not told, DistributedDataParallel notices at the second step
            wrapped.zero_grad()
            # Another call may come before the backward pass.
            scored, _ = rescore(wrapped, mine(rank, drawn)), rescore(wrapped, drawn)
            found = gradients_of(wrapped, scored.logprobs.sum())
        torch.testing.assert_close([2 * each for each in found], expected, atol=1e-5, rtol=1e-5)
    rescore(untold, mine(rank, drawn)).logprobs.sum().backward()
    with pytest.raises(RuntimeError, match="find_unused_parameters"):
        rescore(untold, mine(rank, drawn))


# Libraries that train


@check
def trainer_goes_on_though_the_loss_does_not_use_the_head(rank, folder, server):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    rows = [(torch.arange(16) + 7 * row) % 90 for row in range(64)]
    model = make_tiny_model()
    fields = {"gradient_checkpointing": True, "ddp_backend": "gloo", "max_steps": 3, "report_to": []}
    arguments = TrainingArguments(folder / f"{rank}", save_strategy="no", use_cpu=True, disable_tqdm=True, **fields)
    Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row.clone()} for row in rows]).train()
    weight = model.transformer.wte.weight.detach().clone()
    assert not torch.equal(weight, make_tiny_model().transformer.wte.weight)
    dist.broadcast(weight, 0)
    assert torch.equal(weight, model.transformer.wte.weight)


@check
def what_accelerate_shards_is_sampled_scored_trained_and_saved(rank, folder, server):
    """By its own code and our configuration; without a GPU its launcher would leave the FSDP2 settings alone."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    AcceleratorState._reset_state(reset_partial_state=True)
    fields = yaml.safe_load((ROOT / "examples/accelerate/fsdp2.yaml").read_text(encoding="utf-8"))["fsdp_config"]
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=fields["fsdp_version"],
        auto_wrap_policy=fields["fsdp_auto_wrap_policy"].lower(),
        transformer_cls_names_to_wrap=[fields["fsdp_transformer_layer_cls_to_wrap"]],
        reshard_after_forward=fields["fsdp_reshard_after_forward"],
    )
    accelerator, plain = Accelerator(cpu=True), make_tiny_model()
    accelerator.state.fsdp_plugin = plugin
    accelerator.state.distributed_type = DistributedType.FSDP
    model = copy.deepcopy(plain)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert isinstance(model, FSDPModule)
    assert all(isinstance(block, FSDPModule) for block in model.transformer.h)

    drawn = rollout(plain, mine(rank), max_new_tokens=9, generator=seeded(), eos_token_id=None)
    accelerator.backward(rescore(model, drawn).logprobs.sum())  # before any other forward pass
    optimizer.step()
    drawn = rollout(model, mine(rank), generator=seeded(rank), max_new_tokens=20, eos_token_id=[*range(1 + 40 * rank)])
    save_package(accelerator.unwrap_model(model), folder / "package")
    for each in (model, type(plain).from_pretrained(folder / "package")):
        assert_as_drawn(rescore(each, drawn), drawn)
    AcceleratorState._reset_state(reset_partial_state=True)


# Saving and pushing


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@check
def all_processes_write_one_package_equal_to_the_whole_models(rank, folder, server):
    how = {"license": "mit", "max_shard_size": "50KB"}
    for layout, dtype in zip(LAYOUTS, (torch.float32, torch.bfloat16, torch.float32), strict=True):
        plain, target = make_tiny_model().to(dtype), folder / layout
        model, saved = sharded(plain, layout), []
        for _ in range(2):  # before any forward pass, and after one, which leaves some weights whole
            saved.append(save_package(model, target, **how))
            if rank == 0:
                found = files_of(target)
                save_package(plain, target, **how)
                assert found == files_of(target)
                assert len(found) > 10  # several files of weights among them
            with torch.no_grad():
                model(torch.tensor([[1, 2, 3]]))
        both = [None, None]
        dist.all_gather_object(both, saved)
        assert both[0] == both[1]


@check
def a_call_in_one_process_alone_is_refused_within_seconds(rank, folder, server):
    model, wait = sharded(make_tiny_model()), sharded_saves.WAIT
    sharded_saves.WAIT = 1.0
    for alone in (0, 1):
        if rank == alone:
            with pytest.raises(UnsavableModelError, match="over 2 processes, and not all of them came"):
                save_package(model, folder / "package")
        dist.barrier()
    sharded_saves.WAIT = wait
    assert not (folder / "package").exists()
    dist.barrier()
    save_package(model, folder / "package")  # the attempts that failed do not count
    assert (folder / "package").exists()


@check
def what_the_first_process_refuses_all_processes_refuse(rank, folder, server):
    model = sharded(make_tiny_model())
    (folder / "taken").mkdir(exist_ok=True)
    (folder / "taken" / "notes.txt").touch()
    with pytest.raises(FolderRefusedError, match=r"notes\.txt"):
        save_package(model, folder / "taken")
    with pytest.raises(OptionsError, match="base_model"):
        save_package(model, folder / "package", base_model="/a/path")
    with pytest.raises(SaveFailedError, match="large"):
        save_package(model, folder / "package", max_shard_size="large")
    with torch.no_grad():
        model.v_head.summary.bias.fill_(torch.nan)
    with pytest.raises(UnsavableModelError, match=r"v_head\.summary\.bias"):
        save_package(model, folder / "package")
    assert not (folder / "package").exists()


@check
def a_sharded_model_is_pushed_once(rank, folder, server):
    model = sharded(make_tiny_model())
    with (
        talking_to(*server),
        mock.patch.object(subprocess, "Popen", Forked),
        mock.patch.dict(os.environ, HF_HUB_OFFLINE="0"),  # of the worker
        CheckpointPusher("alice/steps") as pusher,
    ):
        assert push_to_hub(model, "alice/pushed").committed
        state = TrainerState(global_step=4, is_world_process_zero=rank == 0)
        arguments = TrainingArguments(folder / "trainer", use_cpu=True)
        CheckpointPusherCallback(pusher).on_train_end(arguments, state, TrainerControl(), model=model)
        assert [each.step for each in pusher.pushed] == ([4] if rank == 0 else [])
        with pytest.raises(OptionsError, match="reward"):
            pusher.push(model, step=5, metrics={"reward": "much"})
        sharded_saves.WAIT = 1.0
        if rank == 0:
            with pytest.raises(UnsavableModelError):
                pusher.push(model, step=5)
        dist.barrier()


@pytest.mark.parametrize("name", [each.__name__ for each in CHECKS])
def test_in_two_processes(passed, name):
    folder, why, hub = passed
    if not {f"{name}-0", f"{name}-1"} <= set(os.listdir(folder)):
        raise AssertionError(f"{name} failed, or one before it") from why
    if name.startswith("what_accelerate"):
        assert verify_package(folder / name / "package")
    if name.startswith("a_sharded_model_is_pushed"):
        assert len(hub.history("alice/pushed")) == 2
        pushed, stepped = (hub.files(repo)["model.safetensors"] for repo in ("alice/pushed", "alice/steps"))
        assert pushed == stepped, "all of the weights"
        assert [commit.title for commit in hub.history("alice/steps")] == ["Step 4", "initial commit"]
