"""Limits for reading files of other people: bytes read, memory and disk space, time. See SECURITY.md.

Each is several times what the largest real GPT-2 needs, and low enough that a hostile file cannot exhaust a laptop.
Those that depend on the size of the model are computed from its `config.json`, which is checked first. "Numbers" are
the elements of all tensors together.
"""

MIB, GIB = 1 << 20, 1 << 30

# Bytes read
CONFIG_BYTES = MIB  # 1 kB for GPT-2
VOCABULARY_BYTES_AT_MOST = 64 * MIB
HEADER_BYTES = 16 * MIB  # of a safetensors file: 60 kB for the largest GPT-2
INDEX_BYTES = 16 * MIB
RECORD_BYTES = 16 * MIB  # 30 kB
CODE_BYTES = 4 * MIB  # 60 kB for all files together
WEIGHT_BYTES_AT_MOST = 128 * GIB
BESIDE_BYTES = 512 * MIB  # all files of a package but its weights
NAMES_IN_A_FOLDER = 10_000
JSON_LEVELS = 64  # 4

# Memory
TOKENIZER_MEMORY = 2 * GIB  # 300 MiB for a vocabulary of 250,000
TEXT_GROWTH = 64  # of a text, by normalizing or decoding; real ones make 18 characters of one
TOKEN_CHARACTERS = 1000  # the longest real tokens are some hundred spaces
PICKLE_MEMORY = 512 * MIB
MASK_BYTES = 2 * GIB  # transformers 4 keeps a causal mask in each layer: 12 layers of 13,377 positions
VERIFY_MEMORY = 8 * GIB

# Time
TOKENIZER_SECONDS = 60.0  # of processor time; 1 s for a vocabulary of 250,000
PICKLE_SECONDS = 20.0
WAITING = 3  # wall-clock seconds allowed per second of processor time: a busy machine works more slowly
VERIFY_SECONDS = 600.0


def vocabulary_bytes(vocab_size: int) -> int:
    """The most bytes that a tokenizer's largest file may have: real ones have 40 to 140 for each token."""
    return min(4 * MIB + 256 * vocab_size, VOCABULARY_BYTES_AT_MOST)


def weight_bytes(numbers: int) -> int:
    """The most bytes that the weight files of a model with this many numbers may have together: float32 takes 4."""
    return min(8 * numbers + HEADER_BYTES, WEIGHT_BYTES_AT_MOST)


def foreign_bytes(numbers: int, masks: int) -> int:
    """The most bytes that another library's weight files may have together.

    Such files may hold parts of the model twice, other heads, and causal masks: `masks` numbers in all layers together.
    """
    return min(16 * numbers + 4 * masks + HEADER_BYTES, WEIGHT_BYTES_AT_MOST)


def verify_memory(numbers: int) -> int:
    """The most bytes that the fresh interpreter may take: it holds the weights twice in float32, 8 for each number."""
    return VERIFY_MEMORY + 24 * numbers
