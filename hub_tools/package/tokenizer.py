"""Load a tokenizer that somebody else made: tried first in a process of its own, then loaded without running code.

Imports the standard library, of hub_tools `errors`, `limits`, `library_errors` and `limited_process`, and transformers
inside the functions that need it. `try_tokenizer.py` is run, not imported.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from .. import limits
from ..errors import GPT2ValueHubError, LoadError, ResourceLimitError, as_ours
from ..files import AGAIN
from ..limited_process import run_limited, search_path_of

SCRIPT = Path(__file__).with_name("try_tokenizer.py")


def load_tokenizer(folder: Path, source: str, *, config: Any = None) -> Any:
    """Load the tokenizer in `folder`, without running any code of it.

    Args:
        folder: a private copy whose settings were reduced: see `stage.make_loadable`.
        source: its name in errors, and the tokenizer's `name_or_path`.
        config: the model's config, which gives the tokenizer's class if the tokenizer's settings do not.

    Raises:
        ResourceLimitError: opening it, or using it, took more memory or time than `limits` allows.
        LoadError: its files are not complete, transformers cannot load them, or their class is not a tokenizer's.
    """
    if (folder / "tokenizer.json").is_file():
        try_in_a_process(folder, source)
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    options = {} if config is None else {"config": config}
    with as_ours(lambda gist: _does_not_load(source, gist)):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True, **options)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):  # such as RagTokenizer, a pair of them
        raise _does_not_load(source, f"its class is {type(tokenizer).__name__}, which is not a PreTrainedTokenizerBase")
    tokenizer.name_or_path = source
    return tokenizer


def try_in_a_process(folder: Path, source: str) -> None:
    """Open and use `tokenizer.json` in a process with limits; see `try_tokenizer`.

    Raises:
        ResourceLimitError, LoadError: see `load_tokenizer`.
    """
    try:
        done = run_limited(
            SCRIPT,
            str(folder),
            str(limits.TOKENS_PER_CHARACTER),
            *search_path_of("tokenizers"),
            limits={"RLIMIT_AS": limits.TOKENIZER_MEMORY, "RLIMIT_CPU": int(limits.TOKENIZER_SECONDS)},
            seconds=limits.WAITING * limits.TOKENIZER_SECONDS,
            # one thread, because every thread takes address space, and that is limited
            environment={"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "MALLOC_ARENA_MAX": "2"},
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
        )
    except subprocess.TimeoutExpired as error:
        raise _too_much(source, f"that did not end in {error.timeout:g} s") from error
    if done.returncode == 0:
        return
    lines = done.stderr.strip().splitlines() or ["no message"]
    if done.returncode < 0:
        raise _too_much(source, f"that was ended by signal {-done.returncode}: {lines[0]}")
    if "MemoryError" in lines[-1] or "tokens of a text" in lines[-1]:
        raise _too_much(source, lines[-1])
    raise _does_not_load(source, lines[-1])


def _too_much(source: str, what: str) -> GPT2ValueHubError:
    return ResourceLimitError(
        f"the tokenizer of {source} was tried in a process of its own, and {what[:300]}",
        expected=f"a tokenizer that needs at most {limits.TOKENIZER_MEMORY >> 30} GiB and "
        f"{limits.TOKENIZER_SECONDS:g} s of processor time",
        next_step="do not use it; load the model without it, or ask its author",
    )


def _does_not_load(source: str, gist: str) -> GPT2ValueHubError:
    return LoadError(
        f"{source} does not load, because of its tokenizer: {gist}",
        expected="a tokenizer that this version of transformers can load",
        next_step=AGAIN,
    )
