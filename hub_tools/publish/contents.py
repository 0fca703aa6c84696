"""What a push makes of a repository's root: the package's files, and of the others those that no loader reads.

Imports of hub_tools `errors`, `files`, `layout`; and PyYAML, which comes with huggingface_hub.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import metadata_load, metadata_save

from .. import layout
from ..errors import NotAPackageError, OptionsError, PackageError
from ..files import open_in

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


def read_by_a_loader(name: str) -> bool:
    """Whether a loader of transformers or peft would read a file of this name in a repository, or code of ours would.

    A push removes those that the package does not have: beside new weights they would be another model's.
    """
    if "/" in name:
        return name.startswith(_READ_IN)
    return _READ.fullmatch(name) is not None or name == layout.RECORD


def copy_package(folder: Path, into: Path) -> Path:
    """Copy a package to a private folder, each file once, and return that folder. It is checked, and pushed from there.

    Raises:
        NotAPackageError: no such folder.
        PackageError: a file that does not belong to a package, or is no regular file in it.
    """
    if not folder.is_dir():
        raise NotAPackageError(
            f"{os.fspath(folder)!r} is not a folder",
            expected="the folder of a package",
            next_step="write one: hub_tools.save_package(model, FOLDER)",
        )
    names = sorted(name for name in os.listdir(folder) if layout.kind_of(name) != "litter")
    strange = [n for n in names if layout.kind_of(n) in ("foreign", "pickle") or (n[0] == "." and n != ".gitignore")]
    if strange:
        raise PackageError(
            f"{', '.join(map(repr, strange))} do not belong to a package; nothing was uploaded",
            expected="the files that save_package writes, and documents such as a license; no pickles",
            next_step="move them out of the folder; push other files on their own: hf upload",
        )
    into.mkdir(mode=0o700)
    for name in names:
        with open_in(folder, name) as original, open(into / name, "xb") as copy:
            shutil.copyfileobj(original, copy, 1 << 20)
    return into


def merge_cards(ours: Path, theirs: Path) -> None:
    """Merge the repository's card (`theirs`) into the package's (`ours`).

    The text of theirs stays. Our metadata keys replace theirs, tags are united, and their other keys stay. If theirs
    has no text (the Hub's web page makes such a card from a license), it also gets our text.

    Raises:
        OptionsError: their metadata cannot be read.
    """
    try:
        kept: dict[str, Any] = metadata_load(theirs) or {}
        added: dict[str, Any] = metadata_load(ours) or {}
    except (ValueError, yaml.YAMLError) as error:
        raise OptionsError(
            f"the metadata of the README.md in the repository cannot be read: {' '.join(str(error).split())[:300]}",
            expected="a block of YAML between two lines of ---",
            next_step="correct it on the Hub, or delete that file there to get a new card",
        ) from error
    tags = kept.get("tags") or []
    tags = [tags] if isinstance(tags, str) else tags
    merged = {**kept, **added}
    if tags or added.get("tags"):
        merged["tags"] = [*tags, *(tag for tag in added.get("tags", []) if tag not in tags)]
    text = theirs.read_bytes()
    if re.sub(rb"\A\s*---\r?\n.*?\n---", b"", text, count=1, flags=re.DOTALL).strip():
        ours.write_bytes(text)
        if merged == kept:
            return
    metadata_save(ours, merged)
