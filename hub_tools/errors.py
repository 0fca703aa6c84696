"""One exception type per thing a user can fix: what was found, what was expected, what to do next.

Imports only the standard library. Everything that hub_tools refuses, it refuses with one of these types;
catch `GPT2ValueHubError` for all of them.
"""

from __future__ import annotations


def visible(text: str) -> str:
    """`text` with every character that a terminal would obey instead of show, or that reorders what is shown, written
    as its escape. Line breaks stay."""
    return "".join(char if char.isprintable() or char == "\n" else repr(char)[1:-1] for char in text)


LONGEST = 20_000  # characters: names in somebody else's file may have millions


class GPT2ValueHubError(Exception):
    """Base of everything that hub_tools refuses. What it says may come from somebody else's file, so it is escaped, and
    cut off where it is longer than anybody reads.

    Args:
        found: what was found, naming the file, tensor or argument.
        expected: what would have been accepted ("" where `found` says it already).
        next_step: what the user does or types next.
    """

    def __init__(self, found: str, *, expected: str = "", next_step: str) -> None:
        self.found, self.expected, self.next_step = (visible(text[:LONGEST]) for text in (found, expected, next_step))
        lines = [self.found]
        if expected:
            lines.append(f"  expected: {self.expected}")
        lines.append(f"  next: {self.next_step}")
        super().__init__("\n".join(lines))


# Saving


class WrongModelError(GPT2ValueHubError, TypeError):
    """The object to save is no GPT2ValueModel: a wrapper (DDP, PEFT, torch.compile) or another class."""


class MissingHeadError(GPT2ValueHubError, ValueError):
    """A model or a package without its value head."""


class UnsavableWeightsError(GPT2ValueHubError, ValueError):
    """Weights that a package cannot hold: without data, sharded, quantised, untied, or foreign."""


class ProcessesMissingError(GPT2ValueHubError, TimeoutError):
    """A model that is sharded over several processes was to be saved, and not all of them came."""


class NonFiniteWeightsError(GPT2ValueHubError, ValueError):
    """A weight is NaN or infinite."""


class UnsavableConfigError(GPT2ValueHubError, ValueError):
    """A config or a generation_config with values that could not be loaded again."""


class TokenizerMismatchError(GPT2ValueHubError, ValueError):
    """A tokenizer that does not fit the model, or that a package cannot hold."""


class CardMetadataError(GPT2ValueHubError, ValueError):
    """Metadata that the Hub would reject, or that would be untrue (a local path as base model)."""


class FolderRefusedError(GPT2ValueHubError):
    """The folder to save into holds something that is not a package, or cannot be replaced in one step."""


class SaveFailedError(GPT2ValueHubError, OSError):
    """The system refused a write (disk full, no permission). The previous package, if any, is untouched."""


# Reading


class NotAPackageError(GPT2ValueHubError, ValueError):
    """There is no value-head package at this place."""


class MissingFileError(GPT2ValueHubError, ValueError):
    """A file that a package needs is not there."""


class CorruptFileError(GPT2ValueHubError, ValueError):
    """A file is truncated, too large, not what its name says, or holds a value that cannot be right."""


class UnsafeFileError(GPT2ValueHubError, ValueError):
    """A file that leads out of the package (a symbolic link, a path in an index) or is not a regular file."""


class PickleError(GPT2ValueHubError, ValueError):
    """A pickle, which can run code when it is opened. Pickles are named and never opened."""


class NoRoomError(GPT2ValueHubError, OSError):
    """The folder for temporary files has no room for a private copy of what is read."""


class ResourceLimitError(GPT2ValueHubError, RuntimeError):
    """Opening a file took more memory or time than any GPT-2 needs; it was tried in a process of its own."""


class WeightsMismatchError(GPT2ValueHubError, ValueError):
    """The tensors in the files are not those that config.json calls for."""


class CodeReferenceError(GPT2ValueHubError, ValueError):
    """`auto_map` is missing, or names code that is not the package's own (another repository's, say)."""


# Verifying


class ForeignFileError(GPT2ValueHubError, ValueError):
    """A file that does not belong to a package."""


class UntrustedCodeError(GPT2ValueHubError, ValueError):
    """The package's code is not the code of this installed version, and nobody said to run it."""


class ChangedFileError(GPT2ValueHubError, ValueError):
    """A file is not the one that was saved."""


class LoadError(GPT2ValueHubError, RuntimeError):
    """The package does not load, strictly, in a fresh interpreter; `details` is what that one printed."""

    def __init__(self, found: str, *, expected: str = "", next_step: str, details: str = "") -> None:
        super().__init__(found, expected=expected, next_step=next_step)
        self.details = details


class VerificationError(GPT2ValueHubError, ValueError):
    """The package loads but computes other numbers than were recorded when it was saved."""


class VerificationTimeoutError(GPT2ValueHubError, TimeoutError):
    """The fresh interpreter did not finish in time and was stopped."""


# Pushing


class AuthenticationError(GPT2ValueHubError, PermissionError):
    """No token, or one that the Hub does not accept (401)."""


class NoAccessError(GPT2ValueHubError, PermissionError):
    """The token is valid and may not do this (403)."""


class RemoteNotFoundError(GPT2ValueHubError, LookupError):
    """There is no such repository or branch on the Hub (404), or not for this token."""


class HubRefusedError(GPT2ValueHubError):
    """The Hub refused a request for a reason that waiting does not mend."""


class HubUnavailableError(GPT2ValueHubError, ConnectionError):
    """The Hub could not be reached, or kept failing in ways that pass (409, 429, 5xx, broken connections)."""


class ConcurrentPushError(GPT2ValueHubError):
    """Somebody else pushed to the branch since it was read. Theirs stands; ours was not committed."""


class PackageChangedError(GPT2ValueHubError):
    """The package was written to while it was being pushed. Nothing was committed."""


class SecretFoundError(GPT2ValueHubError, ValueError):
    """A file or message that would have published a token. The message does not repeat it."""


class PushOptionsError(GPT2ValueHubError, ValueError):
    """Arguments of a push that contradict each other, or the repository as it is."""


class TagExistsError(GPT2ValueHubError, ValueError):
    """Another commit carries this tag already."""


class CheckpointPushError(GPT2ValueHubError, RuntimeError):
    """A checkpoint did not reach the Hub. `step` says which one, and `__cause__` why."""

    def __init__(self, found: str, *, expected: str = "", next_step: str, step: int) -> None:
        super().__init__(found, expected=expected, next_step=next_step)
        self.step = step


class WorkerDiedError(GPT2ValueHubError, RuntimeError):
    """The process that pushes checkpoints ended unexpectedly: killed, out of memory, or by an error of ours."""


class PusherClosedError(GPT2ValueHubError, RuntimeError):
    """A CheckpointPusher that is closed, or that belongs to the process this one was forked from."""


# Converting


class UnsafePickleError(PickleError):
    """A pickle that asks for more than tensors. It was refused before anything of it ran."""


class UnsupportedModelError(GPT2ValueHubError, ValueError):
    """A checkpoint whose body is not a GPT-2 language model, or is in a form that has no conversion."""


class UnconvertibleHeadError(GPT2ValueHubError, ValueError):
    """A head that one linear layer to one value per token cannot express."""


class AmbiguousSourceError(GPT2ValueHubError, ValueError):
    """A checkpoint that can be read in two ways that give different models."""


class UnusedOptionError(GPT2ValueHubError, ValueError):
    """An option that this source has no use for, or a word that the option does not know."""


# Generating


class DishonestSettingError(GPT2ValueHubError, ValueError):
    """A setting of `generate()` that tokens could be drawn by, and not be scored by."""


# The command line and the app


class MissingLibraryError(GPT2ValueHubError, ImportError):
    """A library of an extra (`pip install 'gpt2-value[app]'`) is not installed."""


class SourceError(GPT2ValueHubError, ValueError):
    """A model, revision or tokenizer that was asked for by name could not be found or read."""
