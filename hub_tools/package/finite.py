"""Find weights that are NaN or infinite. Imports torch inside the function."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def not_finite(weights: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Return the tensors that hold NaN or infinity, and how many such values each holds; `{}` if all are finite.

    (`probe.py` has its own check, because it runs where hub_tools cannot be imported.)
    """
    import torch

    found = {}
    for name, tensor in weights.items():
        finite = torch.isfinite(tensor)
        if not finite.all():
            found[name] = int((~finite).sum())
    return found
