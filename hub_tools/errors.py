"""One exception type per thing a user can fix: what was found, what was expected, what to do next.

Imports only the standard library. Everything that hub_tools refuses, it refuses with one of these types;
catch `GPT2ValueHubError` for all of them.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager


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


class UnsavableModelError(GPT2ValueHubError, ValueError):
    """A model that no package can hold: another class, a wrapper, weights that are sharded over absent processes,
    quantised, not finite or foreign, a config that could not be loaded again, or numbers that a copy does not give."""


class MissingHeadError(GPT2ValueHubError, ValueError):
    """A model, a package or a checkpoint without its value head."""


class TokenizerMismatchError(GPT2ValueHubError, ValueError):
    """A tokenizer that does not fit the model, or that a package cannot hold."""


class FolderRefusedError(GPT2ValueHubError):
    """The folder to save into holds something that is not a package."""


class SaveFailedError(GPT2ValueHubError, OSError):
    """The system refused a write (disk full, no permission). The previous package, if any, is untouched."""


# Reading

AGAIN = "download the package again, or write it again with hub_tools.save_package"


class PackageError(GPT2ValueHubError, ValueError):
    """A file of a package or checkpoint is missing, damaged, too large, unsafe (a pickle, a link that leads out), or
    not what the other files call for."""

    def __init__(self, found: str, *, next_step: str = AGAIN, **said: str) -> None:
        super().__init__(found, next_step=next_step, **said)


class NotAPackageError(PackageError):
    """There is no value-head package at this place."""


class ResourceLimitError(GPT2ValueHubError, RuntimeError):
    """The folder for temporary files has no room for a private copy."""


# Verifying


class UntrustedCodeError(GPT2ValueHubError, ValueError):
    """The package's code is not the code of this installed version, and nobody said to run it."""


class ChangedFileError(GPT2ValueHubError, ValueError):
    """A file is not the one that was saved."""


class LoadError(GPT2ValueHubError, RuntimeError):
    """A package or its tokenizer does not load, strictly, within bounds of memory and time; `details` is what a fresh
    interpreter printed."""

    def __init__(self, found: str, *, details: str = "", **said: str) -> None:
        super().__init__(found, **said)
        self.details = details


class VerificationError(GPT2ValueHubError, ValueError):
    """The package loads but computes other numbers than were recorded when it was saved."""


# Pushing


class OptionsError(GPT2ValueHubError, ValueError):
    """Arguments that contradict each other or what they are applied to, or that would have no effect."""


class AuthenticationError(GPT2ValueHubError, PermissionError):
    """No token, one that the Hub does not accept (401), or one that may not do this (403)."""


class RemoteNotFoundError(GPT2ValueHubError, LookupError):
    """There is no such repository or branch on the Hub (404), or not for this token."""


class HubRefusedError(GPT2ValueHubError):
    """The Hub refused a request for a reason that waiting does not mend."""


class HubUnavailableError(GPT2ValueHubError, ConnectionError):
    """The Hub could not be reached, or kept failing in ways that pass (409, 429, 5xx, broken connections)."""


class ConcurrentPushError(GPT2ValueHubError):
    """Somebody else pushed to the branch since it was read. Theirs stands; ours was not committed."""


class SecretFoundError(GPT2ValueHubError, ValueError):
    """A file or message that would have published a token. The message does not repeat it."""


class CheckpointPushError(GPT2ValueHubError, RuntimeError):
    """A checkpoint did not reach the Hub: `step` says which one, and `__cause__` why. Or the pusher cannot be used: it
    is closed, or another process's."""

    def __init__(self, found: str, *, step: int | None = None, **said: str) -> None:
        super().__init__(found, **said)
        self.step = step


# Converting


class ConversionError(GPT2ValueHubError, ValueError):
    """A checkpoint that is no GPT-2 language model, whose head is not one linear layer to one value per token, or that
    can be read in two ways."""


# The command line and the app


class MissingLibraryError(GPT2ValueHubError, ImportError):
    """A library that this needs is not installed; the message says which, and how to install it."""


class SourceError(GPT2ValueHubError, ValueError):
    """A model, revision or tokenizer that was asked for by name could not be found or read."""


# From errors of libraries to errors of ours

# transformers, torch, tokenizers, safetensors and huggingface_hub raise any of these for a file that is not as they
# expect, depending on where the damage lies.
_BUILTIN = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    NameError,  # a mistake of the library's, in lines that only this input reaches
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    pickle.PickleError,
)
# Theirs by name, since a library need not be imported; the last is where tokenizers' Rust code panics.
_FOREIGN = {"HfHubHTTPError", "StrictDataclassError", "TemplateError", "YAMLError", "SafetensorError", "PanicException"}


@contextmanager
def as_ours(error: Callable[[str], GPT2ValueHubError]) -> Iterator[None]:
    """Raise `error(gist)` for what a library raises in the block; `gist` is one line that says what was wrong.

    Errors of ours pass through as they are, and so does whatever no library raises for its input: KeyboardInterrupt,
    SystemError, and exceptions of unknown types.
    """
    try:
        yield
    except GPT2ValueHubError:
        raise
    except BaseException as caught:
        if not _is_for_input(caught):
            raise
        raise error(gist(caught)) from caught


def gist(error: BaseException) -> str:
    """Return what an exception says, on one line of at most 500 characters."""
    return " ".join(str(error).split())[:500] or type(error).__name__


def _is_for_input(error: BaseException) -> bool:
    names = {kind.__name__ for kind in type(error).__mro__}
    # tokenizers raises bare Exceptions
    return type(error) is Exception or isinstance(error, _BUILTIN) or not names.isdisjoint(_FOREIGN)
