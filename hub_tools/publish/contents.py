"""What a push makes of a repository's root: the package's files, without tokens in them, and of the others those that
no loader reads.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import metadata_load, metadata_save

from .. import layout, limits
from ..errors import OptionsError, PackageError, SecretFoundError, as_ours

# The files that `from_pretrained` of transformers or peft looks up in a repository: by their names, or by their
# suffixes where a loader takes any name. Pickles have suffixes that other files have as well (training_args.bin).
_READ = re.compile(
    r"""
    .*\.(safetensors|gguf|h5|msgpack|onnx|index\.json|ckpt(\..*)?)   # weights and their indices, whatever their stems
    | (pytorch_model|adapter_model|model|value_head|v_head)\b.*\.(bin|pt|pth)
    | ((adapter|audio_tokenizer|generation|(video_)?preprocessor|processor|tokenizer)_)?config(\.\d[\d.]*)?\.json
    | .*\.(jinja|model|spm|tiktoken|tokenizer)                       # chat templates, vocabularies
    | (tokenizer|vocab|target_vocab|source_vocab)\b.*\.(json|txt|bin|pkl)
    | (added_tokens|artists|byte_maps|chat_template|emoji|entity_vocab|genres|lyrics|normalizer|special_tokens_map
      |tekken|word_pronunciation|word_shape)\.json
    | merges\.txt | dict\.txt | bpe\.codes
    | .*_gpt2_value\.py                                              # code with our names
    """,
    re.VERBOSE | re.DOTALL,
)
_READ_IN = ("additional_chat_templates/", "custom_generate/")  # the folders in which they look
# User and organisation tokens, and those of OAuth and of jobs, which are JSON web tokens. No \b before them: a token
# after an underscore is one, too.
_TOKEN = re.compile(rb"(hf|api_org)_[A-Za-z0-9]{30,}|hf_(oauth|jwt)_[A-Za-z0-9_.\-]{30,}")
_ESCAPE = re.compile(rb"\\+(?:u00|x|U000000)([0-9A-Fa-f]{2})")  # of JSON, Python and YAML


def read_by_a_loader(name: str) -> bool:
    """Whether a loader of transformers or peft would read a file of this name in a repository, or code of ours would.

    A push removes those that the package does not have: beside new weights they would be another model's.
    """
    if "/" in name:
        return name.startswith(_READ_IN)
    return _READ.fullmatch(name) is not None or name == layout.RECORD


def limit_of(name: str) -> int | None:
    """Return the most bytes that a file may have which a push sends; None for what tools leave in a folder.

    Raises:
        PackageError: a file that does not belong to a package.
    """
    kind = layout.kind_of(name)
    if kind in ("foreign", "pickle"):
        raise PackageError(
            f"{name!r} does not belong to a package; nothing was uploaded",
            expected="the files that save_package writes, and documents such as a license; no pickles",
            next_step="move it out of the folder; push other files on their own: hf upload",
        )
    return None if kind == "litter" else limits.WEIGHT_BYTES_AT_MOST


def merge_cards(ours: Path, theirs: Path) -> None:
    """Merge the repository's card (`theirs`) into the package's (`ours`).

    The text of theirs stays. Our metadata keys replace theirs, tags are united, and their other keys stay. If theirs
    has no text (the Hub's web page makes such a card from a license), it also gets our text.

    Raises:
        OptionsError: their metadata cannot be read.
    """
    with as_ours(
        lambda gist: OptionsError(
            f"the metadata of the README.md in the repository cannot be read: {gist}",
            next_step="correct it on the Hub, or delete that file there to get a new card",
        )
    ):
        kept: dict[str, Any] = metadata_load(theirs) or {}
        added: dict[str, Any] = metadata_load(ours) or {}
    tags = kept.get("tags") or []
    tags = [tags] if isinstance(tags, str) else tags
    tags = [*tags, *(tag for tag in added.get("tags", []) if tag not in tags)]
    merged = {**kept, **added, "tags": tags}
    text = theirs.read_bytes()
    if re.sub(rb"\A\s*---\r?\n.*?\n---", b"", text, count=1, flags=re.DOTALL).strip():
        ours.write_bytes(text)
        if merged == kept:
            return
    metadata_save(ours, merged)


def refuse_tokens(folder: Path, words: Mapping[str, str], token: str) -> None:
    """Refuse to publish a token, the one in use or any other, as it is or escaped, in UTF-8, UTF-16 or UTF-32.

    Args:
        folder: the files; of safetensors the start is read, which has the header.
        words: what each text is, for the message -> the text.
        token: the one in use.

    Raises:
        SecretFoundError: names where it is, and does not repeat it.
    """
    texts = {what: text.encode() for what, text in words.items()}
    for path in folder.iterdir():
        with open(path, "rb") as file:
            texts[path.name] = file.read(limits.HEADER_BYTES if path.suffix == ".safetensors" else -1)
        texts[f"the name of file {len(texts)}"] = os.fsencode(path.name)
    for where, text in texts.items():
        narrow = text.replace(b"\0", b"")
        plain = _ESCAPE.sub(lambda found: bytes([int(found[1], 16)]), narrow)
        if any((token and token.encode() in data) or _TOKEN.search(data) for data in (text, narrow, plain)):
            raise SecretFoundError(
                f"{where} holds what looks like a Hub token; nothing was uploaded",
                next_step="take it out; if it was ever published, revoke it in the Hub's settings",
            )
