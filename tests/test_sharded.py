"""A model whose weights FSDP2 spreads over two processes: sampled and scored as the whole one is."""

import copy

import pytest
import torch
import torch.distributed as dist
from conftest import make_tiny_model
from support.two_processes import LAYOUTS, in_two_processes, sharded
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from generation_gpt2_value import rescore, rollout
from hub_tools import save_package
from hub_tools.errors import UnsavableModelError

RAGGED = [torch.tensor(prompt) for prompt in ([5, 17, 3], [80], [41, 9, 7, 2, 64], [33, 12])]


def make_policy(**fields):
    return make_tiny_model(n_layer=3, n_embd=64, vocab_size=300, **fields)


pytestmark = pytest.mark.timeout(240)

# Rollouts

# Of process 0 and of process 1: new tokens, and how many ids end a text.
UNEQUAL = [((20, 20), (1, 120)), ((20, 20), (300, 1)), ((3, 30), (1, 40)), ((30, 3), (200, 1))]


def sample(rank, folder, layout):
    for training in (False, True):
        plain = make_policy(resid_pdrop=0.3).train(training)
        model = sharded(plain, layout)
        for columns, ends in UNEQUAL:
            prompts = RAGGED[2:] if rank else RAGGED[:2]
            settings = {"max_new_tokens": columns[rank], "eos_token_id": [*range(ends[rank])], "top_k": 40}
            drawn, expected = (
                rollout(each, prompts, generator=torch.Generator().manual_seed(rank), **settings)
                for each in (model, plain)
            )
            assert torch.equal(drawn.sequences, expected.sequences)
            torch.testing.assert_close(drawn.logprobs, expected.logprobs, atol=1e-5, rtol=0)
            torch.testing.assert_close(drawn.values, expected.values, atol=1e-5, rtol=0)
            steps = [torch.zeros((), dtype=torch.long) for _ in range(2)]
            dist.all_gather(steps, drawn.response_mask.any(0).sum())
            assert steps[0] != steps[1]  # else nothing was tested


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_that_end_at_different_times_do_not_stop_the_other_process(layout, tmp_path):
    in_two_processes(sample, tmp_path, layout)


def sample_in_bfloat16(rank, folder):
    whole = make_policy(resid_pdrop=0.3).train()
    model = sharded(whole, "accelerate", mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    settings = {"max_new_tokens": 24, "eos_token_id": [*range(1 + 30 * rank)], "num_return_sequences": 64}
    drawn = rollout(model, RAGGED, generator=torch.Generator().manual_seed(rank), top_p=0.9, **settings)
    scored = rescore(model, drawn, reference=whole)
    ratios = (scored.logprobs - drawn.logprobs)[drawn.response_mask].double().exp()
    assert abs(ratios.mean() - 1) < 5 * ratios.std() / len(ratios) ** 0.5 + 1e-5
    assert scored.values.dtype == drawn.values.dtype == torch.float32
    assert scored.kl.min() > -1e-4
    (scored.logprobs.sum() + scored.values.sum()).backward()
    assert all(weight.grad.full_tensor().isfinite().all() for weight in model.parameters())


def test_in_bfloat16_the_mean_importance_ratio_is_1(tmp_path):
    in_two_processes(sample_in_bfloat16, tmp_path)


def sample_an_adapter(rank, folder):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        target_modules=["c_attn"], modules_to_save=["v_head"], init_lora_weights=False, fan_in_fan_out=True
    )
    model = get_peft_model(make_policy(), config)
    whole = copy.deepcopy(model)
    for block in model.get_base_model().transformer.h:
        fully_shard(block)
    fully_shard(model)
    settings = {"max_new_tokens": 20, "eos_token_id": [*range(1 + 120 * rank)]}
    drawn = rollout(model, RAGGED, generator=torch.Generator().manual_seed(rank), **settings)
    scored, expected = (rescore(each, drawn, reference="disable_adapter") for each in (model, whole))
    torch.testing.assert_close(drawn.logprobs, expected.logprobs, atol=1e-5, rtol=0)
    torch.testing.assert_close(scored.logprobs, expected.logprobs, atol=1e-5, rtol=0)
    torch.testing.assert_close(scored.kl, expected.kl, atol=1e-5, rtol=0)
    assert scored.kl.max() > 0.01


def test_an_adapter_whose_wrapper_is_sharded_too(tmp_path):
    in_two_processes(sample_an_adapter, tmp_path)


def refuse_fsdp1(rank, folder):
    model = FullyShardedDataParallel(make_policy(), device_id=torch.device("cpu"), use_orig_params=True)
    drawn = rollout(make_policy(), RAGGED, max_new_tokens=2)
    for call in (lambda: rollout(model, RAGGED), lambda: rescore(model, drawn)):
        with pytest.raises(TypeError, match="got a FullyShardedDataParallel: use DistributedDataParallel or FSDP2"):
            call()
    with pytest.raises(UnsavableModelError, match="FullyShardedDataParallel"):
        save_package(model, folder / "package")


def test_fsdp1_is_refused_by_name(tmp_path):
    in_two_processes(refuse_fsdp1, tmp_path)


# A loss that does not use the value head


def learn_without_the_head(rank, folder):
    whole = make_policy()
    rows = slice(2 * rank, 2 * rank + 2)
    drawn = rollout(whole, RAGGED, max_new_tokens=6, generator=torch.Generator().manual_seed(0))
    expected = copy.deepcopy(whole)
    rescore(expected, drawn).logprobs.sum().backward()
    models = {
        "told": DistributedDataParallel(copy.deepcopy(whole), find_unused_parameters=True),
        "frozen": DistributedDataParallel(frozen_head(whole)),
        "FSDP2": sharded(whole, "accelerate"),
    }
    for name, model in models.items():
        for _ in range(2):  # what was not told, DistributedDataParallel notices at the second step
            model.zero_grad()
            rescore(model, drawn[rows]).logprobs.sum().backward()
        for found, alone in zip(model.parameters(), expected.parameters(), strict=True):
            if alone.grad is not None:
                grad = found.grad.full_tensor() if name == "FSDP2" else found.grad
                torch.testing.assert_close(2 * grad, alone.grad, atol=1e-5, rtol=1e-5)
    untold = DistributedDataParallel(copy.deepcopy(whole))
    rescore(untold, drawn[rows]).logprobs.sum().backward()
    with pytest.raises(RuntimeError, match="find_unused_parameters"):
        rescore(untold, drawn[rows])


def frozen_head(model):
    model = copy.deepcopy(model)
    model.v_head.requires_grad_(False)
    return model


def test_a_loss_without_the_value_head_learns_where_ddp_is_told(tmp_path):
    in_two_processes(learn_without_the_head, tmp_path)
