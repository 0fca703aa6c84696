"""How much reading somebody else's files may take: bytes read, bytes made, seconds. `docs/limits.md` shows this table.

Imports nothing. Each limit is several times what the largest real GPT-2 needs, and little enough that a hostile file
cannot exhaust a laptop. What depends on the model's size is computed from its `config.json`, which is checked first.

| what | limit | why it is enough |
|---|---|---|
| `config.json`, `generation_config.json` | 1 MiB each | GPT-2's have 1 kB |
| `tokenizer_config.json` and the other small tokenizer files | 4 MiB each | a list of 20,000 added tokens |
| `tokenizer.json`, vocabularies, merges | 4 MiB + 256 bytes for each token, at most 64 MiB | 40 to 140 are usual |
| a safetensors header | 16 MiB | the largest GPT-2's has 60 kB |
| the index of the shards | 16 MiB | as a header |
| `verification.json` | 16 MiB | a record has 30 kB |
| a file of code | 4 MiB | all the code of a package has 60 kB |
| all weights together | 8 bytes for each number that the config calls for, at most 128 GiB | 4 bytes in float32 |
| names in a folder | 10,000 | a package has about 20 files |
| the child process that tries a tokenizer | 60 s, 2 GiB of memory | 1 s and 300 MiB with 250,000 tokens |
| the child process of `verify_package` | `timeout=`, 600 s | it runs the package's code |
"""

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

CONFIG_BYTES = MIB
TOKENIZER_SETTINGS_BYTES = 4 * MIB
VOCABULARY_BYTES = 4 * MIB
VOCABULARY_BYTES_PER_TOKEN = 256
VOCABULARY_BYTES_AT_MOST = 64 * MIB
HEADER_BYTES = 16 * MIB
INDEX_BYTES = 16 * MIB
RECORD_BYTES = 16 * MIB
CARD_BYTES = 4 * MIB
CODE_BYTES = 4 * MIB
WEIGHT_BYTES_PER_NUMBER = 8
WEIGHT_BYTES_AT_MOST = 128 * GIB
NAMES_IN_A_FOLDER = 10_000
TOKENIZER_SECONDS = 60.0
TOKENIZER_MEMORY = 2 * GIB


def vocabulary_bytes(vocab_size: int) -> int:
    """The most bytes that a tokenizer's largest file may have, for a model with this many tokens."""
    return min(VOCABULARY_BYTES + VOCABULARY_BYTES_PER_TOKEN * vocab_size, VOCABULARY_BYTES_AT_MOST)


def weight_bytes(numbers: int) -> int:
    """The most bytes that the weight files of a model with this many numbers may have together."""
    return min(WEIGHT_BYTES_PER_NUMBER * numbers + HEADER_BYTES, WEIGHT_BYTES_AT_MOST)
