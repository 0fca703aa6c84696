"""Turn what libraries raise for input that they cannot use into errors of ours.

Imports the standard library and of hub_tools `errors`; the libraries' own types are looked up once they are imported.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .errors import GPT2ValueHubError

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
_FOREIGN = {
    "huggingface_hub.errors": ("HfHubHTTPError", "StrictDataclassError"),
    "jinja2.exceptions": ("TemplateError",),
    "safetensors": ("SafetensorError",),
}


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
    foreign = tuple(
        getattr(sys.modules[module], name)
        for module, names in _FOREIGN.items()
        if module in sys.modules
        for name in names
        if hasattr(sys.modules[module], name)
    )
    # tokenizers raises bare Exceptions, and where its Rust code panics something that is not even an Exception
    bare = type(error) is Exception or type(error).__name__ == "PanicException"
    return bare or isinstance(error, (*_BUILTIN, *foreign))
