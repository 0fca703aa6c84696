"""A drawn token is scored over the set that it was drawn from, whoever scores it.

That is: by the model that drew it, a policy that has learnt since, a reference, in another dtype, wrapped, hooked, or
overridden. A rollout that does not fit together is not scored.
"""

import copy
import dataclasses
import functools
import math

import pytest
import torch
from conftest import make_tiny_model, plain_twin
from support.settings import EOS, RAGGED, SETTINGS, covering, seeded
from torch import nn
from torch.nn.functional import log_softmax
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

import generation_gpt2_value
from decoding_gpt2_value import Decoder, GPT2Decoder, decoder_for
from generation_gpt2_value import rollout
from modeling_gpt2_value import GPT2ValueModel
from scoring_gpt2_value import rescore

PDROPS = ("resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_first_dropout", "summary_last_dropout")
grid = pytest.mark.parametrize("settings", SETTINGS, ids=str)


def make_policy(**fields):
    return make_tiny_model(n_embd=48, vocab_size=300, **fields)


def draw(model, settings=None, **more):
    settings = SETTINGS[0] if settings is None else settings
    return rollout(model, RAGGED, max_new_tokens=16, num_return_sequences=12, generator=seeded(), **settings, **more)


def assert_scores_are_the_rollouts(model, drawn, atol=1e-5):
    scored = rescore(model, drawn)
    torch.testing.assert_close(scored.logprobs, drawn.logprobs, atol=atol, rtol=0)
    if drawn.values is None:
        assert scored.values is None
    else:
        torch.testing.assert_close(scored.values, drawn.values, atol=atol, rtol=0)
    return scored


def decoder_of(model):
    tokens = torch.zeros((2, 5), dtype=torch.long)
    return type(decoder_for(model, tokens, torch.ones_like(tokens)))


# rollout = rescore


@pytest.mark.parametrize(
    "choice",
    covering(
        temperature=[1.0, 0.3, 2.0],
        top_k=[0, 1, 10, 500],
        top_p=[1.0, 0.9, 0.3],
        min_new_tokens=[0, 5],
        eos_token_id=[None, EOS],
        training=[True, False],
        dropout=[0.0, 0.5],
    ),
    ids=lambda choice: " ".join(map(str, choice.values())),
)
def test_rescoring_gives_the_rollout_back(choice):
    """Every pair of settings occurs, in train and eval mode, with and without dropout in the config."""
    training, dropout = choice.pop("training"), choice.pop("dropout")
    if choice["eos_token_id"] is None:
        choice["min_new_tokens"] = 0
    model = make_tiny_model(**dict.fromkeys(PDROPS, dropout)).train(training)
    drawn = model.rollout(RAGGED, max_new_tokens=12, num_return_sequences=3, **choice)
    assert_scores_are_the_rollouts(model, drawn)
    assert model.training == training
    assert_scores_are_the_rollouts(model.train(not training), drawn)


def test_nothing_of_the_checkpoints_generation_config_reaches_a_rollout():
    model = make_tiny_model()
    expected = model.rollout(RAGGED, max_new_tokens=10, generator=seeded())
    hostile = {"do_sample": True, "temperature": 0.01, "top_k": 1, "top_p": 0.1, "repetition_penalty": 5.0}
    hostile |= {"no_repeat_ngram_size": 1, "min_new_tokens": 9, "max_new_tokens": 2, "eos_token_id": [*range(90)]}
    model.generation_config.update(**hostile, pad_token_id=3, suppress_tokens=[*range(50)], forced_eos_token_id=77)
    drawn = model.rollout(RAGGED, max_new_tokens=10, generator=seeded())
    assert torch.equal(drawn.sequences, expected.sequences)
    assert_scores_are_the_rollouts(model, drawn)


def test_log_probabilities_are_those_of_a_plain_forward_pass():
    """A computation that shares no code with the sampler: GPT-2 itself, one row at a time, without padding or cache."""
    model = make_tiny_model()
    twin = plain_twin(model)
    drawn = model.rollout(RAGGED, max_new_tokens=10, temperature=0.7, eos_token_id=None)
    for row, prompt in enumerate(RAGGED):
        tokens = torch.cat([prompt, drawn.responses[row]])[None]
        logprobs = log_softmax(twin(tokens).logits[0, len(prompt) - 1 : -1] / 0.7, -1)
        expected = logprobs.gather(-1, drawn.responses[row][:, None]).squeeze(-1)
        torch.testing.assert_close(drawn.logprobs[row], expected, atol=1e-5, rtol=0)
        values = model(tokens).value[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(drawn.values[row], values, atol=1e-5, rtol=0)
        assert_scores_are_the_rollouts(model, drawn[[row]])


def test_a_rollout_after_a_training_step_uses_the_new_weights():
    model = make_tiny_model()
    model.rollout(RAGGED, max_new_tokens=3)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    assert_scores_are_the_rollouts(model, model.rollout(RAGGED, max_new_tokens=10))


@pytest.mark.parametrize("fields", [{}, {"activation_function": "relu"}, {"n_inner": 48}])
def test_both_decoders_give_the_same_rollout_and_rows_that_have_ended_are_left_out(fields, monkeypatch):
    model = make_tiny_model(**fields)
    assert decoder_of(model) is GPT2Decoder
    sizes, rollouts = [], []

    def watched(kind):
        class Watched(kind):
            def logits_and_values(self, columns):
                logits, values = super().logits_and_values(columns)
                sizes.append(len(logits))
                return logits, values

        return Watched

    class WithEveryRow(Decoder):
        def keep(self, rows):
            return False

    for kind in (WithEveryRow, watched(Decoder), watched(GPT2Decoder)):
        monkeypatch.setattr(generation_gpt2_value, "decoder_for", kind)
        rollouts.append(rollout(model, RAGGED * 8, max_new_tokens=30, eos_token_id=EOS, generator=seeded(1)))
    assert sizes.count(32) < 40
    assert min(sizes) <= 16
    for drawn in rollouts[1:]:
        for name in ("sequences", "response_mask", "truncated"):
            assert torch.equal(getattr(drawn, name), getattr(rollouts[0], name))
        for name in ("logprobs", "values"):
            torch.testing.assert_close(getattr(drawn, name), getattr(rollouts[0], name), atol=1e-5, rtol=0)
    assert_scores_are_the_rollouts(model, rollouts[-1])


# Another policy, another dtype


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
    assert scored.entropy is None or scored.entropy.isfinite().all()
    assert scored.kl is None or scored.kl.isfinite().all()
    assert scored.kl is None or scored.kl.min() > -1e-4
    ratios = (scored.logprobs - drawn.logprobs)[mask].double().exp()
    assert abs(ratios.mean() - 1) < 5 * ratios.std() / math.sqrt(len(ratios)) + 1e-5


@grid
def test_a_policy_that_has_learnt_since_and_another_model(settings):
    model, reference = make_policy(), plain_twin(make_policy())
    drawn = draw(model, settings)
    learn(model, drawn)
    scored = rescore(model, drawn, with_entropy=True, reference=reference)
    assert_scored_as_drawn(scored, drawn)
    assert scored.kl.mean() > 1e-3  # it has learnt something
    assert (scored.logprobs - drawn.logprobs).abs().max() > 0.05
    other = make_policy(seed=1)
    assert_scored_as_drawn(rescore(other, drawn, with_entropy=True, reference=model), drawn)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_dtype(dtype):
    model = make_policy()
    low = copy.deepcopy(model).to(dtype)
    for settings in SETTINGS:
        for sampler, scorer in ((model, low), (low, model), (low, low)):
            drawn = draw(sampler, settings)
            assert drawn.logprobs.dtype == drawn.values.dtype == torch.promote_types(sampler.dtype, torch.float32)
            scored = rescore(scorer, drawn, with_entropy=True, reference=model)
            assert scored.logprobs.dtype == scored.values.dtype == torch.promote_types(scorer.dtype, torch.float32)
            assert_scored_as_drawn(scored, drawn)


def test_under_autocast_alone_and_as_accelerate_prepares_a_model():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        accelerator = Accelerator(mixed_precision="bf16", cpu=True)
        for settings in SETTINGS:
            model = make_policy(resid_pdrop=0.3).train()
            plain, prepared = copy.deepcopy(model), accelerator.prepare(copy.deepcopy(model))
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert decoder_of(model) is Decoder
                drawn = draw(model, settings)
                scored = rescore(model, drawn, with_entropy=True, reference=model)
            assert_scored_as_drawn(scored, drawn)
            assert_scored_as_drawn(rescore(model, drawn, with_entropy=True), drawn)
            scored.logprobs.sum().backward()
            assert model.transformer.h[0].mlp.c_fc.weight.grad.isfinite().all()
            drawn = draw(prepared, settings)
            scored = rescore(prepared, drawn, with_entropy=True, reference=plain)
            assert_scored_as_drawn(scored, drawn)
            with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
                expected = rescore(plain.eval(), drawn)
            torch.testing.assert_close(scored.logprobs, expected.logprobs, atol=1e-5, rtol=0)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_float64_is_exact():
    model = make_policy().double()
    drawn = draw(model, {"temperature": 0.03, "eos_token_id": None})
    logits = model(drawn.sequences, attention_mask=drawn.attention_mask).logits[:, -17:-1]
    expected = (logits / 0.03).log_softmax(-1).gather(-1, drawn.responses[..., None]).squeeze(-1)
    for found in (drawn.logprobs, rescore(model, drawn).logprobs):
        assert (found <= 0).all()
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_the_documented_bound_of_float32_holds(temperature):
    """1e-5, or 1e-6 * max |logit| / temperature where that is more: the forward pass itself is no better."""
    for scale in (1, 10, 100):
        louder = make_policy()
        with torch.no_grad():
            factor = scale / louder(torch.arange(60)[None]).logits.abs().max()
            louder.transformer.ln_f.weight.mul_(factor)
            louder.transformer.ln_f.bias.mul_(factor)
        drawn = draw(louder, {"temperature": temperature, "eos_token_id": None})
        assert (drawn.logprobs <= 0).all()
        with torch.no_grad():
            largest = louder(drawn.sequences, attention_mask=drawn.attention_mask).logits.abs().max().item()
        difference = (rescore(louder, drawn).logprobs - drawn.logprobs).abs().max().item()
        assert difference < max(1e-5, 1e-6 * largest / temperature)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_changes_nothing(dtype):
    model, settings = make_policy(), SETTINGS[2]
    expected, before = draw(model, settings), torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        drawn = draw(model, settings)
        assert_scores_are_the_rollouts(model, drawn)
    finally:
        torch.set_default_dtype(before)
    for name in ("sequences", "logprobs", "values", "kept"):
        assert getattr(drawn, name).dtype == getattr(expected, name).dtype
        assert torch.equal(getattr(drawn, name), getattr(expected, name))


def test_a_rollout_made_in_inference_mode_is_rescored_with_gradients():
    model = make_policy()
    with torch.inference_mode():
        drawn = draw(model, SETTINGS[1])
        queries = torch.tensor([[5, 6], [7, 8]])
        from_tensor = rollout(model, queries, attention_mask=torch.ones_like(queries), max_new_tokens=3)
        parts = [drawn, drawn[:3], from_tensor]
    for each in parts:
        scored = rescore(model, each)
        ((scored.logprobs - each.logprobs).exp() * each.values).sum().backward()
    assert model.transformer.wte.weight.grad.abs().sum() > 0


# The model's own forward, whatever became of it


def louder(output, factor=1.3):
    """An output of any kind, its numbers multiplied: a tensor, a tuple's first, logits, or hidden states."""
    if isinstance(output, torch.Tensor):
        return output * factor
    if isinstance(output, tuple):
        return (louder(output[0], factor), *output[1:])
    key = "logits" if "logits" in output else "last_hidden_state"
    output[key] = output[key] * factor
    return output


def capped(kind):
    class Capped(kind):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = 5 * torch.tanh(output.logits / 5)
            return output

    def change(model):
        model.__class__ = Capped
        return model

    return change


class Called(GPT2ValueModel):
    def __call__(self, *args, **kwargs):
        output = super().__call__(*args, **kwargs)
        return louder(output) if hasattr(output, "logits") else output


def called(model):
    model.__class__ = Called
    return model


def hooked(name, wrap=lambda hook: hook):
    def change(model):
        model.get_submodule(name).register_forward_hook(wrap(lambda module, args, output: louder(output)))
        return model

    return change


def replaced(name):
    def change(model):
        module = model.get_submodule(name)
        original = module.forward
        module.forward = lambda *args, **kwargs: louder(original(*args, **kwargs))
        return model

    return change


def adapted(model):
    class Adapted(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 1.5

    model.lm_head.__class__ = Adapted
    return model


class Wrapper(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, **kwargs):
        return louder(self.module(**kwargs))


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


def fewer_layers(model):
    model.transformer.h = model.transformer.h[:1]
    return model


CHANGES = {
    "capped": lambda: capped(GPT2ValueModel)(make_policy()),
    "capped plain": lambda: capped(GPT2LMHeadModel)(plain_twin(make_policy())),
    "plain": lambda: plain_twin(make_policy()),
    "called": lambda: called(make_policy()),
    "hook": lambda: hooked("")(make_policy()),
    "hook that torch wraps": lambda: hooked("", torch.no_grad())(make_policy()),
    "hook inside": lambda: hooked("transformer.h.1")(make_policy()),
    "hook on the output layer": lambda: hooked("lm_head")(make_policy()),
    "replaced": lambda: replaced("")(make_policy()),
    "replaced inside": lambda: replaced("transformer.ln_f")(make_policy()),
    "adapted": lambda: adapted(make_policy()),
    "wrapped": lambda: Wrapper(make_policy()),
    "inner": lambda: InnerPolicy(plain_twin(make_policy())),
    "fewer layers": lambda: fewer_layers(make_policy()),
    "no scaling": lambda: make_policy(scale_attn_weights=False),
    "inverse scaling": lambda: make_policy(scale_attn_by_inverse_layer_idx=True),
    "upcast": lambda: make_policy(reorder_and_upcast_attn=True, attn_implementation="eager"),
}


def assert_scored_by_its_own_call(model, settings):
    """A rollout and its scores are those of the model's own logits, in which this test finds the kept ids itself."""
    drawn = draw(model, settings)
    scored = assert_scores_are_the_rollouts(model, drawn)
    places = (drawn.attention_mask.cumsum(-1) - 1).clamp(min=0)
    output = model(input_ids=drawn.sequences, attention_mask=drawn.attention_mask, position_ids=places)
    logits = output.logits[:, -17:-1].double() / settings.get("temperature", 1.0)
    for row, step in [(0, 0), (3, 5), (40, 9), (47, 2)]:
        if drawn.response_mask[row, step]:
            allowed = kept_ids(drawn, row, step)
            expected = logits[row, step][allowed].log_softmax(-1)[allowed.index(int(drawn.responses[row, step]))]
            assert scored.logprobs[row, step].item() == pytest.approx(expected.item(), abs=1e-5)
    if output.logits.requires_grad:
        scored.logprobs.sum().backward()


def kept_ids(drawn, row, step):
    """The ids that a draw chose among, read off the rollout by code of this test only."""
    ends = drawn.sampling.eos_token_id if step < drawn.sampling.min_new_tokens else []
    if drawn.kept is None:
        return [token for token in range(300) if token not in ends]
    kept = drawn.kept[row, step]
    if kept.dtype == torch.int32:
        return kept[kept >= 0].tolist()
    return [token for token in range(300) if kept[token // 8] >> (token % 8) & 1]


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_sampled_and_scored_is_the_forward_pass_of_the_model_as_it_is(change):
    model = CHANGES[change]()
    fast = change in ("plain", "fewer layers")
    assert change in ("wrapped", "inner", "called") or decoder_of(model) is (GPT2Decoder if fast else Decoder)
    for settings in (SETTINGS[0], SETTINGS[-1]):
        assert_scored_by_its_own_call(model, settings)


@pytest.mark.parametrize("name", ["GPT2MLP", "GPT2Attention", "GPT2Block", "GPT2Model", "GPT2LMHeadModel"])
def test_a_forward_that_was_patched_on_the_class_is_run(name, monkeypatch):
    """As kernel libraries patch models."""
    from transformers.models.gpt2 import modeling_gpt2

    kind = getattr(modeling_gpt2, name)
    original = kind.forward
    patched = functools.wraps(original)(lambda *args, **kwargs: louder(original(*args, **kwargs)))
    monkeypatch.setattr(kind, "forward", patched)
    for model in (make_policy(), plain_twin(make_policy())):
        assert_scored_by_its_own_call(model, SETTINGS[0])


def test_a_hook_on_every_module_is_seen_by_both():
    model = make_policy()

    def halve(module, args, output):
        return output / 2 if isinstance(module, nn.Linear) and module.out_features == 300 else None

    handle = nn.modules.module.register_module_forward_hook(halve)
    try:
        drawn = draw(model)
        assert_scored_by_its_own_call(model, SETTINGS[0])
    finally:
        handle.remove()
    assert (rescore(model, drawn).logprobs - drawn.logprobs).abs().max() > 0.1


def test_recording_hidden_states_leaves_the_fast_decoder_in_place():
    """transformers 5 keeps its recording hooks installed after a call with output_hidden_states=True."""
    model = make_tiny_model()
    model(RAGGED[0][None], output_hidden_states=True)
    assert decoder_of(model) is GPT2Decoder


def test_compiled_models_and_layers_are_sampled_scored_and_hooked():
    model = make_tiny_model(resid_pdrop=0.3).train()
    whole = torch.compile(copy.deepcopy(model), backend="eager")
    assert_scores_are_the_rollouts(whole, rollout(whole, RAGGED, max_new_tokens=4))
    whole.eval().register_forward_hook(lambda module, args, output: louder(output))
    drawn = rollout(whole, RAGGED, max_new_tokens=4, generator=seeded())
    assert_scores_are_the_rollouts(whole, drawn)
    assert not torch.equal(drawn.logprobs, rollout(model, RAGGED, max_new_tokens=4, generator=seeded()).logprobs)
    for block in model.transformer.h:
        block.compile(backend="eager")
    assert_scores_are_the_rollouts(model, rollout(model, RAGGED, max_new_tokens=4))


def test_dropout_of_every_kind_is_switched_off():
    class Noisy(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.dropout = inner, 0.9

        def forward(self, x):
            return nn.functional.dropout(self.inner(x), self.dropout, self.training)

    model = make_policy(**dict.fromkeys(PDROPS, 0.5)).train()
    model.transformer.h[0].mlp = Noisy(model.transformer.h[0].mlp)
    assert_scores_are_the_rollouts(model, draw(model))
    mlp = make_policy(**dict.fromkeys(PDROPS, 0.0)).transformer.h[0].mlp
    Unnamed = type("Unnamed", (type(mlp),), {"forward": lambda self, x: nn.functional.dropout(x, 0.3, self.training)})
    model = make_policy(**dict.fromkeys(PDROPS, 0.0)).train()
    model.transformer.h[1].mlp.__class__ = Unnamed  # noise that no attribute names
    assert_scores_are_the_rollouts(model, draw(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tokens_banned_by_the_lowest_number_of_the_dtype_are_finite(dtype):
    def ban(module, args, output):
        output.logits[..., 90:] = torch.finfo(output.logits.dtype).min
        return output

    model = make_policy().to(dtype)
    model.register_forward_hook(ban)
    drawn = draw(model)
    assert (drawn.responses < 90).all()
    assert_scores_are_the_rollouts(model, drawn)


def test_what_is_no_causal_language_model_is_refused_with_the_way_out():
    import transformers

    drawn = make_tiny_model().rollout(RAGGED, max_new_tokens=2)
    with pytest.raises(TypeError, match=r"DataParallel.*model\.module"):
        rollout(nn.DataParallel(make_tiny_model()), RAGGED)
    for name in ("GPT2Model", "GPT2ForSequenceClassification"):
        model = getattr(transformers, name)(make_tiny_model().config).eval()
        for use in (lambda m=model: rollout(m, RAGGED[:1], max_new_tokens=2), lambda m=model: rescore(m, drawn[:1])):
            with pytest.raises(TypeError, match=f"a {name} gives no logits over its vocabulary"):
                use()


# Kept sets, and a rollout that somebody changed


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
    most = int(counts[drawn.response_mask].max())
    assert drawn.kept.nbytes / drawn.responses.numel() <= min(4 * most, math.ceil(300 / 8))
    assert most <= settings.get("top_k", 300)
    for row, step in drawn.response_mask.nonzero()[::37].tolist():
        assert int(drawn.responses[row, step]) in kept_ids(drawn, row, step)


@pytest.mark.parametrize("settings", [{"top_p": 0.9}, {"top_k": 3}], ids=["bits", "ids"])
def test_sets_kept_of_another_vocabulary_are_refused(settings):
    """Every drawn token is in the small vocabulary; only the sets tell."""
    drawn = rollout(make_tiny_model(vocab_size=96), RAGGED * 2, max_new_tokens=8, eos_token_id=None, **settings)
    with pytest.raises(ValueError, match="vocabulary of 50"):
        rescore(make_tiny_model(vocab_size=50), drawn)
    with pytest.raises(TypeError, match="expected the Rollout"):
        rescore(make_tiny_model(), RAGGED)


def changed(drawn, **fields):
    return dataclasses.replace(drawn, **fields)


def without_the_drawn_token(drawn):
    """The first draw chose among others."""
    kept = drawn.kept.clone()
    if kept.dtype == torch.int32:
        kept[0, 0] = torch.where(kept[0, 0] == drawn.responses[0, 0], -1, kept[0, 0])
    else:
        kept[0, 0] = 0
        kept[0, 0, 0] = 1 << ((int(drawn.responses[0, 0]) + 1) % 8)
    return changed(drawn, kept=kept)


SPOILED = {
    "responses": lambda d: changed(d, responses=(d.responses + 1) % 96),
    "sequences": lambda d: changed(d, sequences=d.sequences.roll(1, 1)),
    "a mask of twos": lambda d: changed(d, attention_mask=2 * d.attention_mask),
    "a mask of floats": lambda d: changed(d, attention_mask=d.attention_mask * 0.5),
    "a token that nobody sees": lambda d: changed(d, attention_mask=d.attention_mask.index_fill(1, torch.tensor(5), 0)),
    "a response mask of ints": lambda d: changed(d, response_mask=d.response_mask.long()),
    "fewer rows": lambda d: changed(d, responses=d.responses[:2]),
    "fewer columns": lambda d: changed(d, response_mask=d.response_mask[:, 1:]),
    "another mask": lambda d: changed(d, attention_mask=d.attention_mask[:, 1:]),
    "kept of floats": lambda d: changed(d, kept=d.kept.float()),
    "kept of fewer rows": lambda d: changed(d, kept=d.kept[:1]),
    "kept of one dimension less": lambda d: changed(d, kept=d.kept[0]),
    "kept without the token": without_the_drawn_token,
    "sampling as a dict": lambda d: changed(d, sampling=dataclasses.asdict(d.sampling)),
    "sequences of floats": lambda d: changed(d, sequences=d.sequences.float()),
    "a list": lambda d: changed(d, responses=d.responses.tolist()),
}


@pytest.mark.parametrize("settings", [{"top_k": 3}, {"top_p": 0.9}], ids=["ids", "bits"])
@pytest.mark.parametrize("how", SPOILED)
def test_a_rollout_that_does_not_fit_together_is_refused(how, settings):
    model = make_tiny_model()
    drawn = model.rollout(RAGGED, max_new_tokens=5, eos_token_id=EOS, generator=seeded(), **settings)
    rescore(model, drawn)
    with pytest.raises((TypeError, ValueError)) as refused:
        rescore(model, SPOILED[how](drawn))
    assert "rollout" in str(refused.value).lower()


@pytest.mark.parametrize("padding", [-100, 10**6])
def test_ids_under_a_mask_of_zero_are_padding_whatever_they_are(padding):
    model = make_policy()
    drawn = draw(model)
    expected = rescore(model, drawn).logprobs
    drawn.sequences[drawn.attention_mask == 0] = padding
    torch.testing.assert_close(rescore(model, drawn).logprobs, expected, atol=1e-5, rtol=0)
