"""Is this sampler honest? Tests whether tokens are draws from the distribution that they are scored by.

The tokens may come from anywhere: `rollout`, `generate()`, another engine. `audit_sampler` computes the logits itself,
`audit_logits` takes those of a scoring pass. Files, in the order in which they import each other: `claim` (which
tokens, by which settings), `evidence` (what a token says about its distribution), `statistics` (the four tests),
`report` (the result and its picture), `audit` (the two functions).
"""

from .audit import audit_logits, audit_sampler
from .report import SamplerAudit

__all__ = ["SamplerAudit", "audit_logits", "audit_sampler"]
