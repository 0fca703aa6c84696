"""How much reading somebody else's files may take: bytes read, bytes made, seconds. `docs/limits.md` shows the tables.

Imports nothing. Each limit is several times what the largest real GPT-2 needs, and little enough that a hostile file
cannot exhaust a laptop. What depends on the model's size is computed from its `config.json`, which is checked first.
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
PICKLE_BYTES = 16 * MIB
WEIGHT_BYTES_PER_NUMBER = 8
FOREIGN_BYTES_PER_NUMBER = 16
WEIGHT_BYTES_AT_MOST = 128 * GIB
BESIDE_BYTES = 512 * MIB
NAMES_IN_A_FOLDER = 10_000
JSON_LEVELS = 64

# Bytes made
TOKENIZER_MEMORY = 2 * GIB
TOKENS_PER_CHARACTER = 64
PICKLE_MEMORY = 512 * MIB
TENSORS_PER_FILE = 2
MASK_BYTES = 2 * GIB
VERIFY_MEMORY = 8 * GIB
VERIFY_MEMORY_PER_NUMBER = 24

# Seconds
COPY_SECONDS = 60.0
COPY_BYTES_PER_SECOND = 4 * MIB
TOKENIZER_SECONDS = 60.0
PICKLE_SECONDS = 20.0
WAITING = 3  # times these seconds by the clock: on a busy machine a second of work takes longer
VERIFY_SECONDS = 600.0


def vocabulary_bytes(vocab_size: int) -> int:
    """The most bytes that a tokenizer's largest file may have, for a model with this many tokens."""
    return min(VOCABULARY_BYTES + VOCABULARY_BYTES_PER_TOKEN * vocab_size, VOCABULARY_BYTES_AT_MOST)


def weight_bytes(numbers: int) -> int:
    """The most bytes that the weight files of a model with this many numbers may have together."""
    return min(WEIGHT_BYTES_PER_NUMBER * numbers + HEADER_BYTES, WEIGHT_BYTES_AT_MOST)


def foreign_bytes(numbers: int, masks: int) -> int:
    """The most bytes that another library's weight files may have together: it may keep parts of the model twice, heads
    of its own, and causal masks, of this many numbers in all layers."""
    return min(FOREIGN_BYTES_PER_NUMBER * numbers + 4 * masks + HEADER_BYTES, WEIGHT_BYTES_AT_MOST)


def copy_seconds(size: int) -> float:
    """How long copying a file of this many bytes may take."""
    return COPY_SECONDS + size / COPY_BYTES_PER_SECOND


def verify_memory(numbers: int) -> int:
    """The most bytes of memory that the fresh interpreter may take for a model with this many numbers."""
    return VERIFY_MEMORY + VERIFY_MEMORY_PER_NUMBER * numbers


def tables() -> str:
    """All limits, as Markdown: what they are of, and why they are enough."""
    read = (
        ("`config.json`, `generation_config.json`", f"{_size(CONFIG_BYTES)} each", "GPT-2's have 1 kB"),
        (
            "`tokenizer_config.json` and the other small tokenizer files",
            f"{_size(TOKENIZER_SETTINGS_BYTES)} each",
            "a list of 20,000 added tokens",
        ),
        (
            "`tokenizer.json`, vocabularies, merges",
            f"{_size(VOCABULARY_BYTES)} + {VOCABULARY_BYTES_PER_TOKEN} bytes for each token, at most "
            f"{_size(VOCABULARY_BYTES_AT_MOST)}",
            "40 to 140 are usual",
        ),
        ("a safetensors header", _size(HEADER_BYTES), "the largest GPT-2's has 60 kB"),
        ("the index of the shards", _size(INDEX_BYTES), "as a header"),
        ("`verification.json`", _size(RECORD_BYTES), "a record has 30 kB"),
        ("a file of code", _size(CODE_BYTES), "all the code of a package has 60 kB"),
        ("the pickle in a `.bin`, without its numbers", _size(PICKLE_BYTES), "GPT-2 XL's has 100 kB"),
        (
            "all weights together",
            f"{WEIGHT_BYTES_PER_NUMBER} bytes for each number that the config calls for, at most "
            f"{_size(WEIGHT_BYTES_AT_MOST)}",
            "4 bytes in float32",
        ),
        (
            "the same, of another library's checkpoint",
            f"{FOREIGN_BYTES_PER_NUMBER} bytes for each number, and 4 for each of the causal masks",
            "trlx keeps some layers twice",
        ),
        ("all other files of a model together", _size(BESIDE_BYTES), "a tokenizer has 5 MB"),
        ("names in a folder", f"{NAMES_IN_A_FOLDER:,}", "a package has about 20 files"),
        ("JSON within JSON", f"{JSON_LEVELS} levels", "4 are usual"),
    )
    made = (
        ("the private copy of what is read", "as many bytes as were read", "it is removed when the model is loaded"),
        ("tensors that share their numbers", f"{TENSORS_PER_FILE} times the file", "a tied output layer"),
        ("causal masks of transformers 4", _size(MASK_BYTES), "12 layers of 13,377 positions"),
        (
            "the child process that tries a tokenizer",
            f"{_size(TOKENIZER_MEMORY)}, and {TOKENS_PER_CHARACTER} tokens for each character",
            "300 MiB with 250,000 tokens; 18 for one character",
        ),
        ("the child process that reads a pickle", _size(PICKLE_MEMORY), "15 MB for 600 tensors"),
        (
            "the child process of `verify_package`",
            f"{_size(VERIFY_MEMORY)} + {VERIFY_MEMORY_PER_NUMBER} bytes for each number",
            "0.4 GB, and the weights twice in float32: 8 bytes",
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
            f"{TOKENIZER_SECONDS:g} s of work, {WAITING * TOKENIZER_SECONDS:g} s in all",
            "1 s with 250,000 tokens",
        ),
        (
            "the child process that reads a pickle",
            f"{PICKLE_SECONDS:g} s of work, {WAITING * PICKLE_SECONDS:g} s in all",
            "0.1 s",
        ),
        ("the child process of `verify_package`", f"`timeout=`, {VERIFY_SECONDS:g} s", "it runs the package's code"),
    )
    parts = (("Bytes read", read), ("Bytes made", made), ("Seconds", seconds))
    return "\n".join(
        f"| {title} | at most | why it is enough |\n|---|---|---|\n"
        + "".join(f"| {what} | {most} | {why} |\n" for what, most, why in rows)
        for title, rows in parts
    )


def _size(bytes: int) -> str:
    return f"{bytes // GIB} GiB" if bytes % GIB == 0 else f"{bytes // MIB} MiB"


if __name__ == "__main__":
    print(tables())
