"""Rollouts and scores switch dropout off without writing to the model: threads and interrupts find it as it was."""

import contextlib
import inspect
import itertools
import sys
import threading

import pytest
import torch
from conftest import make_tiny_model
from support.settings import RAGGED, assert_as_drawn, checkpoint_layers, seeded

from gpt2_value import rescore, rollout

plain_or_not = pytest.mark.parametrize("plain", [True, False])


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


def use(model, seed=0, gradient=True):
    """The numbers of a rollout, of its score, and of that one's gradient."""
    drawn = rollout(model, RAGGED, max_new_tokens=4, top_p=0.9, generator=seeded(seed))
    scored = rescore(model, drawn)
    found = [drawn.sequences, drawn.logprobs, drawn.values, scored.logprobs.detach(), scored.values.detach()]
    if gradient:
        found += torch.autograd.grad(scored.logprobs.sum() + scored.values.sum(), list(model.parameters()))
    return found


@plain_or_not
def test_threads_do_not_disturb_each_other(plain):
    """4 threads, each with 24 rollouts and rescores of one model in train mode, 3 of them with gradients."""
    model = make_training_model(plain=plain)
    before = state_of(model)
    expected = [use(model, seed, seed % 8 == 0) for seed in range(24)]
    found = [[], [], [], []]
    threads = [
        threading.Thread(target=lambda mine=mine: mine.extend(use(model, s, s % 8 == 0) for s in range(24)))
        for mine in found
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for mine in found:
        torch.testing.assert_close(mine, expected, atol=1e-4, rtol=1e-5)
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


@contextlib.contextmanager
def interrupted(moment=None):
    """A KeyboardInterrupt at so many-th a call of a function of the remote code; gives a list of these calls."""
    calls = []

    def on_event(frame, event, argument):
        code = frame.f_code
        # Of a generator that is closed where it is forgotten, Python drops what is raised.
        if event == "call" and code.co_filename.endswith("_gpt2_value.py") and not code.co_flags & inspect.CO_GENERATOR:
            calls.append(code.co_name)
            if len(calls) == moment:
                raise KeyboardInterrupt

    sys.setprofile(on_event)
    try:
        yield calls
    finally:
        sys.setprofile(None)


@plain_or_not
def test_an_interrupt_leaves_nothing_changed(plain):
    """At some thirty moments of a rollout, a rescore and its backward pass."""
    model = make_training_model(plain=plain)
    drawn, before = rollout(model, RAGGED, max_new_tokens=4), state_of(model)
    expected = rescore(model, drawn)
    use(model)  # checks itself, so that the next need not
    with interrupted() as calls:
        use(model)
    assert len(calls) > 90
    for moment in range(1, len(calls), len(calls) // 30):
        with pytest.raises(KeyboardInterrupt), interrupted(moment):
            use(model)
        assert state_of(model) == before
    assert_as_drawn(rescore(model, drawn), expected)
