"""Rollouts and scores switch dropout off without writing to the model: threads and interrupts find it as it was."""

import contextlib
import functools
import itertools
import random
import signal
import threading

import pytest
import torch
from conftest import make_tiny_model
from support.forks import in_fork
from support.settings import RAGGED, checkpoint_layers, seeded
from torch.utils.checkpoint import CheckpointError

from generation_gpt2_value import SelfCheckError, rescore, rollout


def make_training_model(*, checkpointing=True, plain=True):
    """In train mode, with dropout everywhere; without `plain`, it is decoded by its own forward."""
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_first_dropout"), 0.5)
    model = make_tiny_model(**dropouts, summary_last_dropout=0.5).train()
    if checkpointing:
        checkpoint_layers(model, reentrant=False)
    if not plain:
        model.transformer.h[1].mlp.register_forward_hook(lambda module, args, output: output * 1.5)
    return model


def state_of(model):
    """Everything that a module has of its own, but for its weights and children."""
    return {
        name: {key: repr(value) for key, value in vars(module).items() if key not in ("_parameters", "_modules")}
        for name, module in model.named_modules()
    }


def gradient_of(model, scored):
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    return torch.autograd.grad(scored.logprobs.sum() + scored.values.sum(), weights)


@pytest.mark.parametrize("plain", [True, False])
def test_threads_do_not_disturb_each_other(plain):
    """4 threads, each with 24 rollouts and rescores of one model in train mode, 3 of them with gradients."""
    model = make_training_model(plain=plain)
    before = state_of(model)

    def once(seed, with_gradient):
        drawn = rollout(model, RAGGED, max_new_tokens=4, top_p=0.9, generator=seeded(seed))
        scored = rescore(model, drawn)
        found = [drawn.sequences, drawn.logprobs, drawn.values, scored.logprobs.detach(), scored.values.detach()]
        return found + list(gradient_of(model, scored) if with_gradient else ())

    expected = [once(seed, seed % 8 == 0) for seed in range(24)]
    mismatches = []

    def work():
        for seed in range(24):
            found = once(seed, seed % 8 == 0)
            if not all(torch.allclose(a, b, atol=1e-4) for a, b in zip(found, expected[seed], strict=True)):
                mismatches.append(seed)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert mismatches == []
    assert state_of(model) == before


def test_a_thread_that_trains_keeps_its_dropout():
    model = make_training_model(checkpointing=False)
    stop = threading.Event()

    def score():
        while not stop.is_set():
            rescore(model, rollout(model, RAGGED, max_new_tokens=2))

    thread = threading.Thread(target=score)
    thread.start()
    try:
        tokens = torch.tensor([[5, 17, 3, 8]])
        outputs = [model(tokens).logits.detach() for _ in range(40)]
    finally:
        stop.set()
        thread.join()
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(outputs))


class Interrupt(BaseException):
    pass


def use_and_interrupt(plain):
    """50 interrupts at random moments of a rollout, a rescore and its backward pass."""
    torch.set_num_threads(1)
    model = make_training_model(plain=plain)
    before = state_of(model)
    drawn = rollout(model, RAGGED, max_new_tokens=4)
    with torch.no_grad():
        expected = rescore(model, drawn)
    random.seed(0)

    def interrupt(signum, frame):
        signal.setitimer(signal.ITIMER_REAL, 0.5)  # once more, where Python swallows this one in a destructor
        raise Interrupt

    signal.signal(signal.SIGALRM, interrupt)
    for _ in range(50):
        with contextlib.suppress(Interrupt, CheckpointError):  # the latter is torch's word for one in a recomputation
            signal.setitimer(signal.ITIMER_REAL, random.uniform(0.0005, 0.03))
            while True:
                gradient_of(model, rescore(model, rollout(model, RAGGED, max_new_tokens=4)))
        signal.setitimer(signal.ITIMER_REAL, 0)
    assert state_of(model) == before
    with torch.no_grad():
        scored = rescore(model, drawn)
    torch.testing.assert_close(scored.logprobs, expected.logprobs, atol=1e-5, rtol=0)
    torch.testing.assert_close(scored.values, expected.values, atol=1e-5, rtol=0)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("plain", [True, False])
def test_an_interrupt_leaves_nothing_changed(plain):
    """In a process of its own, since an interrupt can leave torch's own checkpointing in disorder."""
    in_fork(use_and_interrupt, plain)


def test_dropout_that_the_copy_cannot_reach_is_found():
    model = make_training_model(checkpointing=False)
    mlp = model.transformer.h[0].mlp
    mlp.forward = functools.wraps(mlp.forward)(lambda x, original=mlp.forward: original(x))
    drawn = rollout(model.eval(), RAGGED, max_new_tokens=2)
    for use in (lambda: rollout(model, RAGGED, max_new_tokens=2), lambda: rescore(model, drawn)):
        model.train()
        with pytest.raises(SelfCheckError, match="from those that it has alone"):
            use()
        model.eval()
        use()
