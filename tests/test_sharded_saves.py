"""A model that FSDP2 shards is saved and pushed by one call in all processes, as the whole one is, or refused."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from conftest import make_tiny_model
from slow.fault_sweep import talking_to
from support.two_processes import LAYOUTS, free_port, in_two_processes, sharded
from transformers import TrainerControl, TrainerState, TrainingArguments

from hub_tools import CheckpointPusher, CheckpointPusherCallback, push_to_hub, save_package, verify_package
from hub_tools.errors import (
    FolderRefusedError,
    OptionsError,
    SaveFailedError,
    UnsavableModelError,
)
from hub_tools.package import sharded as module

pytestmark = pytest.mark.timeout(240)


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def save(rank, folder, layout, tokenizer):
    for dtype in (torch.float32, torch.bfloat16):
        whole = make_tiny_model().to(dtype)
        model, saved = sharded(whole, layout), []
        for _ in range(2):  # before any forward pass, and after one, which leaves some weights whole
            saved.append(save_package(model, folder / "package", tokenizer, license="mit", max_shard_size="50KB"))
            if rank == 0:
                found = files_of(folder / "package")
                save_package(whole, folder / "package", tokenizer, license="mit", max_shard_size="50KB")
                assert found == files_of(folder / "package")
                assert len(found) > 10  # several files of weights among them
            with torch.no_grad():
                model(torch.tensor([[1, 2, 3]]))
        assert [each.replaced for each in saved] == [dtype == torch.bfloat16, True]
        both = [None, None]
        dist.all_gather_object(both, saved)
        assert both[0] == both[1]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_processes_write_one_package_equal_to_the_whole_model_s(layout, tmp_path, tiny_tokenizer):
    in_two_processes(save, tmp_path, layout, tiny_tokenizer)
    assert verify_package(tmp_path / "package")


def save_alone(rank, folder, alone):
    module.WAIT = 2.0
    model = sharded(make_tiny_model())
    if rank == alone:
        began = time.monotonic()
        with pytest.raises(UnsavableModelError, match=f"over 2 processes, and process {1 - alone} did not come"):
            save_package(model, folder / "package")
        assert time.monotonic() - began < 10
        assert not (folder / "package").exists()
    dist.barrier()
    save_package(model, folder / "package")  # the attempt that failed does not count
    assert (folder / "package").exists()


@pytest.mark.parametrize(("alone", "meet"), [(0, "tcp"), (1, "file")])
def test_a_call_in_one_process_alone_is_refused_within_seconds(alone, meet, tmp_path):
    in_two_processes(save_alone, tmp_path, alone, meet=f"tcp://127.0.0.1:{free_port()}" if meet == "tcp" else None)


def fail(rank, folder):
    model = sharded(make_tiny_model())
    (folder / "taken").mkdir(exist_ok=True)
    (folder / "taken" / "notes.txt").touch()
    with pytest.raises(FolderRefusedError, match=r"notes\.txt"):
        save_package(model, folder / "taken")
    with pytest.raises(OptionsError, match="base_model"):
        save_package(model, folder / "package", base_model="/a/path")
    error = ValueError if rank == 0 else SaveFailedError  # what is not ours, only the first process raises
    with pytest.raises(error):
        save_package(model, folder / "package", max_shard_size="large")
    with torch.no_grad():
        model.v_head.summary.bias.fill_(torch.nan)
    with pytest.raises(UnsavableModelError, match=r"v_head\.summary\.bias"):
        save_package(model, folder / "package")
    assert not (folder / "package").exists()


def test_what_the_first_process_refuses_all_processes_refuse(tmp_path):
    in_two_processes(fail, tmp_path)


def push(rank, folder, url, token):
    os.environ.update(HF_HUB_OFFLINE="0", HF_HUB_DISABLE_XET="1")  # for workers
    with talking_to(url, token, xet=False):
        push_all(rank, folder)


def push_all(rank, folder):
    model = sharded(make_tiny_model())
    report = push_to_hub(model, "alice/pushed")
    assert report.committed
    with CheckpointPusher("alice/steps") as pusher:
        pusher.push(model, step=2, metrics={"reward": 2})
        pusher.flush()
        dist.barrier()
        with pytest.raises(OptionsError, match="reward"):
            pusher.push(model, step=3, metrics={"reward": "much"})
        assert [each.step for each in pusher.pushed] == ([2] if rank == 0 else [])
        callback = CheckpointPusherCallback(pusher)
        state = TrainerState(global_step=4, is_world_process_zero=rank == 0)
        arguments = TrainingArguments(folder / "trainer", use_cpu=True)
        callback.on_train_end(arguments, state, TrainerControl(), model=model)
        assert [each.step for each in pusher.pushed] == ([2, 4] if rank == 0 else [])
        module.WAIT = 2.0
        if rank == 0:
            with pytest.raises(UnsavableModelError):
                pusher.push(model, step=5)
        dist.barrier()


def test_a_sharded_model_is_pushed_once(server, tmp_path):
    in_two_processes(push, tmp_path, server.url, server.token)
    assert len(server.history("alice/pushed")) == 2
    titles = [commit.title for commit in server.history("alice/steps")]
    assert titles == ["Step 4", "Step 2: reward=2", "initial commit"]
