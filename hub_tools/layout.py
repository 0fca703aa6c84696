"""The files of a package: which must be there, which may be, and what each of the others is.

Background: https://huggingface.co/docs/transformers/custom_models (code in
a repository) and https://huggingface.co/docs/safetensors (the weights' file format).
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

__version__ = "0.3.0"

MODEL_TYPE = "gpt2_value"
HEAD_PREFIX = "v_head."

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
CARD = "README.md"
RECORD = "verification.json"  # a probe's logits and values, and hashes of all files but the card, as they were saved
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"model-[0-9]{5}-of-[0-9]{5}\.safetensors")

REMOTE_CODE = (
    "configuration_gpt2_value.py",
    "decoding_gpt2_value.py",
    "generation_gpt2_value.py",
    "modeling_gpt2_value.py",
    "sampling_gpt2_value.py",
    "scoring_gpt2_value.py",
)
AUTO_MAP = {
    "AutoConfig": "configuration_gpt2_value.GPT2ValueConfig",
    "AutoModel": "modeling_gpt2_value.GPT2ValueModel",
    "AutoModelForCausalLM": "modeling_gpt2_value.GPT2ValueModel",
}

# What an Inference Endpoint runs in the place of its own pipeline: its owner's (see examples/handler.py). Loading a
# package does not run it.
HANDLER = "handler.py"

TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"
TOKENIZER = frozenset(
    {
        TOKENIZER_CONFIG,
        "tokenizer.json",
        SPECIAL_TOKENS_MAP,
        ADDED_TOKENS,
        "chat_template.jinja",
        "vocab.json",
        "merges.txt",
        # GPT-2 models with another family's tokenizer are common outside English: WordPiece, SentencePiece
        "vocab.txt",
        "spiece.model",
        "tokenizer.model",
        "sentencepiece.bpe.model",
    }
)

CODE_SUFFIXES = (".py", ".pyc", ".so", ".pyd")  # what Python imports
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".dill")

# What people and the Hub put beside a package: nothing here is read by a loader.
_COMPANION = re.compile(
    r"(?i)(license|licence|notice|citation|changelog)(\.\w+)?|[^.].*\.(md|png|jpe?g|gif|svg|webp|pdf)|\.gitignore"
)
# Left by tools; may vanish when the package is replaced.
LITTER = frozenset({".cache", "__pycache__", ".DS_Store", ".gitattributes"})


def kind_of(name: str) -> str:
    """Return what a package's file of this name is: config, weights, code, tokenizer, card, record, pickle, litter,
    companion; or foreign, if it has no place in a package."""
    if name in (CONFIG, GENERATION_CONFIG):
        return "config"
    if name in (WEIGHTS, WEIGHTS_INDEX) or SHARD.fullmatch(name):
        return "weights"
    if name in REMOTE_CODE:
        return "code"
    if name in TOKENIZER:
        return "tokenizer"
    if name == CARD:
        return "card"
    if name == RECORD:
        return "record"
    if name.lower().endswith(PICKLE_SUFFIXES):
        return "pickle"
    if name in LITTER:
        return "litter"
    if name == HANDLER or _COMPANION.fullmatch(name):
        return "companion"
    return "foreign"


def written_by_save(name: str) -> bool:
    """Whether `save_package` may write a file of this name, and so may replace it."""
    return kind_of(name) in ("config", "weights", "code", "tokenizer", "card", "record")


def is_code(name: str) -> bool:
    """Whether loading a package may run a file of this name."""
    return name.endswith(CODE_SUFFIXES) and name != HANDLER


def installed_code() -> dict[str, Path]:
    """Return this installed version's remote code, by file name. It lies beside `hub_tools` in a checkout and in a
    wheel."""
    home = Path(__file__).resolve().parent.parent
    return {name: home / name for name in REMOTE_CODE}


def installed_hashes() -> dict[str, str]:
    """Return the SHA-256, in hexadecimal, of `installed_code`, by file name."""
    return {name: sha256_of(path) for name, path in installed_code().items()}


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
