"""A drawn token is scored over the set that it was drawn from, whoever scores it.

That is: by a policy that has learnt since, by a reference, in another dtype, wrapped, hooked, or overridden.
"""

import contextlib
import copy
import dataclasses
import functools
import itertools
import math
import os

import pytest
import torch
import torch.distributed as dist
from conftest import make_tiny_model, plain_twin
from support.two_processes import start_two
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from generation_gpt2_value import rescore, rollout
from modeling_gpt2_value import GPT2ValueModel

RAGGED = [torch.tensor(prompt) for prompt in ([5, 17, 3], [80], [41, 9, 7, 2, 64], [33, 12])]
EOS = [1, 2, 3, 4]
SETTINGS = [
    {},
    {"temperature": 0.7},
    {"top_k": 20},
    {"top_p": 0.8},
    {"top_p": 0.3},
    {"top_k": 40, "top_p": 0.9, "temperature": 1.3, "eos_token_id": EOS, "min_new_tokens": 4},
]
grid = pytest.mark.parametrize("settings", SETTINGS, ids=str)


def make_policy(**fields):
    return make_tiny_model(n_layer=3, n_embd=64, vocab_size=300, **fields)


def draw(model, settings, **more):
    torch.manual_seed(0)
    return rollout(model, RAGGED, max_new_tokens=24, num_return_sequences=16, **settings, **more)


def learn(model, drawn, steps=4):
    """Some steps of a policy gradient, after which the model ranks the tokens otherwise."""
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    advantages = torch.randn(drawn.logprobs.shape)
    for _ in range(steps):
        scored = rescore(model, drawn)
        (-(scored.logprobs * advantages).sum(1).mean() + scored.values.pow(2).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_scored_as_drawn(scored, drawn):
    """No drawn token is impossible, the KL is finite, the mean importance ratio is 1 within five standard errors."""
    mask = drawn.response_mask
    assert torch.isfinite(scored.logprobs).all()
    assert (scored.logprobs[mask] <= 1e-6).all()
    assert scored.entropy.isfinite().all()
    assert scored.kl is None or scored.kl.isfinite().all()
    assert scored.kl is None or scored.kl.min() > -1e-4
    ratios = (scored.logprobs - drawn.logprobs)[mask].double().exp()
    assert abs(ratios.mean() - 1) < 5 * ratios.std() / math.sqrt(len(ratios)) + 1e-5


@grid
def test_a_policy_that_has_learnt_since(settings):
    model, reference = make_policy(), plain_twin(make_policy())
    drawn = draw(model, settings)
    learn(model, drawn)
    scored = rescore(model, drawn, with_entropy=True, reference=reference)
    assert_scored_as_drawn(scored, drawn)
    assert scored.kl.mean() > 1e-3  # it has learnt something
    assert (scored.logprobs - drawn.logprobs).abs().max() > 0.05


@grid
def test_another_model_as_reference(settings):
    model, other = make_policy(), make_policy(seed=1)
    drawn = draw(model, settings)
    for scorer in (other, plain_twin(other)):
        assert_scored_as_drawn(rescore(scorer, drawn, with_entropy=True, reference=model), drawn)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@grid
def test_another_dtype(settings, dtype):
    model = make_policy()
    low = copy.deepcopy(model).to(dtype)
    for sampler, scorer in ((model, low), (low, model), (low, low)):
        drawn = draw(sampler, settings)
        assert (
            drawn.logprobs.dtype
            == drawn.values.dtype
            == (torch.float64 if sampler.dtype == torch.float64 else torch.float32)
        )
        scored = rescore(scorer, drawn, with_entropy=True, reference=model)
        assert scored.logprobs.dtype == scored.values.dtype == torch.promote_types(scorer.dtype, torch.float32)
        assert_scored_as_drawn(scored, drawn)


@grid
def test_under_autocast(settings):
    model = make_policy().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        drawn = draw(model, settings)
        scored = rescore(model, drawn, with_entropy=True, reference=model)
    assert_scored_as_drawn(scored, drawn)
    assert_scored_as_drawn(rescore(model, drawn, with_entropy=True), drawn)
    scored.logprobs.sum().backward()
    assert model.transformer.h[0].mlp.c_fc.weight.grad.isfinite().all()


@pytest.fixture
def accelerator():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(mixed_precision="bf16", cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.shows("Accelerate", "a prepared model in mixed precision is scored as it draws")
@grid
def test_prepared_by_accelerate_in_mixed_precision(settings, accelerator):
    model = make_policy(resid_pdrop=0.3).train()
    plain = copy.deepcopy(model)
    prepared = accelerator.prepare(model)
    drawn = draw(prepared, settings)
    scored = rescore(prepared, drawn, with_entropy=True, reference=plain)
    assert_scored_as_drawn(scored, drawn)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        expected = rescore(plain.eval(), drawn)
    torch.testing.assert_close(scored.logprobs, expected.logprobs, atol=1e-5, rtol=0)
    torch.testing.assert_close(scored.values, expected.values, atol=1e-5, rtol=0)


# The model's own forward, whatever became of it


class Capped(GPT2ValueModel):
    """A soft cap on the logits, by a subclass that overrides forward."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 5 * torch.tanh(output.logits / 5)
        return output


def capped(model):
    model.__class__ = Capped
    return model


def hooked(model):
    def double(module, args, output):
        output.logits = output.logits * 2
        return output

    model.register_forward_hook(double)
    return model


def replaced(model):
    original = model.forward

    def forward(*args, **kwargs):
        output = original(*args, **kwargs)
        output.logits = output.logits * 2
        return output

    model.forward = forward
    return model


@contextlib.contextmanager
def a_hook_on_every_module():
    def halve(module, args, output):
        return output / 2 if isinstance(module, torch.nn.Linear) and module.out_features == 300 else None

    handle = torch.nn.modules.module.register_module_forward_hook(halve)
    try:
        yield
    finally:
        handle.remove()


def test_a_hook_on_every_module_is_seen_by_both():
    model = make_policy()
    with a_hook_on_every_module():
        drawn = draw(model, {"eos_token_id": None})
        logits = model(drawn.sequences, attention_mask=drawn.attention_mask).logits[:, -25:-1]
        expected = logits.log_softmax(-1).gather(-1, drawn.responses.unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(drawn.logprobs, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(rescore(model, drawn).logprobs, expected, atol=1e-5, rtol=0)
    assert (rescore(model, drawn).logprobs - expected).abs().max() > 0.1


def with_a_hook_inside(model):
    def scaled(module, args, output):  # a tuple in transformers 4
        return (output[0] * 1.1, *output[1:]) if isinstance(output, tuple) else output * 1.1

    model.transformer.h[1].register_forward_hook(scaled)
    return model


def with_a_hook_on_the_output_layer(model):
    model.lm_head.register_forward_hook(lambda module, args, output: output * 1.5)
    return model


def with_a_hook_on_the_wrapper(model):
    compiled = torch.compile(model, backend="eager")
    return hooked(compiled)


def compiled(model):
    return torch.compile(model, backend="eager")


def plain(model):
    return plain_twin(model)


class CappedPlain(GPT2LMHeadModel):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 5 * torch.tanh(output.logits / 5)
        return output


def capped_plain(model):
    twin = plain_twin(model)
    twin.__class__ = CappedPlain
    return twin


CHANGES = [
    capped,
    hooked,
    replaced,
    with_a_hook_inside,
    with_a_hook_on_the_output_layer,
    with_a_hook_on_the_wrapper,
    compiled,
    plain,
    capped_plain,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("settings", [SETTINGS[0], SETTINGS[2], SETTINGS[-1]], ids=str)
def test_what_is_sampled_and_scored_is_the_forward_pass_of_the_model_as_it_is(settings, change):
    model = change(make_policy())
    drawn = draw(model, settings)
    scored = rescore(model, drawn, with_entropy=True)
    assert_scored_as_drawn(scored, drawn)
    torch.testing.assert_close(scored.logprobs, drawn.logprobs, atol=1e-5, rtol=0)
    positions = (drawn.attention_mask.cumsum(-1) - 1).clamp(min=0)
    output = model(drawn.sequences, attention_mask=drawn.attention_mask, position_ids=positions)
    logits = output.logits[:, -25:-1].double() / settings.get("temperature", 1.0)
    for row, step in [(0, 0), (3, 5), (40, 12)]:
        if drawn.response_mask[row, step]:
            allowed = kept_ids(drawn, row, step)
            expected = logits[row, step][allowed].log_softmax(-1)[allowed.index(int(drawn.responses[row, step]))]
            assert scored.logprobs[row, step].item() == pytest.approx(expected.item(), abs=1e-5)
    scored.logprobs.sum().backward()


def kept_ids(drawn, row, step):
    """The ids that a draw chose among, read off the rollout by code of this test only."""
    ends = EOS if step < drawn.sampling.min_new_tokens else []
    if drawn.kept is None:
        return [token for token in range(300) if token not in ends]
    kept = drawn.kept[row, step]
    if kept.dtype == torch.int32:
        return kept[kept >= 0].tolist()
    return [token for token in range(300) if kept[token // 8] >> (token % 8) & 1]


@grid
def test_the_kept_tokens_are_stored_in_the_fewer_bytes(settings):
    drawn = draw(make_policy(), settings)
    if not {"top_k", "top_p"} & set(settings):
        assert drawn.kept is None
        return
    if drawn.kept.dtype == torch.int32:
        counts = (drawn.kept >= 0).sum(-1)
    else:
        counts = (drawn.kept.unsqueeze(-1) >> torch.arange(8)).bitwise_and(1).sum((-1, -2))
    sizes = counts[drawn.response_mask].tolist()
    assert drawn.kept.nbytes / drawn.responses.numel() <= min(4 * max(sizes), math.ceil(300 / 8))
    assert max(sizes) <= settings.get("top_k", 300)
    for row, step in drawn.response_mask.nonzero()[::17].tolist():
        assert int(drawn.responses[row, step]) in kept_ids(drawn, row, step)


def test_top_k_alone_keeps_k_ids_of_each_token():
    drawn = rollout(make_tiny_model(vocab_size=2000), RAGGED, max_new_tokens=5, top_k=7)
    assert drawn.kept.shape == (4, 5, 7)
    assert drawn.kept.dtype == torch.int32


@pytest.mark.shows("torch.save", "`torch.load(weights_only=True)` of a rollout")
def test_kept_tokens_travel_with_the_rollout(tmp_path):
    model, other = make_policy(), make_policy(seed=1)
    drawn = draw(model, {"top_p": 0.8})
    expected = rescore(other, drawn).logprobs
    torch.save(drawn, tmp_path / "rollout.pt")
    loaded = torch.load(tmp_path / "rollout.pt", weights_only=True)
    rows = torch.randperm(len(drawn))[:5]
    for same, where in ((loaded, slice(None)), (drawn.to("cpu"), slice(None)), (drawn[rows], rows)):
        torch.testing.assert_close(rescore(other, same).logprobs, expected[where], atol=1e-5, rtol=0)


@pytest.mark.parametrize("settings", [{"top_p": 0.9}, {"top_k": 3}], ids=["bits", "ids"])
def test_sets_kept_of_another_vocabulary_are_refused(settings):
    """Every drawn token is in the small vocabulary; only the sets tell."""
    model = make_tiny_model(vocab_size=96)
    drawn = rollout(model, RAGGED[:1], max_new_tokens=8, num_return_sequences=8, **settings)
    assert drawn.kept.dtype == (torch.uint8 if "top_p" in settings else torch.int32)
    drawn.sequences.remainder_(89)
    drawn.responses.remainder_(89)
    if drawn.kept.dtype == torch.int32:
        drawn.kept[drawn.kept >= 0] %= 89
    for fewer in (95, 90, 89):
        with pytest.raises(ValueError, match=f"not of this model's vocabulary of {fewer} tokens"):
            rescore(make_tiny_model(vocab_size=fewer), with_set_of_token_95(drawn))
    assert rescore(model, with_set_of_token_95(drawn)).logprobs.shape == (8, 8)


def with_set_of_token_95(drawn):
    """A rollout whose first token was also drawn from among token 95."""
    changed = drawn[:]
    changed.kept = drawn.kept.clone()
    if drawn.kept.dtype == torch.uint8:
        changed.kept[0, 0, -1] |= 1 << 7
    else:
        changed.kept[0, 0, -1] = 95
    return changed


def spoiled(drawn, name, row, step, number):
    changed = drawn[:]
    setattr(changed, name, getattr(drawn, name).clone())
    getattr(changed, name)[row, step] = number
    return changed


@pytest.mark.parametrize("settings", [{"top_p": 0.9}, {"top_k": 3}], ids=["bits", "ids"])
def test_a_rollout_that_contradicts_itself_is_refused(settings):
    """It may come from a file of somebody else, or from a collator of one's own."""
    model = make_policy()
    drawn = draw(model, {**settings, "eos_token_id": None})
    outside = next(token for token in range(300) if token not in kept_ids(drawn, 0, 0))
    token = spoiled(drawn, "responses", 0, 0, outside)
    token.sequences = drawn.sequences.clone()
    token.sequences[0, -24] = outside
    for wrong, error, message in (
        (token, ValueError, "responses.0, 0., the token .* is not in its kept set"),
        (spoiled(drawn, "responses", 1, 2, (int(drawn.responses[1, 2]) + 1) % 300), ValueError, "not the one in"),
        (spoiled(drawn, "attention_mask", 0, 3, 2), ValueError, "other numbers than 0 and 1"),
        (spoiled(drawn, "attention_mask", 0, -1, 0), ValueError, "masked in `attention_mask`"),
        (dataclasses.replace(drawn, kept=drawn.kept.float()), TypeError, "kept is torch.float32"),
        (
            dataclasses.replace(drawn, response_mask=drawn.response_mask.long()),
            TypeError,
            "response_mask is torch.int64",
        ),
        (dataclasses.replace(drawn, responses=drawn.responses[:, 1:]), ValueError, "response_mask has the shape"),
        (dataclasses.replace(drawn, values=drawn.values[:3]), ValueError, "values has the shape"),
        (dataclasses.replace(drawn, sequences=drawn.sequences.float()), TypeError, "sequences is torch.float32"),
    ):
        with pytest.raises(error, match=message):
            rescore(model, wrong)


# Precision


def test_float64_is_exact():
    model = make_policy().double()
    drawn = draw(model, {"temperature": 0.03})
    logits = model(drawn.sequences, attention_mask=drawn.attention_mask).logits[:, -25:-1]
    expected = (logits / 0.03).log_softmax(-1).gather(-1, drawn.responses[..., None]).squeeze(-1)
    for found in (drawn.logprobs, rescore(model, drawn).logprobs):
        assert found.dtype == torch.float64
        assert (found <= 0).all()
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_the_documented_bound_of_float32_holds(temperature):
    """1e-5, or 1e-6 * max |logit| / temperature where that is more: the forward pass itself is no better."""
    model = make_policy()
    for scale in (1, 10, 100):
        louder = copy.deepcopy(model)
        with torch.no_grad():
            factor = scale / louder(torch.arange(60)[None]).logits.abs().max()
            louder.transformer.ln_f.weight.mul_(factor)
            louder.transformer.ln_f.bias.mul_(factor)
        drawn = draw(louder, {"temperature": temperature})
        assert (drawn.logprobs <= 0).all()
        with torch.no_grad():
            largest = louder(drawn.sequences, attention_mask=drawn.attention_mask).logits.abs().max().item()
        difference = (rescore(louder, drawn).logprobs - drawn.logprobs).abs().max().item()
        assert difference < max(1e-5, 1e-6 * largest / temperature)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_changes_nothing(dtype):
    model = make_policy()
    expected = draw(model, {"top_p": 0.8, "eos_token_id": EOS})
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        drawn = draw(model, {"top_p": 0.8, "eos_token_id": EOS})
        scored = rescore(model, drawn, with_entropy=True, reference=plain_twin(model).float())
    finally:
        torch.set_default_dtype(before)
    for name in ("sequences", "logprobs", "values", "kept"):
        found = getattr(drawn, name)
        assert found.dtype == getattr(expected, name).dtype
        assert torch.equal(found, getattr(expected, name))
    torch.testing.assert_close(scored.logprobs, drawn.logprobs, atol=1e-5, rtol=0)


def test_a_rollout_made_in_inference_mode_is_rescored_with_gradients():
    model = make_policy()
    with torch.inference_mode():
        drawn = draw(model, {"top_k": 20})
        part = drawn[:3]
        queries = torch.tensor([[5, 6], [7, 8]])
        from_tensor = rollout(model, queries, attention_mask=torch.ones_like(queries), max_new_tokens=3)
    for each in (drawn, part, from_tensor):
        scored = rescore(model, each)
        ratio = (scored.logprobs - each.logprobs).exp()
        (ratio * each.values).sum().backward()
    assert model.transformer.wte.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("padding", [-100, -1, 10**6])
def test_ids_under_a_mask_of_zero_are_padding_whatever_they_are(padding):
    model = make_policy()
    queries = torch.tensor([[5, 17, 3], [padding, padding, 80]])
    mask = torch.tensor([[1, 1, 1], [0, 0, 1]])
    torch.manual_seed(0)
    drawn = rollout(model, queries, attention_mask=mask, max_new_tokens=5)
    torch.manual_seed(0)
    expected = rollout(model, RAGGED[:2], max_new_tokens=5)
    assert torch.equal(drawn.responses, expected.responses)
    drawn.sequences[drawn.attention_mask == 0] = padding
    torch.testing.assert_close(rescore(model, drawn).logprobs, expected.logprobs, atol=1e-5, rtol=0)


# Several processes


def wrapped_in(kind, model):
    if kind == "DistributedDataParallel":
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (2,))
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def distributed_worker(rank, kind, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for training, settings in zip(itertools.cycle([True, False]), SETTINGS, strict=False):
        plain = make_policy(resid_pdrop=0.3).train(training)
        wrapped = wrapped_in(kind, copy.deepcopy(plain))
        torch.manual_seed(rank)
        drawn = rollout(plain, RAGGED[2 * rank : 2 * rank + 2], max_new_tokens=8, **settings)
        gradients = []
        for model in (wrapped, plain):  # the wrapped one scores before any forward pass
            scored = rescore(model, drawn, with_entropy=True, reference=model)
            torch.testing.assert_close(scored.logprobs, drawn.logprobs, atol=1e-5, rtol=0)
            assert scored.kl.abs().max() < 1e-5
            (scored.logprobs.sum() + 0.3 * scored.values.pow(2).sum()).backward()
            gradients.append([weight.grad for weight in model.parameters()])
        for found, alone in zip(*gradients, strict=True):
            found = found.full_tensor() if isinstance(found, DTensor) else found
            dist.all_reduce(alone)
            torch.testing.assert_close(found, alone / 2, atol=1e-5, rtol=1e-4)  # the mean of what each rank has alone
        drawn = rollout(
            wrapped,
            RAGGED[2 * rank : 2 * rank + 2],
            max_new_tokens=4,
            **{**settings, "eos_token_id": None, "min_new_tokens": 0},
        )
        torch.testing.assert_close(rescore(plain, drawn).logprobs, drawn.logprobs, atol=1e-5, rtol=0)
    (folder / f"done-{rank}").touch()
    dist.barrier()
    os._exit(0)  # gloo's destructors wait for a peer that may be gone


@pytest.mark.shows("DistributedDataParallel, FSDP2", "two processes: gradients are the mean of what each has alone")
@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", ["DistributedDataParallel", "FSDP2"])
def test_two_processes_learn_the_mean_of_what_each_would_learn_alone(kind, tmp_path):
    start_two(distributed_worker, kind, tmp_path)
    assert {"done-0", "done-1"} <= set(os.listdir(tmp_path))


# What a stranger tried


@pytest.mark.shows("torch.compile", "layers that were compiled in place")
def test_layers_that_were_compiled_in_place_lose_their_dropout_too():
    model = make_policy(resid_pdrop=0.3).train()
    for block in model.transformer.h:
        block.compile(backend="eager")
    drawn = draw(model, {})
    torch.testing.assert_close(rescore(model, drawn).logprobs, drawn.logprobs, atol=1e-5, rtol=0)


def test_noise_that_no_attribute_names_is_switched_off_in_training_mode():
    model = make_policy(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, summary_first_dropout=0.0).train()
    mlp = model.transformer.h[0].mlp

    class Noisy(type(mlp)):
        def forward(self, x):
            return torch.nn.functional.dropout(super().forward(x), 0.3, self.training)

    mlp.__class__ = Noisy
    drawn = draw(model, {})
    torch.testing.assert_close(rescore(model, drawn).logprobs, drawn.logprobs, atol=1e-5, rtol=0)


def test_a_hook_under_a_decorator_of_torch_is_a_hook():
    model = make_policy()

    @torch.no_grad()
    def double(module, args, output):
        if getattr(output, "logits", None) is not None:
            output.logits = output.logits * 2
        return output

    model.register_forward_hook(double)
    drawn = draw(model, {})
    torch.testing.assert_close(rescore(model, drawn).logprobs, drawn.logprobs, atol=1e-5, rtol=0)


def assert_scored_by_its_own_call(model, **arguments):
    """A rollout and its scores are those of the model's own logits."""
    drawn = draw(model, {"eos_token_id": None})
    with torch.no_grad():
        inputs = {"input_ids": drawn.sequences, "attention_mask": drawn.attention_mask, **arguments}
        positions = (drawn.attention_mask.cumsum(-1) - 1).clamp(min=0)
        logits = model(**inputs, position_ids=positions).logits[:, -25:-1].float()
    expected = logits.log_softmax(-1).gather(-1, drawn.responses.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(drawn.logprobs, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(rescore(model, drawn).logprobs, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["GPT2MLP", "GPT2Attention", "GPT2Block", "GPT2Model", "GPT2LMHeadModel"])
@pytest.mark.parametrize("plain", [False, True], ids=["value", "plain"])
def test_a_forward_that_was_patched_on_the_class_is_run(name, plain, monkeypatch):
    """As kernel libraries patch models. Each output is changed where it is a tensor, or its first is."""
    from transformers.models.gpt2 import modeling_gpt2

    kind = getattr(modeling_gpt2, name)
    original = kind.forward

    def louder(self, *args, **kwargs):
        output = original(self, *args, **kwargs)
        if isinstance(output, tuple):
            return (output[0] * 1.3, *output[1:])
        if isinstance(output, torch.Tensor):
            return output * 1.3
        key = "logits" if "logits" in output else "last_hidden_state"
        output[key] = output[key] * 1.3
        return output

    functools.update_wrapper(louder, original)
    monkeypatch.setattr(kind, "forward", louder)
    model = plain_twin(make_policy()) if plain else make_policy()
    assert_scored_by_its_own_call(model)


class Called(GPT2ValueModel):
    def __call__(self, *args, **kwargs):
        output = super().__call__(*args, **kwargs)
        if hasattr(output, "logits"):
            output.logits = output.logits * 2
        return output


class Wrapper(torch.nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, **kwargs):
        output = self.module(**kwargs)
        output.logits = output.logits * 2
        return output


class InnerPolicy(PreTrainedModel):
    """Hands everything on, and names no argument of its own."""

    config_class = GPT2Config
    _supports_sdpa = True

    def __init__(self, inner):
        super().__init__(inner.config)
        self.inner = inner
        self.post_init()

    def get_input_embeddings(self):
        return self.inner.get_input_embeddings()

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


def called(model):
    model.__class__ = Called
    return model


@pytest.mark.parametrize("wrap", [called, Wrapper, lambda m: InnerPolicy(plain_twin(m))], ids=["call", "wrap", "inner"])
def test_what_a_model_s_own_call_gives_is_scored(wrap):
    assert_scored_by_its_own_call(wrap(make_policy()).eval())


def test_float64_tokens_banned_by_the_lowest_number_are_finite():
    class Banning(GPT2ValueModel):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits[..., 90:] = torch.finfo(output.logits.dtype).min
            return output

    model = make_policy().double()
    model.__class__ = Banning
    assert (draw(model, {}).responses < 90).all()


def test_tokens_banned_by_the_lowest_number_of_the_dtype_are_finite():
    class Banning(GPT2ValueModel):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits[..., 90:] = torch.finfo(output.logits.dtype).min
            return output

    model = make_policy()
    model.__class__ = Banning
    drawn = draw(model, {})
    assert (drawn.responses < 90).all()
    torch.testing.assert_close(rescore(model, drawn).logprobs, drawn.logprobs, atol=1e-5, rtol=0)


def test_a_reference_that_is_not_finite_is_an_error():
    model, reference = make_policy(), make_policy()
    drawn = draw(model, {})
    with torch.no_grad():
        reference.transformer.ln_f.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="NaN or infinite"):
        rescore(model, drawn, reference=reference)


@pytest.mark.parametrize("rows", [1, True, torch.tensor(1), (0, 1)], ids=str)
def test_what_selects_no_rows_is_refused(rows):
    drawn = draw(make_policy(), {})
    with pytest.raises(TypeError, match="selected by a slice, a list"):
        drawn[rows]
