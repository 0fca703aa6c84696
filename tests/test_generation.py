"""What is sampled is what is scored: one distribution, two readers, and nothing else can change it."""

import itertools
import math

import pytest
import torch
from conftest import make_tiny_model, plain_twin, sampling_logprobs
from scipy import stats
from torch.nn.functional import log_softmax
from transformers import GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from generation_gpt2_value import Rollout, rescore, respond_to_batch, rollout
from sampling_gpt2_value import Sampling, as_mask, compact, draw, kept_set, sampling_distribution

RAGGED = [torch.tensor(prompt) for prompt in ([5, 17, 3], [80], [41, 9, 7, 2, 64], [33, 12])]
EOS = [1, 2, 3, 4, 5, 6, 7, 8]  # several, so that rows of a random model end early


def assert_rescoring_gives_the_rollout_back(model, drawn, atol=1e-5):
    scored = rescore(model, drawn)
    torch.testing.assert_close(scored.logprobs, drawn.logprobs, atol=atol, rtol=0)
    if drawn.values is None:
        assert scored.values is None
    else:
        torch.testing.assert_close(scored.values, drawn.values, atol=atol, rtol=0)


# rollout = rescore


@pytest.mark.parametrize("min_new_tokens", [0, 5])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3])
@pytest.mark.parametrize("top_k", [0, 1, 10, 500])
@pytest.mark.parametrize("temperature", [1.0, 0.3, 2.0])
def test_rescoring_gives_the_rollout_back(temperature, top_k, top_p, min_new_tokens):
    for training, dropout, eos in itertools.product([True, False], [0.0, 0.5], [None, EOS]):
        pdrops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_first_dropout"), dropout)
        model = make_tiny_model(**pdrops, summary_last_dropout=dropout).train(training)
        drawn = model.rollout(
            RAGGED,
            max_new_tokens=12,
            min_new_tokens=min_new_tokens if eos else 0,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            eos_token_id=eos,
            num_return_sequences=3,
        )
        assert_rescoring_gives_the_rollout_back(model, drawn)
        assert model.training == training
        assert_rescoring_gives_the_rollout_back(model.train(not training), drawn)


def test_nothing_of_the_checkpoints_generation_config_reaches_a_rollout(tmp_path):
    model = make_tiny_model()
    torch.manual_seed(0)
    expected = model.rollout(RAGGED, max_new_tokens=10)
    model.generation_config.update(
        do_sample=True,
        temperature=0.01,
        top_k=1,
        top_p=0.1,
        repetition_penalty=5.0,
        no_repeat_ngram_size=1,
        min_new_tokens=9,
        max_new_tokens=2,
        eos_token_id=list(range(90)),
        pad_token_id=3,
        suppress_tokens=list(range(50)),
        forced_eos_token_id=77,
    )
    torch.manual_seed(0)
    hostile = model.rollout(RAGGED, max_new_tokens=10)
    assert torch.equal(hostile.sequences, expected.sequences)
    assert_rescoring_gives_the_rollout_back(model, hostile)


@pytest.mark.parametrize("settings", [{}, {"top_p": 0.8, "temperature": 1.5}, {"top_k": 5}])
def test_left_and_right_padding_and_lists_give_the_same_rollout(settings):
    model = make_tiny_model()
    longest = 8  # more than the longest prompt: columns that are padding in every row
    outputs = []
    for place in ("list", "left", "right"):
        if place == "list":
            queries, mask = RAGGED, None
        else:
            queries = torch.full((len(RAGGED), longest), 95)
            mask = torch.zeros((len(RAGGED), longest), dtype=torch.long)
            for row, prompt in enumerate(RAGGED):
                where = slice(longest - len(prompt), None) if place == "left" else slice(0, len(prompt))
                queries[row, where], mask[row, where] = prompt, 1
        torch.manual_seed(0)
        outputs.append(model.rollout(queries, attention_mask=mask, max_new_tokens=10, **settings))
    for other in outputs[1:]:
        assert torch.equal(other.responses, outputs[0].responses)
        torch.testing.assert_close(other.logprobs, outputs[0].logprobs, atol=1e-5, rtol=0)
        torch.testing.assert_close(other.values, outputs[0].values, atol=1e-5, rtol=0)
        assert_rescoring_gives_the_rollout_back(model, other)


def test_a_row_is_scored_alike_alone_and_in_a_batch():
    model = make_tiny_model()
    drawn = model.rollout(RAGGED, max_new_tokens=10, eos_token_id=EOS, top_p=0.9)
    for row in range(len(RAGGED)):
        alone = rescore(model, drawn[[row]])
        torch.testing.assert_close(alone.logprobs[0], drawn.logprobs[row], atol=1e-5, rtol=0)
        torch.testing.assert_close(alone.values[0], drawn.values[row], atol=1e-5, rtol=0)


def test_log_probabilities_are_those_of_a_plain_forward_pass():
    """A computation that shares no code with the sampler: GPT-2 itself, one row at a time, without padding or cache."""
    model = make_tiny_model()
    twin = plain_twin(model)
    drawn = model.rollout(RAGGED, max_new_tokens=10, temperature=0.7)
    for row, prompt in enumerate(RAGGED):
        tokens = torch.cat([prompt, drawn.responses[row]])[None]
        logprobs = log_softmax(twin(tokens).logits[0, len(prompt) - 1 : -1] / 0.7, -1)
        expected = logprobs.gather(-1, drawn.responses[row][:, None]).squeeze(-1)
        torch.testing.assert_close(drawn.logprobs[row], expected, atol=1e-5, rtol=0)
        values = model(tokens).value[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(drawn.values[row], values, atol=1e-5, rtol=0)


# Sampling is exact


def enumerate_sequences(model, prompt, length, **settings):
    """Every sequence and its probability, by walking through the whole tree."""
    vocabulary = model.config.vocab_size
    sequences = torch.tensor(list(itertools.product(range(vocabulary), repeat=length)))
    tokens = torch.cat([prompt.expand(len(sequences), -1), sequences], 1)
    with torch.no_grad():
        logits = plain_twin(model)(tokens).logits[:, prompt.shape[0] - 1 : -1].double()
    return sequences, logits


def chi_square_p(counts, expected):
    """The p-value; cells that expect fewer than 5 are pooled, and impossible ones must be empty."""
    assert counts[expected == 0].sum() == 0
    small = expected < 5
    observed = torch.cat([counts[~small], counts[small].sum()[None]])
    wanted = torch.cat([expected[~small], expected[small].sum()[None]])
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    return stats.chisquare(observed.numpy(), (wanted * observed.sum() / wanted.sum()).numpy()).pvalue


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 3},
        {"top_p": 0.7},
        {"temperature": 2.0, "top_k": 4, "top_p": 0.8},
        {"eos_token_id": 2, "min_new_tokens": 2},
        {"eos_token_id": [2, 4]},
    ],
    ids=str,
)
def test_sampled_sequences_follow_the_enumerated_distribution(settings):
    """Chi-square over 200,000 sequences; probabilities by enumeration, in float64, with code of this test only."""
    V, T, N = 6, 3, 200_000
    model = make_tiny_model(vocab_size=V, n_embd=16, n_layer=1)
    prompt = torch.tensor([1, 3])
    sequences, logits = enumerate_sequences(model, prompt, T)
    eos = settings.get("eos_token_id", [])
    eos = eos if isinstance(eos, list) else [eos]
    logprob = torch.zeros(len(sequences), dtype=torch.float64)
    ended = torch.zeros(len(sequences), dtype=torch.bool)
    impossible = torch.zeros(len(sequences), dtype=torch.bool)
    for t in range(T):
        step = logits[:, t].clone()
        if t < settings.get("min_new_tokens", 0):
            step[:, eos] = -math.inf
        step /= settings.get("temperature", 1.0)
        if k := settings.get("top_k"):
            step[step < step.sort(descending=True).values[:, k - 1 : k]] = -math.inf
        if p := settings.get("top_p"):
            ordered, where = step.softmax(-1).sort(descending=True)
            drop = ordered.cumsum(-1) - ordered >= p
            step[drop.scatter(-1, where, drop)] = -math.inf
        token = sequences[:, t]
        logprob += torch.where(ended, 0.0, step.log_softmax(-1).gather(-1, token[:, None]).squeeze(-1))
        impossible |= ended & (token != (eos[0] if eos else 0))  # after the end there is only padding
        ended |= torch.isin(token, torch.tensor(eos))
    expected = logprob.exp().masked_fill(impossible, 0.0)
    assert expected.sum() == pytest.approx(1.0)

    torch.manual_seed(0)
    ends = {"eos_token_id": None, **settings}
    drawn = model.rollout(prompt[None], max_new_tokens=T, num_return_sequences=N, **ends).responses
    index = (drawn * V ** torch.arange(T - 1, -1, -1)).sum(-1)
    counts = torch.bincount(index, minlength=V**T)
    assert chi_square_p(counts, expected * N) > 1e-3


def test_ids_of_kept_sets_are_those_of_the_bits_however_the_rows_are_parted():
    logits = torch.full((5, 40, 50257), -math.inf)  # two rows a part, and one
    logits.scatter_(-1, torch.randint(50257, (5, 40, 7), generator=torch.Generator().manual_seed(0)), 0.0)
    bits = kept_set(logits, Sampling(top_k=7))
    ids = compact(bits, 50257)
    assert ids.dtype == torch.int32
    assert torch.equal(as_mask(ids, 50257), logits == 0)


@pytest.mark.parametrize("width", [1, 2, 255, 256, 257, 1000, 50257])
def test_drawing_is_the_exact_inverse_of_the_distribution_function(width):
    """Uniforms in the middle of each index's interval give that index; intervals of zero length are never hit."""
    torch.manual_seed(0)
    logits = torch.randn(1, width) * 3
    logits[0, torch.randperm(width)[: width // 3]] = -math.inf
    weights = (logits[0] - logits.max()).exp().double()
    edges = weights.cumsum(-1) / weights.sum()
    possible = (logits[0] > -math.inf).nonzero().squeeze(-1)
    possible = possible[:: max(1, len(possible) // 500)]
    middle = (edges[possible] + torch.cat([torch.zeros(1).double(), edges])[possible]) / 2
    shifted = (logits - logits.max()).expand(len(possible), -1)
    indices, logprobs = draw(shifted, middle)
    assert torch.equal(indices, possible)
    torch.testing.assert_close(logprobs, logits[0].log_softmax(-1)[possible], atol=1e-5, rtol=0)


def test_an_impossible_index_is_never_drawn_whatever_the_uniform():
    for possible in ([0], [255], [256], [700], [999], [3, 512, 998]):
        logits = torch.full((1, 1000), -math.inf)
        logits[0, possible] = 0.0
        uniforms = torch.tensor([0.0, 1e-300, 0.5, 1 - 2**-53, 1.0], dtype=torch.float64)
        indices, _ = draw(logits.expand(5, -1), uniforms)
        assert set(indices.tolist()) <= set(possible)


def test_a_rare_token_is_drawn_as_often_as_it_should():
    """Float32 sums over a vocabulary lose a tail of 1e-8; 50,000 such tokens together have the probability 5e-4."""
    logits = torch.full((1, 50257), math.log(1e-8))
    logits[0, 0] = 0.0
    uniforms = (torch.arange(2_000_000, dtype=torch.float64) + 0.5) / 2_000_000
    tail = sum(int((draw(logits.expand(2000, -1), chunk)[0] > 0).sum()) for chunk in uniforms[-4000:].split(2000))
    assert tail == pytest.approx(2_000_000 * 50256e-8 / (1 + 50256e-8), abs=1)


# The one distribution


def test_truncation_keeps_exactly_the_tokens_it_should():
    logits = torch.log(torch.tensor([0.4, 0.3, 0.2, 0.1]))
    for settings, kept in (
        ({"top_k": 2}, 2),
        ({"top_p": 0.35}, 1),
        ({"top_p": 0.4001}, 2),
        ({"top_p": 0.71}, 3),
        ({"top_k": 3, "top_p": 0.5}, 2),
        ({"top_k": 99}, 4),
        ({}, 4),
    ):
        probs = sampling_logprobs(logits, Sampling(**settings)).exp()
        assert (probs > 0).sum() == kept
        assert probs.sum() == pytest.approx(1.0)
        torch.testing.assert_close(probs[:kept] / probs[0], logits[:kept].exp() / 0.4)


def test_ties_are_cut_to_exactly_top_k():
    probs = sampling_logprobs(torch.zeros(5, 100), Sampling(top_k=7)).exp()
    assert ((probs > 0).sum(-1) == 7).all()


@pytest.mark.parametrize(
    "settings", [{"top_k": 3}, {"top_k": 40, "top_p": 0.6}, {"top_p": 0.6}, {"top_p": 1e-9}], ids=str
)
@pytest.mark.parametrize("vocabulary", [50, 2000])
def test_what_was_kept_is_kept_by_whoever_scores_it(settings, vocabulary):
    """A model that ranks the tokens otherwise gives these tokens a probability, and no others; as ids or as bits."""
    torch.manual_seed(0)
    mine, other = torch.randn(2, 5, vocabulary) * 2
    sampling = Sampling(**settings)
    possible = sampling_logprobs(mine, sampling) > -math.inf
    kept = kept_set(sampling_distribution(mine, sampling), sampling)
    assert torch.equal(sampling_logprobs(other, sampling, kept=kept) > -math.inf, possible)
    expected = other.double().masked_fill(~possible, -math.inf).log_softmax(-1)
    torch.testing.assert_close(sampling_logprobs(other, sampling, kept=kept).double(), expected, atol=1e-5, rtol=0)


# What a rollout says of itself


def test_the_masks_say_what_was_drawn():
    model = make_tiny_model()
    drawn = model.rollout(RAGGED * 20, max_new_tokens=12, eos_token_id=EOS, pad_token_id=90)
    P = drawn.sequences.shape[1] - 12
    assert drawn.sequences.dtype == drawn.attention_mask.dtype == torch.long
    assert drawn.response_mask.dtype == drawn.truncated.dtype == torch.bool
    assert drawn.logprobs.dtype == drawn.values.dtype == torch.float32
    assert torch.equal(drawn.responses, drawn.sequences[:, P:])
    assert torch.equal(drawn.attention_mask[:, P:].bool(), drawn.response_mask)
    assert 0 < drawn.truncated.sum() < len(drawn)
    for row in range(len(drawn)):
        prompt = RAGGED[row % len(RAGGED)]
        assert torch.equal(drawn.sequences[row, P - len(prompt) : P], prompt)
        assert drawn.attention_mask[row, :P].sum() == len(prompt)
        length = int(drawn.response_mask[row].sum())
        assert drawn.response_mask[row, :length].all()
        is_eos = torch.isin(drawn.responses[row, :length], torch.tensor(EOS))
        assert not is_eos[:-1].any()
        assert bool(is_eos[-1]) != bool(drawn.truncated[row])
        assert (drawn.responses[row, length:] == 90).all()
        assert not drawn.logprobs[row, length:].any()
        assert not drawn.values[row, length:].any()
        assert (drawn.logprobs[row, :length] < 0).all()


def test_without_an_end_of_text_every_row_is_full_and_truncated():
    drawn = make_tiny_model().rollout(RAGGED, max_new_tokens=7, eos_token_id=None)
    assert drawn.response_mask.all()
    assert drawn.truncated.all()


def test_no_end_of_text_before_min_new_tokens():
    drawn = make_tiny_model().rollout(RAGGED * 50, max_new_tokens=8, min_new_tokens=5, eos_token_id=EOS)
    early = drawn.responses[:, :5]
    assert not torch.isin(early, torch.tensor(EOS)).any()
    assert torch.isin(drawn.responses[:, 5:], torch.tensor(EOS)).any()


def test_a_seeded_generator_repeats_the_rollout():
    model = make_tiny_model()
    first, second, third = (
        model.rollout(RAGGED, max_new_tokens=10, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first.sequences, second.sequences)
    assert not torch.equal(first.sequences, third.sequences)


def test_several_responses_of_one_prompt_stand_together():
    drawn = make_tiny_model().rollout(RAGGED, max_new_tokens=4, num_return_sequences=3)
    assert len(drawn) == 12
    for row, prompt in enumerate(p for p in RAGGED for _ in range(3)):
        assert torch.equal(drawn.sequences[row, 5 - len(prompt) : 5], prompt)


def test_rows_can_be_selected():
    model = make_tiny_model()
    drawn = model.rollout(RAGGED, max_new_tokens=6, top_p=0.9)
    whole = rescore(model, drawn).logprobs
    torch.testing.assert_close(rescore(model, drawn.repeat(3)).logprobs, whole.repeat(3, 1), atol=1e-5, rtol=0)
    for rows in (slice(1, 3), [3, 0], torch.tensor([2]), torch.tensor([True, False, False, True])):
        part = drawn[rows]
        assert isinstance(part, Rollout)
        torch.testing.assert_close(rescore(model, part).logprobs, whole[rows], atol=1e-5, rtol=0)
    with pytest.raises(TypeError, match="slice"):
        drawn[0]


def test_entropy_is_the_mean_surprise():
    """E[-log p] = H: two ways to compute one number, for the distribution that was sampled, truncated or not."""
    model = make_tiny_model()
    for settings in ({}, {"top_p": 0.6, "temperature": 1.3}, {"top_k": 4}):
        torch.manual_seed(0)
        drawn = model.rollout([RAGGED[0]], max_new_tokens=1, num_return_sequences=20_000, **settings)
        entropy = rescore(model, drawn[:1], with_entropy=True).entropy[0, 0]
        surprise = -drawn.logprobs[:, 0]
        assert abs(surprise.mean() - entropy) < 4 * surprise.std() / math.sqrt(20_000)
    assert rescore(model, drawn).entropy is None


# Gradients


def test_rescoring_is_differentiable_and_a_plain_gpt2_serves_as_reference():
    model = make_tiny_model()
    drawn = model.rollout(RAGGED, max_new_tokens=6)
    assert not drawn.logprobs.requires_grad
    scored = model.rescore(drawn)
    (scored.logprobs.sum() + scored.values.sum()).backward()
    assert model.transformer.wte.weight.grad.abs().sum() > 0
    assert model.v_head.summary.weight.grad.abs().sum() > 0
    reference = plain_twin(model)
    assert isinstance(reference, GPT2LMHeadModel)
    scored = rescore(reference, drawn)
    assert scored.values is None
    torch.testing.assert_close(scored.logprobs, drawn.logprobs, atol=1e-5, rtol=0)


def test_gradients_match_a_plain_policy_gradient():
    model = make_tiny_model()
    prompt = RAGGED[0]
    drawn = model.rollout([prompt], max_new_tokens=5, eos_token_id=None)
    model.rescore(drawn).logprobs.sum().backward()
    ours = model.transformer.h[0].mlp.c_fc.weight.grad.clone()
    model.zero_grad()
    logprobs = model(drawn.sequences).logits[:, len(prompt) - 1 : -1].log_softmax(-1)
    logprobs.gather(-1, drawn.responses[..., None]).sum().backward()
    torch.testing.assert_close(ours, model.transformer.h[0].mlp.c_fc.weight.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers_are_run_again_without_dropout(reentrant):
    """The backward pass recomputes the layers after rescore() has put dropout back."""

    def gradient(checkpointing):
        model = make_tiny_model(resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        drawn = model.rollout(RAGGED, max_new_tokens=6, generator=torch.Generator().manual_seed(0))
        scored = model.rescore(drawn)
        torch.testing.assert_close(scored.logprobs, drawn.logprobs, atol=1e-5, rtol=0)
        (scored.logprobs.sum() + scored.values.sum()).backward()
        assert model.is_gradient_checkpointing == checkpointing
        return model.transformer.h[0].mlp.c_fc.weight.grad

    torch.testing.assert_close(gradient(True), gradient(False))


def test_dropout_is_found_again_as_it_was():
    model = make_tiny_model(resid_pdrop=0.3, attn_pdrop=0.2).train()
    probabilities = [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    model.rescore(model.rollout(RAGGED, max_new_tokens=2))
    assert [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)] == probabilities
    with torch.no_grad():
        model.transformer.wte.weight[5, 0] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        model.rollout(RAGGED, max_new_tokens=2)
    assert [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)] == probabilities
    assert model.training


# Other models


@pytest.mark.shows("transformers", "other families of models are sampled and scored")
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_any_causal_language_model_can_be_sampled_and_scored(family):
    torch.manual_seed(0)
    if family == "llama":
        config = LlamaConfig(
            vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
        )
        model = LlamaForCausalLM(config)
        model.config.attention_dropout = 0.5
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.5
    else:
        config = OPTConfig(
            vocab_size=96,
            hidden_size=32,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            dropout=0.5,
            word_embed_proj_dim=32,
            layerdrop=0.5,
        )
        model = OPTForCausalLM(config)
    model.train()
    drawn = rollout(model, RAGGED, max_new_tokens=8, eos_token_id=EOS, top_p=0.9)
    assert drawn.values is None
    assert_rescoring_gives_the_rollout_back(model, drawn)
    assert respond_to_batch(model, torch.stack([RAGGED[0]] * 2), txt_len=4).shape == (2, 4)


@pytest.mark.parametrize("kind", ["OpenAIGPT", "Mamba"])
def test_a_model_without_a_cache_of_keys_and_values_is_run_over_all_columns_again(kind):
    import transformers

    torch.manual_seed(0)
    shape = {
        "OpenAIGPT": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
        "Mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    }[kind]
    config = getattr(transformers, f"{kind}Config")(vocab_size=96, **shape)
    model = getattr(transformers, "OpenAIGPTLMHeadModel" if kind == "OpenAIGPT" else "MambaForCausalLM")(config).eval()
    drawn = rollout(model, RAGGED[:1] * 3, max_new_tokens=5)
    logits = model(drawn.sequences).logits[:, -6:-1]
    expected = logits.log_softmax(-1).gather(-1, drawn.responses.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(drawn.logprobs, expected, atol=1e-5, rtol=0)
    assert_rescoring_gives_the_rollout_back(model, drawn)


@pytest.mark.parametrize("kind", ["GPT2Model", "GPT2ForSequenceClassification", "GPT2ForTokenClassification"])
def test_what_gives_no_logits_over_the_vocabulary_is_refused(kind):
    import transformers

    model = getattr(transformers, kind)(make_tiny_model().config).eval()
    with pytest.raises(TypeError, match=f"a {kind} gives no logits over its vocabulary"):
        rollout(model, RAGGED[:1], max_new_tokens=2)
    with pytest.raises(TypeError, match=f"a {kind} gives no logits over its vocabulary"):
        rescore(model, make_tiny_model().rollout(RAGGED[:1], max_new_tokens=2))


def test_layers_that_were_dropped_from_the_model_are_not_missed():
    model = make_tiny_model()
    model.transformer.h = model.transformer.h[:1]
    assert_rescoring_gives_the_rollout_back(model, model.rollout(RAGGED, max_new_tokens=5))


@pytest.mark.shows("PEFT", "LoRA: a rollout equals its rescoring")
def test_a_peft_model_can_be_sampled_and_scored():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules=["c_attn"], lora_dropout=0.5, init_lora_weights=False)
    model = get_peft_model(make_tiny_model(), lora).train()
    drawn = rollout(model, RAGGED, max_new_tokens=8)
    assert drawn.values is not None
    assert_rescoring_gives_the_rollout_back(model, drawn)
    rescore(model, drawn).logprobs.sum().backward()
    assert model.base_model.model.transformer.h[0].attn.c_attn.lora_A["default"].weight.grad.abs().sum() > 0


# Bad input, refused before any compute


@pytest.fixture
def unused_model():
    model = make_tiny_model()

    def forward(*args, **kwargs):
        raise AssertionError("the model was run on bad input")

    model.transformer.forward = forward
    return model


TWO = torch.tensor([[1, 2], [3, 4]])


@pytest.mark.parametrize(
    ("queries", "arguments", "error", "message"),
    [
        ([], {}, ValueError, "at least one prompt"),
        ([torch.tensor([1]), torch.tensor([])], {}, ValueError, "row 1 has no tokens"),
        (TWO, {"attention_mask": torch.tensor([[0, 0], [1, 1]])}, ValueError, "row 0 has no tokens"),
        (torch.zeros((2, 0), dtype=torch.long), {}, ValueError, "row 0 has no tokens"),
        (TWO.float(), {}, TypeError, "float32; expected token ids"),
        ([torch.tensor([1.0])], {}, TypeError, "float32; expected token ids"),
        (TWO + 95, {}, ValueError, "row 0 holds the id 96, outside the vocabulary of 96"),
        (TWO - 4, {}, ValueError, "row 0 holds the id -3"),
        (torch.tensor([1, 2]), {}, ValueError, r"shape \[2\]; expected \[batch, tokens\]"),
        (TWO, {"attention_mask": torch.ones(2, 3)}, ValueError, "expected the same"),
        (TWO, {"attention_mask": torch.full((2, 2), 0.5)}, ValueError, "other numbers than 0 and 1"),
        ([TWO[0]], {"attention_mask": TWO}, ValueError, "attention_mask has other lengths"),
        (TWO, {"max_new_tokens": 63}, ValueError, "65 tokens, this model's positions end at 64"),
        (TWO, {"max_new_tokens": 0}, ValueError, "max_new_tokens=0"),
        (TWO, {"temperature": 0.0}, ValueError, "temperature=0.0"),
        (TWO, {"temperature": -1.0}, ValueError, "temperature=-1.0"),
        (TWO, {"temperature": math.nan}, ValueError, "temperature=nan"),
        (TWO, {"temperature": math.inf}, ValueError, "temperature=inf"),
        (TWO, {"top_p": 0.0}, ValueError, "top_p=0.0"),
        (TWO, {"top_p": 1.1}, ValueError, "top_p=1.1"),
        (TWO, {"top_p": math.nan}, ValueError, "top_p=nan"),
        (TWO, {"top_k": -1}, ValueError, "top_k=-1"),
        (TWO, {"top_k": 2.5}, ValueError, "top_k=2.5"),
        (TWO, {"min_new_tokens": 30, "eos_token_id": 1}, ValueError, "min_new_tokens=30; expected 0 to"),
        (TWO, {"min_new_tokens": 3, "eos_token_id": None}, ValueError, "no effect without eos_token_id"),
        (TWO, {"eos_token_id": 96}, ValueError, "eos_token_id=96 is not in the vocabulary"),
        (TWO, {"pad_token_id": -1}, ValueError, "pad_token_id=-1"),
        (TWO, {"num_return_sequences": 0}, ValueError, "num_return_sequences=0"),
        (TWO, {"num_return_sequences": 1.5}, ValueError, "num_return_sequences=1.5"),
        (TWO, {"max_new_tokens": "3"}, ValueError, "max_new_tokens='3'"),
        (TWO, {"temperature": 1e-320}, ValueError, "temperature=1e-320"),
        (TWO, {"temperature": 1e308}, ValueError, "temperature=1e\\+308"),
        (TWO, {"temperature": "1"}, ValueError, "temperature='1'"),
        (TWO, {"temperature": True}, ValueError, "temperature=True"),
        (TWO, {"temperature": 1j}, ValueError, "temperature=1j"),
        (TWO, {"top_p": "0.5"}, ValueError, "top_p='0.5'"),
        (TWO, {"top_k": True}, ValueError, "top_k=True"),
        (TWO, {"top_k": "5"}, ValueError, "top_k='5'"),
        (TWO, {"eos_token_id": 3.7}, ValueError, "eos_token_id=3.7"),
        (TWO, {"eos_token_id": 3.0}, ValueError, "eos_token_id=3.0"),
        (TWO, {"eos_token_id": "3"}, ValueError, "eos_token_id='3'"),
        (TWO, {"eos_token_id": True}, ValueError, "eos_token_id=True"),
        (TWO, {"eos_token_id": [1, 2.5]}, ValueError, "eos_token_id=2.5"),
        (TWO, {"eos_token_id": -1}, ValueError, "eos_token_id=-1"),
        (TWO, {"pad_token_id": 96}, ValueError, "pad_token_id=96 is not in the vocabulary"),
        (TWO, {"pad_token_id": 1.5}, ValueError, "pad_token_id=1.5"),
        (TWO, {"eos_token_id": list(range(96)), "min_new_tokens": 1}, ValueError, "leaves nothing to draw"),
        (TWO * 1j, {}, TypeError, "complex64; expected token ids"),
        (TWO > 0, {}, TypeError, "bool; expected token ids"),
        ([TWO[0] * 1j], {}, TypeError, "expected token ids"),
        ([TWO[0] > 0], {}, TypeError, "expected token ids"),
        ("a text", {}, TypeError, "not texts"),
        (["two", "texts"], {}, TypeError, "not texts"),
        ({"tokens": TWO}, {}, TypeError, "expected input_ids"),
        ([None], {}, TypeError, "not texts"),
        ([["two", "texts"]], {}, TypeError, "not texts"),
        ([[[1], [2, 3]]], {}, TypeError, "queries holds no token ids"),
        (None, {}, TypeError, "queries holds no token ids"),
        (5, {}, TypeError, "queries holds no token ids"),
        (torch.zeros((0, 3), dtype=torch.long), {}, ValueError, "there are no rows"),
        (TWO, {"generator": 5}, TypeError, "generator is a int"),
        (TWO, {"attention_mask": [[1, 1]]}, ValueError, "attention_mask has shape"),
    ],
)
def test_bad_input_is_refused_before_any_compute(unused_model, queries, arguments, error, message):
    with pytest.raises(error, match=message):
        unused_model.rollout(queries, **arguments)


def test_what_a_tokenizer_returns_is_taken():
    model = make_tiny_model()
    lists = {"input_ids": [[9, 9, 5], [41, 7, 2]], "attention_mask": [[0, 0, 1], [1, 1, 1]]}
    tensors = {name: torch.tensor(rows) for name, rows in lists.items()}
    drawn = [
        model.rollout(queries, max_new_tokens=5, generator=torch.Generator().manual_seed(0))
        for queries in (lists, tensors, [[5], [41, 7, 2]])
    ]
    assert torch.equal(drawn[0].sequences, drawn[1].sequences)
    assert torch.equal(drawn[0].responses, drawn[2].responses)
    with pytest.raises(TypeError, match="the prompts are `queries`"):
        model.rollout(**tensors)


def test_the_end_of_text_is_that_of_the_config_unless_told_otherwise():
    model = make_tiny_model(eos_token_id=[*EOS, 5000])
    seeded = [torch.Generator().manual_seed(0) for _ in range(2)]
    drawn = model.rollout(RAGGED, max_new_tokens=12, generator=seeded[0])
    told = model.rollout(RAGGED, max_new_tokens=12, generator=seeded[1], eos_token_id=EOS)
    assert drawn.sampling.eos_token_id == tuple(EOS)
    assert torch.equal(drawn.sequences, told.sequences)
    assert not drawn.truncated.all()
    assert model.rollout(RAGGED, max_new_tokens=12, eos_token_id=None).response_mask.all()
    assert respond_to_batch(model, TWO, txt_len=12).shape == (2, 12)


@pytest.mark.parametrize("settings", [{}, {"top_k": 3}, {"top_p": 0.9}], ids=str)
def test_rollouts_of_different_shapes_are_joined(settings):
    model = make_tiny_model()
    parts = [
        model.rollout([*RAGGED[:2]], max_new_tokens=4, **settings),
        model.rollout([RAGGED[0][:1]], max_new_tokens=9, **settings),
        model.rollout(RAGGED, max_new_tokens=6, **settings),
    ]
    whole = Rollout.cat(parts)
    assert len(whole) == 7
    assert_rescoring_gives_the_rollout_back(model, whole)
    assert [*whole.response_mask.sum(1)] == [n for part in parts for n in part.response_mask.sum(1)]
    other = model.rollout(RAGGED, max_new_tokens=2, temperature=0.5)
    for wrong in ([], [parts[0], other]):
        with pytest.raises(ValueError, match="same sampling"):
            Rollout.cat(wrong)


def test_a_rollout_is_shown_in_three_lines():
    shown = repr(make_tiny_model().rollout(RAGGED, max_new_tokens=5))
    assert len(shown.splitlines()) == 3
    assert "4 rows" in shown
    assert "temperature=1.0" in shown


def test_a_setting_that_does_not_exist_is_refused(unused_model):
    with pytest.raises(TypeError, match="repetition_penalty"):
        unused_model.rollout(TWO, repetition_penalty=1.2)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_refused_with_row_and_step(number):
    model = make_tiny_model()
    drawn = model.rollout(RAGGED, max_new_tokens=5)
    with torch.no_grad():
        model.transformer.wpe.weight[4, 0] = number  # reached by the prompt of 5 tokens, in row 2
    with pytest.raises(ValueError, match="row 2 at step 0 are NaN or infinite"):
        model.rollout(RAGGED, max_new_tokens=5)
    with pytest.raises(ValueError, match="are NaN or infinite"):
        model.rescore(drawn)


def test_a_mask_may_be_a_list():
    model, mask = make_tiny_model(), [[0, *[1] * (TWO.shape[1] - 1)] for _ in TWO]
    first, second = (
        model.rollout(TWO, attention_mask=m, max_new_tokens=3, generator=torch.Generator().manual_seed(0))
        for m in (mask, torch.tensor(mask))
    )
    assert torch.equal(first.sequences, second.sequences)


def test_rescoring_refuses_what_is_not_a_rollout_of_this_vocabulary():
    model = make_tiny_model()
    with pytest.raises(TypeError, match="expected the Rollout"):
        rescore(model, RAGGED)
    drawn = model.rollout(RAGGED, max_new_tokens=5)
    drawn.sequences[0, -1] = 95
    with pytest.raises(ValueError, match="outside the vocabulary of 50"):
        rescore(make_tiny_model(vocab_size=50), drawn)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_prompts_of_any_integer_dtype_are_token_ids(dtype):
    model = make_tiny_model()
    expected = model.rollout(TWO, max_new_tokens=4, generator=torch.Generator().manual_seed(0))
    drawn = model.rollout(TWO.to(dtype), max_new_tokens=4, generator=torch.Generator().manual_seed(0))
    assert drawn.sequences.dtype == torch.int64
    assert torch.equal(drawn.sequences, expected.sequences)


def test_a_rollout_is_moved_to_a_device_and_not_to_a_dtype():
    drawn = make_tiny_model().rollout(TWO, max_new_tokens=2)
    assert torch.equal(drawn.to("cpu").sequences, drawn.sequences)
    with pytest.raises(TypeError):
        drawn.to(torch.float64)


def test_padding_without_a_mask_is_not_taken_for_tokens_without_a_word(recwarn):
    model = make_tiny_model()
    padded = torch.tensor([[9, 9, 5, 17], [41, 9, 7, 2]])
    for prompts in (padded, padded.flip(1)):
        with pytest.warns(UserWarning, match="9 begins or ends some rows of queries.*attention_mask"):
            rollout(model, prompts, max_new_tokens=2, eos_token_id=9)
    recwarn.clear()
    rollout(model, padded, attention_mask=(padded != 9).long(), max_new_tokens=2, eos_token_id=9)
    rollout(model, padded[:1], max_new_tokens=2, eos_token_id=9)  # every prompt begins with the end-of-text token
    rollout(model, list(padded), max_new_tokens=2, eos_token_id=9)
    assert not [each for each in recwarn if "attention_mask" in str(each.message)]
