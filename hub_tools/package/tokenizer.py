"""A package's tokenizer: tried in a process of its own and loaded without running code; checked and written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .. import layout, limits
from ..errors import AGAIN, LoadError, TokenizerMismatchError, as_ours
from ..limited_process import failure_of, run_limited, search_path_of

SCRIPT = Path(__file__).with_name("try_tokenizer.py")


def load_tokenizer(folder: Path, source: str, *, config: Any) -> Any:
    """Load the tokenizer in `folder`, without running any code of it. First it is tried, in a process with limits.

    Args:
        folder: a private copy whose settings were reduced: see `stage.make_loadable`.
        source: its name in errors, and the tokenizer's `name_or_path`.
        config: the model's config, which gives the tokenizer's class if the tokenizer's settings do not.

    Raises:
        LoadError: its files are not complete, transformers cannot load them, or opening or using it took more memory or
            time than `limits` allows.
    """

    def failed(gist: str) -> LoadError:
        return LoadError(
            f"{source} does not load, because of its tokenizer: {gist}",
            expected="a tokenizer that this version of transformers can load, that needs at most "
            f"{limits.TOKENIZER_MEMORY >> 30} GiB and {limits.TOKENIZER_SECONDS:g} s of processor time, with tokens of "
            f"at most {limits.TOKEN_CHARACTERS:,} characters",
            next_step=AGAIN,
        )

    trial = run_limited(
        SCRIPT,
        str(folder),
        str(limits.TEXT_GROWTH),
        str(limits.TOKEN_CHARACTERS),
        *search_path_of("tokenizers"),
        limits={"RLIMIT_AS": limits.TOKENIZER_MEMORY, "RLIMIT_CPU": int(limits.TOKENIZER_SECONDS)},
        seconds=limits.WAITING * limits.TOKENIZER_SECONDS,
        # one thread, because every thread takes address space, and that is limited
        environment={"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "MALLOC_ARENA_MAX": "2"},
    )
    if problem := failure_of(trial):
        raise failed(f"its trial failed: {problem}")
    from transformers import AutoTokenizer

    with as_ours(failed):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True, config=config)
    tokenizer.name_or_path = source
    return tokenizer


def check_tokenizer(tokenizer: Any, vocab_size: int) -> None:
    """Refuse a tokenizer that no package can hold, or that does not fit a vocabulary of this size.

    Raises:
        TokenizerMismatchError.
    """
    from transformers import PreTrainedTokenizerBase

    def misfit(found: str) -> TokenizerMismatchError:
        return TokenizerMismatchError(
            f"the tokenizer, a {type(tokenizer).__name__}: {found}",
            expected=f"a transformers tokenizer that reads any text, with ids below {vocab_size}",
            next_step="load it from where its files are (version 5 makes an empty one where it finds none); where "
            "tokens were added, model.resize_token_embeddings(len(tokenizer))",
        )

    with as_ours(misfit):
        special = set(getattr(tokenizer, "all_special_tokens", ()))
        if not isinstance(tokenizer, PreTrainedTokenizerBase) or set(tokenizer.get_vocab()) <= special:
            raise misfit("it has no tokens but special ones")
        if (largest := max(tokenizer.get_vocab().values())) >= vocab_size:
            raise misfit(f"it has the id {largest}")
        tokenizer("any text")


def write_tokenizer(folder: Path, tokenizer: Any) -> None:
    """Write the tokenizer's files, so that both transformers 4 and 5 can read them.

    Version 5 renames two settings in `tokenizer_config.json`, and still reads the old names, so those are written. It
    also records how the tokenizer was loaded here, which is removed.

    Raises:
        TokenizerMismatchError: it wrote files that have no place in a package.
    """
    tokenizer.save_pretrained(folder)
    foreign = sorted(path.name for path in folder.iterdir() if not layout.written_by_save(path.name))
    if foreign:
        raise TokenizerMismatchError(
            f"the tokenizer wrote {foreign}, which have no place in a package",
            expected=f"some of {sorted(layout.TOKENIZER)}",
            next_step="use a tokenizer of transformers' own, without code; a fast one: use_fast=True",
        )
    path = folder / layout.TOKENIZER_CONFIG
    settings = json.loads(path.read_text(encoding="utf-8"))
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    for name in ("backend", "is_local", "local_files_only", "name_or_path"):
        settings.pop(name, None)
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
