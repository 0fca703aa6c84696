"""Is this sampler honest? Tests whether tokens are draws from the distribution that they are scored by.

The tokens may come from anywhere: `rollout`, `generate()`, another engine. `audit_sampler` computes the logits itself,
`audit_logits` takes those of a scoring pass. Files, in the order in which they import each other: `claim` (which
tokens, by which settings), `evidence` (what a token says about its distribution), `statistics` (the four tests),
`report` (the result and its picture), `audit` (the two functions). For tokens of another engine: `engine` (as a
`Rollout`, with what they were drawn from) and `mismatch` (how far its log-probabilities are from ours).
"""

from .audit import audit_logits, audit_sampler
from .engine import find_kept_sets, rollout_from_tokens
from .mismatch import Mismatch, mismatch
from .report import SamplerAudit

__all__ = [
    "Mismatch",
    "SamplerAudit",
    "audit_logits",
    "audit_sampler",
    "find_kept_sets",
    "mismatch",
    "rollout_from_tokens",
]
