"""Sampling that is honest: a rollout's tokens are draws from the very distribution whose log-probabilities it reports.

Remote code, which imports only torch and its siblings. It works with any causal language model of transformers, and
reads nothing of the model's `generation_config`.
"""

import warnings
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

try:
    from .decoding_gpt2_value import Decoder, check_tokens, device_of, is_spread, unwrapped, vocabulary_of
    from .sampling_gpt2_value import Sampling, as_bits, draw, listed, number, sampling_distribution
    from .scoring_gpt2_value import check_finite, check_itself
except ImportError:
    if __package__:  # in a package the siblings are there: it is transformers that lacks a name
        raise
    # In a checkout or a wheel these files are top-level modules.
    from decoding_gpt2_value import Decoder, check_tokens, device_of, is_spread, unwrapped, vocabulary_of
    from sampling_gpt2_value import Sampling, as_bits, draw, listed, number, sampling_distribution
    from scoring_gpt2_value import check_finite, check_itself

FROM_CONFIG = "config"  # the default of eos_token_id


def rollout(
    model,
    queries=None,
    *,
    attention_mask=None,
    max_new_tokens=20,
    min_new_tokens=0,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    eos_token_id=FROM_CONFIG,
    pad_token_id=None,
    num_return_sequences=1,
    generator=None,
    **unknown,
):
    """Draw responses to prompts, with the log-probability of each token and the value of the state before it.

    Dropout is off, whatever mode the model is in. One that FSDP2 shards is run until the rows of all processes end;
    there all have to pass the same `max_new_tokens`.

    Args:
        model: any causal language model of transformers; `values` are reported where its output has a `value`.
        queries: `[B, P]` int64, or a list of lists or 1-D tensors of ids, of any lengths, or what a tokenizer returns.
        attention_mask: of the shape of `queries`, 0 for padding, on either side; needed where `queries` is padded.
        max_new_tokens: T, columns of the response.
        min_new_tokens, temperature, top_k, top_p: as in `Sampling`.
        eos_token_id: an id, or several, that end a row; default: "config", those of the model's config. None: no row
            ends early.
        pad_token_id: what fills a row after its end; default: the first `eos_token_id`, else 0.
        num_return_sequences: responses for each prompt; rows of one prompt stand together.
        generator: where the random numbers come from; default: torch's global generator (of the CPU).

    A rollout checks itself: one row is computed again by the model's own call, alone, without padding or cache, and
    compared with what was drawn by (`check_itself` says which row, `_off_alone` how closely). That is done at the
    first rollout of a model, again where the model's class, config, dtype or mode, `top_k`, `top_p`, the padding or
    the sizes are new, and at every 16th rollout. It uses no random numbers, and changes no state of the model. After an
    error, the generator's state is as it was before.

    Returns a `Rollout`. Raises TypeError or ValueError for bad input, before anything is drawn, and for logits that are
    not finite; `SelfCheckError` where the check fails.
    """
    if unknown:
        raise TypeError(f"rollout() got {[*unknown]}; the prompts are `queries`, as in rollout(model, queries).")
    vocabulary, device = vocabulary_of(model), device_of(model)
    if eos_token_id is FROM_CONFIG:
        eos_token_id = [
            token
            for token in listed(getattr(unwrapped(model).config, "eos_token_id", None))
            if 0 <= token < vocabulary  # nobody can draw others
        ]
    sampling = Sampling(temperature, top_k, top_p, min_new_tokens, eos_token_id)
    sampling.check_vocabulary(vocabulary)
    T = number("max_new_tokens", max_new_tokens, 1)
    number("min_new_tokens", min_new_tokens, 0, T)
    copies = number("num_return_sequences", num_return_sequences, 1)
    pad = sampling.pad_token_id if pad_token_id is None else number("pad_token_id", pad_token_id, 0, vocabulary - 1)
    prompts, prompt_mask = aligned("queries", queries, attention_mask, pad=pad)
    check_tokens(model, prompts, prompt_mask, T)
    generator = torch.default_generator if generator is None else generator
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator={generator!r}; expected a torch.Generator: torch.Generator().manual_seed(0).")
    state = generator.get_state()
    try:
        # What is made in inference mode cannot be trained on, and a cache cannot keep room in it.
        with torch.inference_mode(False), torch.no_grad():
            tokens, mask = (  # [B, P+T]
                nn.functional.pad(x.to(device).repeat_interleave(copies, 0), (0, T)) for x in (prompts, prompt_mask)
            )
            decoder, B, P = Decoder(model, tokens, mask), len(tokens), prompts.shape[1]
            logits, value = decoder.logits_and_values(P)  # [B, V], [B]

            # float64, so that rare tokens are drawn as often as they should.
            uniforms = torch.rand(T, B, generator=generator, device=generator.device, dtype=torch.float64).to(device)
            running = mask.new_ones(B, dtype=torch.bool)
            spread = is_spread(model)
            ends = tokens.new_tensor(sampling.eos_token_id)
            logprobs = logits.new_zeros(B, T, dtype=torch.promote_types(logits.dtype, torch.float32))
            values = None if value is None else torch.zeros_like(logprobs)
            kept = None
            if sampling.cuts_off(vocabulary):
                # As wide as the sets will be: an embedding may have more rows than there are logits.
                kept = tokens.new_zeros(B, T, as_bits(logits > 0).shape[-1], dtype=torch.uint8)
            for t in range(T):
                if t > 0:
                    logits, value = decoder.logits_and_values(P + t)  # [b, V], [b]
                rows = decoder.rows  # [b], those that are still computed; some of them may have ended
                distribution = sampling_distribution(logits, sampling, steps=t)  # [b, V]
                tokens[rows, P + t], logprobs[rows, t] = draw(distribution, uniforms[t, rows])
                mask[rows, P + t] = running[rows].long()
                if values is not None:
                    values[rows, t] = value.to(values)
                if kept is not None:
                    kept[rows, t] = as_bits(distribution.isfinite())
                running[rows] &= ~torch.isin(tokens[rows, P + t], ends)
                going_on, left = running.sum(), running[rows].nonzero().squeeze(-1)
                if spread:  # then all processes have to make the same calls, until no row goes on anywhere
                    torch.distributed.all_reduce(going_on)
                if going_on == 0:
                    break
                if 0 < 2 * len(left) <= len(rows):
                    decoder.keep(left)
            drawn = mask[:, P:].bool()  # [B, T]
            tokens.masked_fill_(mask == 0, pad)
            for part in (logprobs, values, kept):
                if part is not None:
                    part[~drawn] = 0
            check_finite(logprobs)
            result = Rollout(tokens, mask, tokens[:, P:], drawn, logprobs, values, running, kept, sampling)
            check_itself("rollout", model, result)
            return result
    except BaseException:  # also an interrupt: nothing was drawn
        generator.set_state(state)
        raise


def respond_to_batch(model, queries, txt_len=20, top_k=0, top_p=1.0):
    """The seed notebook's helper: `[batch, txt_len]` tokens after `queries [batch, tokens]`; no row ends early."""
    return rollout(model, queries, max_new_tokens=txt_len, top_k=top_k, top_p=top_p, eos_token_id=None).responses


@dataclass(repr=False)
class Rollout:
    """B rows of P columns with prompts, padded at the left, and T columns with the responses drawn for them.

    Attributes:
        sequences: `[B, P+T]` int64, prompts and responses.
        attention_mask: `[B, P+T]` int64, 1 for the prompt's tokens and for those drawn from the model.
        responses: `[B, T]` int64; padding after a row's first end-of-text token.
        response_mask: `[B, T]` bool, this token was drawn from the model (a row's first end-of-text token was).
        logprobs: `[B, T]` float32 (float64 from a float64 model), natural logarithm, of the drawn tokens under the
            sampling distribution; 0 where masked. None where another engine drew, and gave none.
        values: as `logprobs`, the value of the state before each token; None without a value head.
        truncated: `[B]` bool, no end-of-text token was drawn in the row.
        kept: `[B, T, ceil(V / 8)]` uint8, which tokens each draw chose among, a bit for each of the vocabulary, lowest
            first; None where nothing was cut off.
        sampling: the `Sampling` that it was drawn by.
    """

    sequences: Tensor
    attention_mask: Tensor
    responses: Tensor
    response_mask: Tensor
    logprobs: Tensor | None
    values: Tensor | None
    truncated: Tensor
    kept: Tensor | None
    sampling: Sampling

    def __len__(self):
        return self.sequences.shape[0]

    def __repr__(self):
        (B, N), T = self.sequences.shape, self.responses.shape[1]
        means = [
            f"{name} {part[self.response_mask].mean():.4g}"
            for name, part in vars(self).items()
            if name in ("logprobs", "values") and part is not None
        ]
        return (
            f"Rollout of {B} rows: {N - T} columns of prompts, {T} of responses\n  {self.sampling}\n  means: "
            f"{self.response_mask.sum() / max(B, 1):.4g} tokens a row, {self.truncated.float().mean():.0%} truncated"
            + "".join(f", {each}" for each in means)
        )

    def __getitem__(self, rows):
        """The given rows (a slice, a list, a 1-D tensor of indices or a mask) as a `Rollout`."""
        if isinstance(rows, (tuple, range)) or self.truncated[rows].ndim != 1:
            raise TypeError(
                f"rows are selected by a slice, a list or a 1-D tensor, as in rollout[[0, 2]]; got {rows!r}."
            )
        return self._map(lambda tensor: tensor[rows])

    @classmethod
    def cat(cls, rollouts):
        """The rows of several rollouts with the same `sampling`, such as parts that were drawn one after the other.

        Shorter prompts are padded at the left, shorter responses at the right. Raises ValueError where the settings
        differ, or only some have log-probabilities or values.
        """
        rollouts = list(rollouts)
        kinds = {(each.sampling, *(part is None for part in vars(each).values())) for each in rollouts}
        if len(kinds) != 1:
            raise ValueError(
                "expected rollouts of the same sampling, at least one, all or none with logprobs, values, kept sets."
            )
        joined = {"truncated": torch.cat([each.truncated for each in rollouts])}
        for name, first in vars(rollouts[0]).items():
            if getattr(first, "ndim", 0) > 1:
                pad = rollouts[0].sampling.pad_token_id if name in ("sequences", "responses") else 0
                rows = [(row, each.responses.shape[1]) for each in rollouts for row in getattr(each, name)]
                before = pad_sequence([row[:-T] for row, T in rows], True, pad, "left")  # prompts, where it has them
                after = pad_sequence([row[-T:] for row, T in rows], True, pad)
                joined[name] = torch.cat([before, after], 1)
        return replace(rollouts[0], **joined)

    def repeat(self, times):
        """All rows so many times, one copy after the other."""
        return self[torch.arange(len(self)).repeat(times)]

    def to(self, device):
        """The same rollout with its tensors on another device."""
        return self._map(lambda tensor: tensor.to(device=device))

    def _map(self, function):
        tensors = {name: function(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)


# So that torch.load(weights_only=True) takes a rollout. torch has no other way to say so than for the whole process.
torch.serialization.add_safe_globals([Rollout, Sampling])


# What a caller passes


def aligned(name, rows, attention_mask=None, *, pad=0, right=False):
    """Token ids `[B, P]`, padded at the left (or `right`), and their mask, from a tensor, lists, or a tokenizer's."""
    if hasattr(rows, "keys"):  # what a tokenizer returns
        attention_mask = rows.get("attention_mask") if attention_mask is None else attention_mask
        rows = rows.get("input_ids")
    may_hide_padding = isinstance(rows, Tensor) and attention_mask is None
    try:
        rows = list(map(torch.as_tensor, rows))
        masks = list(map(torch.ones_like, rows) if attention_mask is None else map(torch.as_tensor, attention_mask))
        tokens, seen = (pad_sequence(each, True) for each in (rows, masks))  # [B, P]
        # Of an empty list torch makes a tensor of floats.
        floats = any(not torch.can_cast(row.dtype, torch.int64) and len(row) for row in rows)
        if floats or tokens.dim() != 2 or tokens.dtype == torch.bool:
            raise TypeError(f"{tokens.dtype}, {tokens.dim()} dimensions")
    except (TypeError, ValueError, RuntimeError) as error:  # texts, None, lists of lists, no rows
        raise TypeError(
            f"{name} or its mask holds no rows of token ids ({error}); expected 1-D tensors or lists, as [[5, 6]]."
        ) from error
    if [mask.shape for mask in masks] != [row.shape for row in rows] or ((seen != 0) & (seen != 1)).any():
        raise ValueError(f"attention_mask has another shape than {name}, or numbers but 1 for tokens, 0 for padding.")
    tokens = tokens.long()
    seen = seen.to(tokens)  # their device and dtype
    for edge in (tokens[:, :1], tokens[:, -1:]) if may_hide_padding else ():
        if 0 < (edge == pad).sum() < len(rows):
            warnings.warn(
                f"{pad} begins or ends some rows of {name}; if it is padding, pass attention_mask", stacklevel=3
            )
    order = seen.argsort(dim=1, descending=right, stable=True)  # padding comes to one side, tokens stay in order
    seen = seen.gather(1, order)
    return tokens.gather(1, order).masked_fill(seen == 0, pad), seen
