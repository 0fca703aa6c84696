"""GPT-2 with a value head: every public name of the project, from sampling and scoring to PPO and the Hub.

Each name is imported when it is first used, so `import gpt2_value` needs neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from configuration_gpt2_value import GPT2ValueConfig
    from generation_gpt2_value import Rollout, respond_to_batch, rollout
    from gpt2_value.critic import FittedValues, create_reference, fit_values
    from gpt2_value.ppo import (
        AdaptiveKLController,
        PPOSettings,
        advantages_and_returns,
        explained_variance,
        kl_estimate,
        masked_mean,
        policy_loss,
        token_rewards,
        train,
        value_loss,
        whiten,
    )
    from gpt2_value.view import Page, show
    from hub_tools import (
        CheckpointPusher,
        CheckpointPusherCallback,
        Conversion,
        ExportedPolicy,
        GPT2ValueHubError,
        LoadedPackage,
        PackageReport,
        PushedCheckpoint,
        PushReport,
        SavedPackage,
        VerificationReport,
        __version__,
        convert_checkpoint,
        export_critic,
        export_policy,
        inspect_package,
        load_package,
        push_package,
        push_to_hub,
        save_package,
        verify_package,
    )
    from modeling_gpt2_value import GPT2HeadWithValueModel, GPT2ValueModel, GPT2ValueOutput
    from sampler_audit import (
        Mismatch,
        SamplerAudit,
        audit_sampler,
        find_kept_sets,
        mismatch,
        rollout_from_tokens,
    )
    from sampling_gpt2_value import Sampling
    from scoring_gpt2_value import Rescored, rescore

__all__ = [
    "AdaptiveKLController",
    "CheckpointPusher",
    "CheckpointPusherCallback",
    "Conversion",
    "ExportedPolicy",
    "FittedValues",
    "GPT2HeadWithValueModel",
    "GPT2ValueConfig",
    "GPT2ValueHubError",
    "GPT2ValueModel",
    "GPT2ValueOutput",
    "LoadedPackage",
    "Mismatch",
    "PPOSettings",
    "PackageReport",
    "Page",
    "PushReport",
    "PushedCheckpoint",
    "Rescored",
    "Rollout",
    "SamplerAudit",
    "Sampling",
    "SavedPackage",
    "VerificationReport",
    "__version__",
    "advantages_and_returns",
    "audit_sampler",
    "convert_checkpoint",
    "create_reference",
    "explained_variance",
    "export_critic",
    "export_policy",
    "find_kept_sets",
    "fit_values",
    "inspect_package",
    "kl_estimate",
    "load_package",
    "masked_mean",
    "mismatch",
    "policy_loss",
    "push_package",
    "push_to_hub",
    "rescore",
    "respond_to_batch",
    "rollout",
    "rollout_from_tokens",
    "save_package",
    "show",
    "token_rewards",
    "train",
    "value_loss",
    "verify_package",
    "whiten",
]

# module -> the names that it defines; all others are of hub_tools
_NAMES = {
    "configuration_gpt2_value": ["GPT2ValueConfig"],
    "generation_gpt2_value": ["Rollout", "respond_to_batch", "rollout"],
    "gpt2_value.view": ["Page", "show"],
    "modeling_gpt2_value": ["GPT2HeadWithValueModel", "GPT2ValueModel", "GPT2ValueOutput"],
    "sampling_gpt2_value": ["Sampling"],
    "scoring_gpt2_value": ["Rescored", "rescore"],
    "gpt2_value.critic": ["FittedValues", "create_reference", "fit_values"],
    "gpt2_value.ppo": [
        "PPOSettings",
        "AdaptiveKLController",
        "advantages_and_returns",
        "explained_variance",
        "kl_estimate",
        "masked_mean",
        "policy_loss",
        "token_rewards",
        "train",
        "value_loss",
        "whiten",
    ],
    "sampler_audit": [
        "Mismatch",
        "SamplerAudit",
        "audit_sampler",
        "find_kept_sets",
        "mismatch",
        "rollout_from_tokens",
    ],
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_MODULES.get(name, "hub_tools")), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
