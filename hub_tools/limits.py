"""Limits for reading files of other people: bytes read, memory and disk space, time. `docs/limits.md` shows the tables.

Imports nothing. Each limit is several times what the largest real GPT-2 needs, and low enough that a hostile file
cannot exhaust a laptop. Limits that depend on the size of the model are computed from its `config.json`, which is
checked first. "Numbers" are the elements of all tensors together.
"""

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

# Bytes read
CONFIG_BYTES = MIB
TOKENIZER_SETTINGS_BYTES = 4 * MIB
VOCABULARY_BYTES = 4 * MIB
VOCABULARY_BYTES_PER_TOKEN = 256
VOCABULARY_BYTES_AT_MOST = 64 * MIB
HEADER_BYTES = 16 * MIB
INDEX_BYTES = 16 * MIB
RECORD_BYTES = 16 * MIB
CODE_BYTES = 4 * MIB
WEIGHT_BYTES_PER_NUMBER = 8
FOREIGN_BYTES_PER_NUMBER = 16
WEIGHT_BYTES_AT_MOST = 128 * GIB
BESIDE_BYTES = 512 * MIB
NAMES_IN_A_FOLDER = 10_000
JSON_LEVELS = 64

# Memory and disk
TOKENIZER_MEMORY = 2 * GIB
TOKENS_PER_CHARACTER = 64
TOKEN_CHARACTERS = 1000
PICKLE_MEMORY = 512 * MIB
TENSORS_PER_FILE = 2
MASK_BYTES = 2 * GIB
VERIFY_MEMORY = 8 * GIB
VERIFY_MEMORY_PER_NUMBER = 24

# Time
COPY_SECONDS = 60.0
COPY_BYTES_PER_SECOND = 4 * MIB
TOKENIZER_SECONDS = 60.0
PICKLE_SECONDS = 20.0
WAITING = 3  # wall-clock seconds allowed per second of processor time: a busy machine works more slowly
VERIFY_SECONDS = 600.0


def vocabulary_bytes(vocab_size: int) -> int:
    """The most bytes that a tokenizer's largest file may have, for a model with this vocabulary size."""
    return min(VOCABULARY_BYTES + VOCABULARY_BYTES_PER_TOKEN * vocab_size, VOCABULARY_BYTES_AT_MOST)


def weight_bytes(numbers: int) -> int:
    """The most bytes that the weight files of a model with this many numbers may have together."""
    return min(WEIGHT_BYTES_PER_NUMBER * numbers + HEADER_BYTES, WEIGHT_BYTES_AT_MOST)


def foreign_bytes(numbers: int, masks: int) -> int:
    """The most bytes that another library's weight files may have together.

    Such files may hold parts of the model twice, other heads, and causal masks: `masks` numbers in all layers together.
    """
    return min(FOREIGN_BYTES_PER_NUMBER * numbers + 4 * masks + HEADER_BYTES, WEIGHT_BYTES_AT_MOST)


def copy_seconds(size: int) -> float:
    """How many seconds copying a file of this many bytes may take."""
    return COPY_SECONDS + size / COPY_BYTES_PER_SECOND


def verify_memory(numbers: int) -> int:
    """The most bytes of memory that the fresh interpreter may take for a model with this many numbers."""
    return VERIFY_MEMORY + VERIFY_MEMORY_PER_NUMBER * numbers


def tables() -> str:
    """All limits as Markdown tables: what is limited, the limit, and typical use or the reason."""
    read = (
        ("`config.json`, `generation_config.json`", f"{_size(CONFIG_BYTES)} each", "1 kB for GPT-2"),
        (
            "`tokenizer_config.json` and the other small tokenizer files",
            f"{_size(TOKENIZER_SETTINGS_BYTES)} each",
            "enough for a list of 20,000 added tokens",
        ),
        (
            "`tokenizer.json`, vocabularies, merges",
            f"{_size(VOCABULARY_BYTES)} + {VOCABULARY_BYTES_PER_TOKEN} bytes for each token of the vocabulary, at most "
            f"{_size(VOCABULARY_BYTES_AT_MOST)}",
            "40 to 140 bytes for each token",
        ),
        ("a safetensors header", _size(HEADER_BYTES), "60 kB for the largest GPT-2"),
        ("the index of the shards", _size(INDEX_BYTES), "as large as a header"),
        ("`verification.json`", _size(RECORD_BYTES), "30 kB"),
        ("a code file", _size(CODE_BYTES), "60 kB for all code of a package together"),
        (
            "all weights of a package together",
            f"{WEIGHT_BYTES_PER_NUMBER} bytes for each number in the tensors that the config calls for, at most "
            f"{_size(WEIGHT_BYTES_AT_MOST)}",
            "4 bytes in float32",
        ),
        (
            "all weights of another library's checkpoint together",
            f"{FOREIGN_BYTES_PER_NUMBER} bytes for each such number, and 4 for each number in the causal masks",
            "trlx stores some layers twice",
        ),
        ("all other files of a model together", _size(BESIDE_BYTES), "5 MB for a tokenizer"),
        ("files in a folder", f"{NAMES_IN_A_FOLDER:,}", "about 20 in a package"),
        ("nesting of JSON", f"{JSON_LEVELS} levels", "4 levels"),
    )
    made = (
        ("the private copy", "as many bytes as were read", "it is removed once the model is loaded"),
        ("all tensors of a file together", f"{TENSORS_PER_FILE} times the file", "a tied output layer is stored once"),
        ("causal masks of transformers 4", _size(MASK_BYTES), "the size for 12 layers of 13,377 positions"),
        (
            "the child process that tries a tokenizer",
            f"{_size(TOKENIZER_MEMORY)}, and {TOKENS_PER_CHARACTER} tokens for each character",
            "300 MiB with a vocabulary of 250,000; at most 18 tokens for one character",
        ),
        (
            "the child process that reads a pickle",
            f"{_size(PICKLE_MEMORY)} + 4 bytes for each byte of the file",
            "torch, and the tensors twice",
        ),
        (
            "the child process of `verify_package`",
            f"{_size(VERIFY_MEMORY)} + {VERIFY_MEMORY_PER_NUMBER} bytes for each number in the tensors",
            "0.4 GB, and the weights twice in float32, which is 8 bytes for each number",
        ),
    )
    seconds = (
        (
            "copying a file",
            f"{COPY_SECONDS:g} s + 1 s for each {_size(COPY_BYTES_PER_SECOND)}",
            "a slow network disk delivers 10 MiB a second",
        ),
        (
            "the child process that tries a tokenizer",
            f"{TOKENIZER_SECONDS:g} s of processor time, {WAITING * TOKENIZER_SECONDS:g} s of wall-clock time",
            "1 s with a vocabulary of 250,000",
        ),
        (
            "the child process that reads a pickle",
            f"{PICKLE_SECONDS:g} s of processor time + 1 s for each {_size(COPY_BYTES_PER_SECOND)}; {WAITING} times as "
            "long by the clock",
            "2 s",
        ),
        (
            "the child process of `verify_package`",
            f"{VERIFY_SECONDS:g} s of wall-clock time; `timeout=` changes it",
            "it loads and runs the package",
        ),
    )
    parts = (("Bytes read", read), ("Memory and disk", made), ("Time", seconds))
    return "\n".join(
        f"| {title} | at most | typical use, or reason |\n|---|---|---|\n"
        + "".join(f"| {what} | {most} | {why} |\n" for what, most, why in rows)
        for title, rows in parts
    )


def _size(bytes: int) -> str:
    return f"{bytes // GIB} GiB" if bytes % GIB == 0 else f"{bytes // MIB} MiB"


if __name__ == "__main__":
    print(tables())
