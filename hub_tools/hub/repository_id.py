"""What may be the id of a repository on the Hub: huggingface_hub's own rule.

Imports the standard library and huggingface_hub.
"""

from __future__ import annotations

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


def is_repository_id(text: object) -> bool:
    """Whether `text` can be a repository's id: `owner/name`, or a `name` without an owner, as `gpt2`. Whether there is
    such a repository, only the Hub can tell."""
    if not isinstance(text, str) or text.endswith("\n"):  # which their rule overlooks
        return False
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True
