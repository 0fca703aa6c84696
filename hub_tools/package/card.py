"""The model card, rendered from facts about the model; nothing in it is invented.

What the metadata mean: https://huggingface.co/docs/hub/model-cards#model-card-metadata.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from .. import layout
from ..errors import OptionsError
from ..hub.ask import is_repository_id

TEMPLATE = Path(__file__).with_name("card_template.md")
TAGS = ("gpt2", "gpt2-value", "value-head", "reinforcement-learning", "ppo")
IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9.\-]*")
WORDS = re.compile(r"\S(.*\S)?")  # on one line


def is_hub_id(text: object) -> bool:
    """Whether `text` has the form of a repository's id on the Hub (`gpt2`, `openai-community/gpt2`), and is not the
    name of a local file or folder. (transformers prefers a local folder.)"""
    return is_repository_id(text) and not os.path.exists(str(text))


def load_lines(where: str, *, tokenizer: bool, revision: str | None = None) -> str:
    """Return the Python lines that load a package. `where` is a folder, or a repository's id; `revision` pins the
    latter to a commit, tag or branch."""
    pinned = "" if revision is None else f", revision={json.dumps(revision)}"
    arguments = f"{json.dumps(where)}{pinned}, trust_remote_code=True"
    lines = [
        f"from transformers import AutoModel{', AutoTokenizer' if tokenizer else ''}",
        f"model = AutoModel.from_pretrained({arguments})",
    ]
    if tokenizer:
        # trust_remote_code is needed here too: transformers 5 first reads the config, whose class is in the package
        lines.append(f"tokenizer = AutoTokenizer.from_pretrained({arguments})")
    return "\n".join(lines)


def render_card(
    model: Any,
    versions: Mapping[str, str],
    *,
    tokenizer: bool,
    base_model: str | None = None,
    license: str | None = None,
    tags: Sequence[str] = (),
    repo_id: str | None = None,
) -> ModelCard:
    """Render the card of a package.

    Args:
        model: the `GPT2ValueModel` that it holds.
        versions: of the libraries that write it.
        tokenizer: whether it has one.
        base_model: the Hub id of the model that this one was made from. A local path is refused.
        license: a license's identifier on the Hub, as `apache-2.0`. Left out of the card if not given.
        tags: added to the package's own.
        repo_id: where the package will live; the lines that load it then name it. Without it they load the
            folder that they are run in.

    Raises:
        OptionsError: a value that the Hub would reject, or a local path as `base_model`.
    """
    words = isinstance(tags, Sequence) and all(isinstance(tag, str) and WORDS.fullmatch(tag) for tag in tags)
    for name, value, fits in (
        ("base_model", base_model, is_hub_id(base_model)),
        ("repo_id", repo_id, is_repository_id(repo_id)),
        ("license", license, isinstance(license, str) and IDENTIFIER.fullmatch(license)),
        ("tags", tags, words and not isinstance(tags, str)),
    ):
        if value is not None and not fits:
            raise OptionsError(
                f"{name}={value!r}",
                expected="base_model and repo_id: ids on the Hub, as openai-community/gpt2, and no folders; license: "
                "an identifier of https://huggingface.co/docs/hub/repositories-licenses; tags: a list of words",
                next_step="correct it, or leave it out",
            )
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[*TAGS, *tags],
        base_model=base_model,
        license=license,
    )
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        model=model,
        versions=versions,
        tokenizer=tokenizer,
        code_files=layout.REMOTE_CODE,
        lines=load_lines(repo_id or ".", tokenizer=tokenizer),
        repo_id=repo_id,
    )


def with_repo_id(card: bytes, repo_id: str) -> bytes:
    """Return the card as if it had been rendered with `repo_id`. A card that names a repository is unchanged."""
    named = card.replace(b'from_pretrained(".", ', f"from_pretrained({json.dumps(repo_id)}, ".encode())
    return named.replace(b"In the folder of this package:\n\n", b"")
