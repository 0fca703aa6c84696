"""From a model in memory to a repository on the Hub: save, inspect, verify, load, push, convert, export.

Names are imported when they are first used, so that looking into a package needs neither torch nor
transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .layout import __version__

if TYPE_CHECKING:
    from .convert.convert import Conversion, convert_checkpoint
    from .convert.export import ExportedPolicy, export_critic, export_policy
    from .errors import GPT2ValueHubError
    from .package.inspect import PackageReport, inspect_package
    from .package.load import LoadedPackage, load_package
    from .package.save import SavedPackage, save_package
    from .package.verify import VerificationReport, verify_package
    from .publish.checkpoints import CheckpointPusher, CheckpointPusherCallback, PushedCheckpoint
    from .publish.push import PushReport, push_package, push_to_hub

_HOMES = {
    "CheckpointPusher": "publish.checkpoints",
    "CheckpointPusherCallback": "publish.checkpoints",
    "PushedCheckpoint": "publish.checkpoints",
    "Conversion": "convert.convert",
    "convert_checkpoint": "convert.convert",
    "export_critic": "convert.export",
    "ExportedPolicy": "convert.export",
    "export_policy": "convert.export",
    "GPT2ValueHubError": "errors",
    "LoadedPackage": "package.load",
    "PackageReport": "package.inspect",
    "inspect_package": "package.inspect",
    "load_package": "package.load",
    "PushReport": "publish.push",
    "push_package": "publish.push",
    "push_to_hub": "publish.push",
    "SavedPackage": "package.save",
    "save_package": "package.save",
    "VerificationReport": "package.verify",
    "verify_package": "package.verify",
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
    "export_critic",
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
