"""The model card, rendered from facts about the model; nothing in it is invented.

Imports the standard library, huggingface_hub, and of hub_tools `errors`, `layout` and `hub.ask`. What the
metadata mean: https://huggingface.co/docs/hub/model-cards#model-card-metadata.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from .. import layout
from ..errors import OptionsError
from ..hub.ask import is_repository_id

TEMPLATE = Path(__file__).with_name("card_template.md")
TAGS = ("gpt2", "gpt2-value", "value-head", "reinforcement-learning", "ppo")


@dataclass(frozen=True)
class CardFacts:
    """What the card says about a model."""

    parameters: int
    dtype: str
    n_layer: int
    n_embd: int
    n_head: int
    n_positions: int
    vocab_size: int
    has_tokenizer: bool
    versions: dict[str, str]


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
    facts: CardFacts,
    *,
    base_model: str | None = None,
    license: str | None = None,
    tags: Sequence[str] = (),
    repo_id: str | None = None,
) -> ModelCard:
    """Render the card of a package.

    Args:
        facts: what the model is.
        base_model: the Hub id of the model that this one was made from. A local path is refused.
        license: a license's identifier on the Hub, as `apache-2.0`. Left out of the card if not given.
        tags: added to the package's own.
        repo_id: where the package will live; the lines that load it then name it. Without it they load the
            folder that they are run in.

    Raises:
        OptionsError: a value that the Hub would reject, or a local path as `base_model`.
    """
    if base_model is not None and not is_hub_id(base_model):
        raise OptionsError(
            f"base_model {base_model!r} is {'a local path' if os.path.exists(str(base_model)) else 'no Hub id'}",
            expected="the id of a repository on the Hub, as openai-community/gpt2",
            next_step="pass that id, or leave base_model out",
        )
    if repo_id is not None and not is_repository_id(repo_id):
        raise OptionsError(
            f"repo_id {repo_id!r} is not a Hub id",
            expected="user/name",
            next_step="pass such an id, or leave it out",
        )
    if license is not None and not (isinstance(license, str) and re.fullmatch(r"[a-z0-9][a-z0-9.\-]*", license)):
        raise OptionsError(
            f"license {license!r} is not an identifier",
            expected="one of https://huggingface.co/docs/hub/repositories-licenses, as apache-2.0 or mit",
            next_step="pass its identifier, or leave license out",
        )
    if isinstance(tags, str) or not isinstance(tags, Sequence):
        raise OptionsError(f"tags is {tags!r}", expected="a list of words", next_step="correct it, or leave it out")
    for tag in tags:
        if not isinstance(tag, str) or not tag.strip() or "\n" in tag:
            raise OptionsError(f"the tag {tag!r}", expected="a word", next_step="correct it, or leave it out")
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
        facts=facts,
        base=base_model,
        code_files=layout.REMOTE_CODE,
        record=layout.RECORD,
        lines=load_lines(repo_id or ".", tokenizer=facts.has_tokenizer),
        repo_id=repo_id,
    )


def with_repo_id(card: bytes, repo_id: str) -> bytes:
    """Return the card as if it had been rendered with `repo_id`. A card that names a repository is unchanged."""
    found = card
    for tokenizer in (True, False):
        here, there = (load_lines(where, tokenizer=tokenizer) for where in (".", repo_id))
        block = f"In the folder of this package:\n\n```python\n{here}\n```".encode()
        found = found.replace(block, f"```python\n{there}\n```".encode())
    return found
