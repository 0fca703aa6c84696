"""Which weights are NaN or infinite. Imports torch inside the function."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def not_finite(weights: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Return the tensors that hold NaN or infinity, and how many such values each holds; `{}` where all are finite.

    (`probe.py` asks the same for itself: it runs where none of hub_tools can be seen.)
    """
    import torch

    found = {}
    for name, tensor in weights.items():
        finite = torch.isfinite(tensor)
        if not finite.all():
            found[name] = int((~finite).sum())
    return found
