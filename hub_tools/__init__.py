"""What happens between a model in memory and a repository on the Hub: save, inspect, verify.

Names are imported when they are first used, so that looking into a package needs neither torch nor
transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .layout import __version__

if TYPE_CHECKING:
    from .checkpoint_pusher import CheckpointPusher
    from .checkpoint_worker import PushedCheckpoint
    from .convert import Conversion, convert_checkpoint
    from .errors import GPT2ValueHubError
    from .export import ExportedPolicy, export_policy
    from .inspection import PackageReport, inspect_package
    from .load import LoadedPackage, load_package
    from .push import PushReport, push_package, push_to_hub
    from .save import SavedPackage, save_package
    from .trainer_callback import CheckpointPusherCallback
    from .verify import VerificationReport, verify_package

_HOMES = {
    "CheckpointPusher": "checkpoint_pusher",
    "CheckpointPusherCallback": "trainer_callback",
    "PushedCheckpoint": "checkpoint_worker",
    "Conversion": "convert",
    "convert_checkpoint": "convert",
    "ExportedPolicy": "export",
    "export_policy": "export",
    "GPT2ValueHubError": "errors",
    "LoadedPackage": "load",
    "PackageReport": "inspection",
    "inspect_package": "inspection",
    "load_package": "load",
    "PushReport": "push",
    "push_package": "push",
    "push_to_hub": "push",
    "SavedPackage": "save",
    "save_package": "save",
    "VerificationReport": "verify",
    "verify_package": "verify",
}

__all__ = [
    "CheckpointPusher",
    "CheckpointPusherCallback",
    "Conversion",
    "ExportedPolicy",
    "GPT2ValueHubError",
    "LoadedPackage",
    "PackageReport",
    "PushReport",
    "PushedCheckpoint",
    "SavedPackage",
    "VerificationReport",
    "__version__",
    "convert_checkpoint",
    "export_policy",
    "inspect_package",
    "load_package",
    "push_package",
    "push_to_hub",
    "save_package",
    "verify_package",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
