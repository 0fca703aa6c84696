"""Is this sampler honest? Tests whether tokens are draws from the distribution that they are scored by.

The tokens may come from anywhere: `rollout`, `generate()`, another engine. Files, in the order in which
they import each other: `evidence` (what a token says about its distribution), `statistics` (the four tests), `report`
(the result and its picture), `engine` (tokens of another engine as a `Rollout`, with what they were drawn from),
`audit`, and `mismatch` (how far an engine's log-probabilities are from ours).
"""

from .audit import audit_sampler
from .engine import find_kept_sets, rollout_from_tokens
from .mismatch import Mismatch, mismatch
from .report import SamplerAudit

__all__ = [
    "Mismatch",
    "SamplerAudit",
    "audit_sampler",
    "find_kept_sets",
    "mismatch",
    "rollout_from_tokens",
]
