"""A stranger's checkpoint runs nothing, reads nothing outside, exhausts nothing, and is refused by a typed error.

Adapters are in `test_convert_peft.py`.
"""

import json
import os
import struct
import zipfile

import pytest
import torch
from test_convert import Original, assert_same_numbers, write_trl, write_trl_pickle, write_trl_shards

from hub_tools import convert_checkpoint, errors, limits
from hub_tools.convert.pickles import read_tensors

# Pickles


def read(file):
    return read_tensors(file, limit=1 << 30)


def rewritten(file, change, compression=zipfile.ZIP_STORED):
    """Write an archive's records again, each as `change(name, content)` gives it."""
    with zipfile.ZipFile(file) as archive:
        records = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in records.items():
            archive.writestr(name, change(name, content))


class Payload:
    """Unpickling it writes a file: what an attacker's would do is no different."""

    def __init__(self, proof):
        self.proof = str(proof)

    def __reduce__(self):
        return os.system, (f"touch {self.proof}",)


def poison(file, proof, *, legacy=False):
    torch.save({"transformer.wte.weight": Payload(proof)}, file, _use_new_zipfile_serialization=not legacy)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    ("write", "name"),
    [
        (write_trl_pickle, "pytorch_model.bin"),
        (write_trl_shards, "pytorch_model-00002-of-00002.bin"),
        (write_trl, "value_head.bin"),
    ],
)
def test_a_pickle_that_would_run_code_runs_nothing(write, name, legacy, tmp_path, monkeypatch, theirs, ours):
    # the switch with which torch's users turn its safety off must not reach us
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    write(Original(), theirs)
    poison(theirs / name, tmp_path / "it-ran", legacy=legacy)
    with pytest.raises(errors.PackageError, match="Nothing of it was run"):
        convert_checkpoint(theirs, ours)
    assert not (tmp_path / "it-ran").exists()


def test_the_payload_of_these_tests_does_run_where_pickles_are_trusted(tmp_path):
    poison(tmp_path / "pytorch_model.bin", tmp_path / "it-ran")
    torch.load(tmp_path / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "it-ran").exists()


def test_a_pickle_of_repeated_numbers_does_not_become_gibibytes(tmp_path):
    torch.save({f"{i}.weight": torch.zeros(1).expand(1 << 14, 1 << 14) for i in range(6)}, tmp_path / "stride-0.bin")
    shared = torch.zeros(100_000)
    torch.save({f"{i}": shared for i in range(100)}, tmp_path / "shared.bin")
    for name in ("stride-0.bin", "shared.bin"):
        assert (tmp_path / name).stat().st_size < 1_000_000
        with pytest.raises(errors.PackageError, match="for itself"):
            read(tmp_path / name)
    torch.save({"a": shared, "b": shared}, tmp_path / "tied.bin")  # as a tied lm_head is
    assert set(read(tmp_path / "tied.bin")) == {"a", "b"}


def test_a_compressed_archive_does_not_become_gibibytes(tmp_path):
    torch.save({"a": torch.zeros(1 << 24)}, tmp_path / "bomb.bin")
    rewritten(tmp_path / "bomb.bin", lambda name, content: content, zipfile.ZIP_DEFLATED)
    assert (tmp_path / "bomb.bin").stat().st_size < 1_000_000
    with pytest.raises(errors.PackageError, match=r"bomb\.bin"):
        read(tmp_path / "bomb.bin")


BOMBS = {
    "a memo of 2**32 entries": b"\x80\x02Nr\xff\xff\xff\xff.",
    "a string of 2**40 bytes": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 40) + b".",
    "nested too deep": b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".",
    "a slot of a function": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}U\x08__code__K\x01s\x86b.",
    "no pickle": os.urandom(1000),
    "a number of 8 MB": b"\x80\x02\x8b" + struct.pack("<i", 1 << 23) + b"\x7f" * (1 << 23) + b".",
    "a class of the standard library": b'cbuiltins\nexec\n(S\'open("it-ran", "w")\'\ntR.',
}


@pytest.mark.parametrize("what", BOMBS)
@pytest.mark.parametrize("archive", [True, False], ids=["archive", "stream"])
def test_no_pickle_exhausts_memory_or_time_or_runs_anything(what, archive, tmp_path):
    file = tmp_path / "pytorch_model.bin"
    bomb = BOMBS[what].replace(b"it-ran", os.fsencode(tmp_path / "it-ran"))
    file.write_bytes(bomb)
    if archive:
        torch.save({"a": torch.zeros(3)}, file)
        rewritten(file, lambda name, content: bomb if name.endswith("data.pkl") else content)
    with pytest.raises(errors.PackageError, match=r"pytorch_model\.bin"):
        read(file)
    assert not (tmp_path / "it-ran").exists()


@pytest.mark.own_interpreter
def test_the_limits_hold_in_an_interpreter_of_its_own(tmp_path, monkeypatch):
    torch.save({"a": torch.arange(3.0)}, tmp_path / "a.bin")
    assert read(tmp_path / "a.bin")["a"].tolist() == [0.0, 1.0, 2.0]
    monkeypatch.setattr(limits, "PICKLE_MEMORY", 1 << 20)  # less than torch itself takes
    with pytest.raises(errors.PackageError, match=r"a\.bin"):
        read(tmp_path / "a.bin")


def test_every_kind_of_number_is_read_as_torch_reads_it(tmp_path):
    dtypes = (torch.float32, torch.bfloat16, torch.int64, torch.bool)
    state = {str(dtype): (10 * torch.randn(3, 5)).to(dtype) for dtype in dtypes}
    state |= {"scalar": torch.tensor(-1e4), "slice": torch.randn(9)[2:7], "transposed": torch.randn(4, 3).T}
    for new in (True, False):
        torch.save(state, tmp_path / "state.bin", _use_new_zipfile_serialization=new)
        ours = read(tmp_path / "state.bin")
        assert set(ours) == set(state)
        assert all(ours[name].dtype == state[name].dtype and torch.equal(ours[name], state[name]) for name in state)


# Damaged files


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: LFS])
def test_a_damaged_file_is_refused(name, damage, theirs, ours):
    (write_trl_pickle if name.endswith(".bin") else write_trl)(Original(), theirs)
    (theirs / name).write_bytes(damage((theirs / name).read_bytes()))
    with pytest.raises(errors.PackageError, match=name.replace(".", r"\.")):
        convert_checkpoint(theirs, ours)


def test_a_pickle_whose_numbers_were_spoiled_is_refused(tmp_path):
    file = tmp_path / "a.bin"
    torch.save({"a": torch.tensor(1.5)}, file)
    file.write_bytes(file.read_bytes().replace(b"\0\0\xc0\x3f", b"\0\0\xd0\x3f"))  # 1.5 as a float32; 1.625
    with pytest.raises(errors.PackageError, match="checksum"):
        read(file)


@pytest.mark.parametrize("state", [[torch.ones(1)], {"model": {"a": torch.ones(1)}}, {"a": torch.ones(2).to_sparse()}])
def test_a_pickle_of_something_else_than_a_state_dict_is_refused(state, tmp_path):
    torch.save(state, tmp_path / "a.bin")
    with pytest.raises(errors.PackageError, match=r"a\.bin"):
        read(tmp_path / "a.bin")


@pytest.mark.parametrize("target", ["../outside.bin", "/etc/hostname", "missing.bin", "pytorch_model.bin.index.json"])
def test_an_index_that_points_elsewhere_or_lies_is_refused(target, theirs, ours, tmp_path):
    write_trl_shards(Original(), theirs)
    torch.save(Original().state(), tmp_path / "outside.bin")
    index = theirs / "pytorch_model.bin.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["transformer.wte.weight"] = target
    index.write_text(json.dumps(content))
    with pytest.raises(errors.PackageError):
        convert_checkpoint(theirs, ours)


# Fields

HARMLESS = {
    "num_labels": 1 << 31,
    "torch_dtype": "save",
    "attribute_map": {"n_embd": "n_layer"},
    "watermarking_config": 5,
    "id2label": "x",
    "to_dict": 1,
    "__class__": "x",
    "auto_map": {"AutoModel": "other/repo--x.Y"},
}


def test_a_config_field_that_is_not_known_reaches_no_library_and_changes_no_number(theirs, ours):
    original = Original()
    original.write(theirs, **HARMLESS)
    record = convert_checkpoint(theirs, ours)
    assert_same_numbers(ours, original.numbers())
    assert any("'__class__'" in note for note in record.notes)  # the first of them


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": "\x1b[2J\u202e\x07"},
        {"num_beams": 1 << 40},
    ],
)
def test_a_generation_config_that_cannot_be_is_refused_by_name(fields, theirs, ours):
    write_trl(Original(), theirs)
    (theirs / "generation_config.json").write_text(json.dumps(fields))
    with pytest.raises(errors.PackageError, match=next(iter(fields))) as refusal:
        convert_checkpoint(theirs, ours)
    assert all(char.isprintable() or char == "\n" for char in str(refusal.value))


# Files


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "config.json"])
def test_a_link_out_of_the_checkpoint_is_not_followed(name, tmp_path, theirs, ours):
    (write_trl_pickle if name.endswith(".bin") else write_trl)(Original(), theirs)
    (theirs / name).rename(tmp_path / "outside")
    (theirs / name).symlink_to(tmp_path / "outside")
    with pytest.raises(errors.PackageError, match="leads out"):
        convert_checkpoint(theirs, ours)
    assert not (ours).exists()


def test_what_a_tokenizer_names_or_links_outside_is_neither_read_nor_copied(tiny_tokenizer, theirs, tmp_path, ours):
    write_trl(Original(), theirs)
    tiny_tokenizer.save_pretrained(theirs)
    (tmp_path / "secret.json").write_text('{"a-secret": 0}')
    settings = json.loads((theirs / "tokenizer_config.json").read_text())
    outside = dict.fromkeys(("vocab", "vocab_file", "merges"), str(tmp_path / "secret.json"))
    (theirs / "tokenizer_config.json").write_text(json.dumps({**settings, **outside}))
    convert_checkpoint(theirs, ours)
    assert not any(b"a-secret" in path.read_bytes() for path in (ours).rglob("*") if path.is_file())
    (theirs / "chat_template.jinja").symlink_to(tmp_path / "secret.json")
    with pytest.raises(errors.PackageError, match="chat_template"):
        convert_checkpoint(theirs, tmp_path / "again")
