"""What drawn tokens say about the distributions that they claim to come from, chunk by chunk.

Imports torch and the remote code. Method: the randomised probability integral transform of every token (Brockwell,
2007, "Universal residuals: a multivariate transformation", Statistics & Probability Letters 77; Czado, Gneiting & Held,
2009, "Predictive model assessment for count data", Biometrics 65). Along a sequence the transforms are independent and
uniform if each token is a draw from its claimed distribution (Rosenblatt, 1952, "Remarks on a multivariate
transformation", Annals of Mathematical Statistics 23).
"""

from __future__ import annotations

import dataclasses
import math

import torch

from sampling_gpt2_value import Sampling, sampling_distribution

# Another engine's logits differ by rounding: within this distance (in nats, and in probability mass for top_p) a token
# on the edge of what top-k and top-p keep may have been kept there.
ROUNDING = 1e-3
GROUPS = 512  # of token ids that are counted together
HASH = 2654435761  # Knuth's multiplier: ids that are near each other fall into different groups


@dataclasses.dataclass
class Evidence:
    """Sums over drawn tokens, and what each of them was.

    Attributes:
        transforms: `[n]` float64, uniform on [0, 1] for honest draws.
        surprises: `[n]` float64, log p(x) + H(p): mean 0 for honest draws, whatever the distributions are.
        variances: `[n]` float64, of the surprise under the claim.
        impossible: `[n]` bool, the token has probability zero under the claim.
        observed, expected: `[GROUPS]` float64, how often tokens of each group were drawn and should have been.
        covariance: `[GROUPS, GROUPS]` float64, of `observed` under the claim.
    """

    transforms: torch.Tensor
    surprises: torch.Tensor
    variances: torch.Tensor
    impossible: torch.Tensor
    observed: torch.Tensor
    expected: torch.Tensor
    covariance: torch.Tensor

    @classmethod
    def none(cls, vocabulary: int) -> Evidence:
        """No token yet."""
        groups = min(vocabulary, GROUPS)
        nothing, counts = torch.zeros(0, dtype=torch.float64), torch.zeros(groups, dtype=torch.float64)
        return cls(
            transforms=nothing,
            surprises=nothing,
            variances=nothing,
            impossible=nothing.bool(),
            observed=counts,
            expected=counts.clone(),
            covariance=torch.zeros(groups, groups, dtype=torch.float64),
        )

    @torch.no_grad()
    def add(
        self,
        logits: torch.Tensor,
        tokens: torch.Tensor,
        sampling: Sampling,
        *,
        early: torch.Tensor | None = None,
        kept: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Take in n tokens `[n]` with the logits `[n, V]` that they were drawn from; see `sampling_distribution`.

        Raises:
            ValueError: logits are NaN or infinite.
        """
        if not logits.isfinite().all():
            raise ValueError("some logits are NaN or infinite; nothing can be drawn from them. Check the weights.")
        logits = logits.double()
        logprobs = sampling_distribution(logits, sampling, early=early, kept=kept).log_softmax(-1)  # [n, V]
        probs = logprobs.exp()
        own = logprobs.gather(-1, tokens.unsqueeze(-1))  # [n, 1]
        if kept is None and (own == -math.inf).any():
            # Which tokens top-k and top-p keep is decided by rounding where two are all but tied: another engine may
            # have kept one that is not kept here. It counts as the last token that is.
            on_edge = (own == -math.inf).squeeze(-1) & _is_on_edge(logits, tokens, sampling, early)
            tokens = torch.where(on_edge, logprobs.masked_fill(probs == 0, 0.0).argmin(-1), tokens)
            own = logprobs.gather(-1, tokens.unsqueeze(-1))
        # Tokens are ordered by falling probability, ties by their ids; with u uniform the transform of x is
        # P(tokens before x) + u * p(x).
        ids = torch.arange(logits.shape[-1], device=logits.device)
        is_before = (logprobs > own) | ((logprobs == own) & (ids < tokens.unsqueeze(-1)))
        before = (probs * is_before).sum(-1)
        own, prob = own.squeeze(-1), own.exp().squeeze(-1)  # [n]
        where = "cpu" if generator is None else generator.device
        uniform = torch.rand(tokens.shape, generator=generator, device=where, dtype=torch.float64).to(logits.device)
        finite = logprobs.masked_fill(probs == 0, 0.0)
        entropy = -(probs * finite).sum(-1, keepdim=True)

        columns = {
            "transforms": (before + uniform * prob).clamp(0.0, 1.0),
            "surprises": own + entropy.squeeze(-1),
            "variances": (probs * (finite + entropy) ** 2).sum(-1),
            "impossible": prob == 0,
        }
        for name, column in columns.items():
            setattr(self, name, torch.cat([getattr(self, name), column.cpu()]))
        groups = len(self.observed)
        of = ids if groups == logits.shape[-1] else (ids * HASH % 2**32) * groups // 2**32
        grouped = torch.zeros(len(tokens), groups, dtype=torch.float64, device=logits.device)
        grouped = grouped.index_add_(1, of, probs).cpu()  # [n, groups]
        self.observed += torch.bincount(of[tokens], minlength=groups).cpu()
        self.expected += grouped.sum(0)
        self.covariance += torch.diag(grouped.sum(0)) - grouped.T @ grouped


def _is_on_edge(logits, tokens, sampling, early):
    """`[n]` bool: the token would be kept if truncation were looser by the rounding of float32."""
    looser = dataclasses.replace(sampling, top_p=min(1.0, sampling.top_p + ROUNDING))
    kept = sampling_distribution(logits, looser, early=early) > -math.inf
    everything = dataclasses.replace(sampling, top_k=0, top_p=1.0)
    scaled = sampling_distribution(logits, everything, early=early)
    last = scaled.masked_fill(~kept, math.inf).amin(-1)
    return scaled.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) >= last - ROUNDING
