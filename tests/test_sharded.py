"""A model whose weights FSDP2 spreads over two processes: sampled and scored as the whole one is."""

import pytest
import torch
import torch.distributed as dist
from conftest import make_tiny_model
from support.two_processes import LAYOUTS, in_two_processes, sharded

from generation_gpt2_value import rollout

RAGGED = [torch.tensor(prompt) for prompt in ([5, 17, 3], [80], [41, 9, 7, 2, 64], [33, 12])]


def make_policy(**fields):
    return make_tiny_model(n_layer=3, n_embd=64, vocab_size=300, **fields)


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


@pytest.mark.timeout(120)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_that_end_at_different_times_do_not_stop_the_other_process(layout, tmp_path):
    in_two_processes(sample, tmp_path, layout)
