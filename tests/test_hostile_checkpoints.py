"""A stranger's checkpoint runs nothing, reads nothing outside, exhausts nothing, and is refused by a typed error."""

import os
import struct
import zipfile

import pytest
import torch
from test_convert import Original, package_numbers, write_trl, write_trl_pickle
from test_convert_peft import Adapted

from hub_tools import convert_checkpoint, errors
from hub_tools.convert.weight_files import read_state_dict

# Pickles


def rewritten(file, data_pkl):
    """The archive with another pickle in it."""
    with zipfile.ZipFile(file) as archive:
        records = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, content in records.items():
            archive.writestr(name, data_pkl if name.endswith("/data.pkl") else content)


def test_a_pickle_of_repeated_numbers_does_not_become_gibibytes(tmp_path):
    file = tmp_path / "stride-0.bin"
    torch.save({f"{i}.weight": torch.zeros(1).expand(1 << 14, 1 << 14) for i in range(6)}, file)
    assert file.stat().st_size < 10_000
    with pytest.raises(errors.CorruptFileError, match="not contiguous"):
        read_state_dict(file)


def test_tensors_that_share_their_numbers_do_not_become_a_hundred_times_the_file(tmp_path):
    shared = torch.zeros(100_000)
    torch.save({"a": shared, "b": shared}, tmp_path / "tied.bin")  # as a tied lm_head is
    assert set(read_state_dict(tmp_path / "tied.bin")) == {"a", "b"}
    torch.save({f"{i}": shared for i in range(100)}, tmp_path / "shared.bin")
    with pytest.raises(errors.CorruptFileError, match="each for itself"):
        read_state_dict(tmp_path / "shared.bin")


@pytest.mark.parametrize("tail", [b"", b"PK\x05\x06", b"PK\x05\x06" + b"\0" * 18])
def test_a_compressed_archive_is_refused_whatever_stands_behind_it(tail, tmp_path):
    file = tmp_path / "deflated.bin"
    torch.save({"a": torch.zeros(1 << 20)}, file)
    with zipfile.ZipFile(file) as archive:
        records = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    file.write_bytes(file.read_bytes() + tail)
    with pytest.raises(errors.CorruptFileError, match=r"deflated\.bin"):
        read_state_dict(file)


def test_attributes_that_a_pickle_gives_its_tensors_do_not_reach_us(tmp_path):
    tensor = torch.zeros(3)
    tensor.isfinite = 5
    torch.save({"a": tensor}, tmp_path / "attribute.bin")
    with pytest.raises(errors.UnsafePickleError, match="rebuild_from_type"):
        read_state_dict(tmp_path / "attribute.bin")


BOMBS = {
    "a memo of 2**32 entries": b"\x80\x02Nr\xff\xff\xff\xff.",
    "a string of 2**40 bytes": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 40) + b".",
    "nested too deep": b"\x80\x02" + b"(" * 200_000 + b"t" * 200_000 + b".",
    "a slot of our own function": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}U\x08__code__K\x01s\x86b.",
    "no pickle": os.urandom(1000),
    "a number of 8 MB": b"\x80\x02\x8b" + struct.pack("<i", 1 << 23) + b"\x7f" * (1 << 23) + b".",
    "a class of the standard library": b'cbuiltins\nexec\n(S\'open("it-ran", "w")\'\ntR.',
}


@pytest.mark.parametrize("what", BOMBS)
@pytest.mark.parametrize("archive", [True, False], ids=["archive", "stream"])
def test_no_pickle_exhausts_memory_or_time_or_runs_anything(what, archive, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "pytorch_model.bin"
    if archive:
        torch.save({"a": torch.zeros(3)}, file)
        rewritten(file, BOMBS[what])
    else:
        file.write_bytes(BOMBS[what])
    with pytest.raises((errors.CorruptFileError, errors.UnsafePickleError), match=r"pytorch_model\.bin"):
        read_state_dict(file)
    assert not (tmp_path / "it-ran").exists()


@pytest.mark.parametrize("legacy", [False, True], ids=["archive", "stream"])
def test_every_kind_of_number_is_read_as_torch_reads_it(legacy, tmp_path):
    dtypes = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool)
    state = {str(dtype): (10 * torch.randn(3, 5)).to(dtype) for dtype in dtypes}
    state |= {"scalar": torch.tensor(-1e4), "empty": torch.zeros(0, 4), "slice": torch.randn(9)[2:7]}
    state |= {"parameter": torch.nn.Parameter(torch.randn(4)), "one row": torch.randn(4, 3)[:1]}
    torch.save(state, tmp_path / "state.bin", _use_new_zipfile_serialization=not legacy)
    read = read_state_dict(tmp_path / "state.bin")
    theirs = torch.load(tmp_path / "state.bin", weights_only=True)
    assert set(read) == set(state)
    for name, tensor in theirs.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)


# Files


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "config.json"])
def test_a_link_out_of_the_checkpoint_is_not_followed(name, tmp_path):
    (write_trl_pickle if name.endswith(".bin") else write_trl)(Original(), tmp_path / "theirs")
    (tmp_path / "theirs" / name).rename(tmp_path / "outside")
    (tmp_path / "theirs" / name).symlink_to(tmp_path / "outside")
    with pytest.raises(errors.UnsafeFileError, match="leads out"):
        convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_a_pipe_in_the_place_of_weights_is_refused_and_not_waited_for(tmp_path):
    write_trl(Original(), tmp_path / "theirs")
    (tmp_path / "theirs" / "model.safetensors").unlink()
    os.mkfifo(tmp_path / "theirs" / "model.safetensors")
    with pytest.raises(errors.UnsafeFileError, match="regular file"):
        convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")


# Adapters


@pytest.mark.parametrize("folder", ["theirs", "peft"])  # peft 0.21 imports from folders with the names of its own
def test_an_adapter_config_imports_no_module_that_it_names(folder, tmp_path, monkeypatch):
    adapted = Adapted(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    armed = tmp_path / "megatron"
    armed.mkdir()
    (armed / "payload.py").write_text("open('it-ran', 'w')")
    adapted.folder.rename(tmp_path / folder)
    adapted.folder = tmp_path / folder
    adapted.edit(megatron_config={"a": 1}, megatron_core="megatron.payload")
    with pytest.raises(errors.UnsupportedModelError, match="megatron_config"):
        convert_checkpoint(adapted.folder, tmp_path / "ours")
    adapted.edit(megatron_config=None)  # then the name of the module is of no effect
    convert_checkpoint(adapted.folder, tmp_path / "ours")
    assert not (tmp_path / "it-ran").exists()


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"r": 50_000_000}, errors.CorruptFileError),
        ({"r": 5}, errors.WeightsMismatchError),
        ({"r": "4"}, errors.CorruptFileError),
        ({"lora_alpha": None}, errors.CorruptFileError),
        ({"lora_alpha": 1e308}, errors.CorruptFileError),
        ({"rank_pattern": {"c_attn": 3}}, errors.WeightsMismatchError),
        ({"rank_pattern": ["c_attn"]}, errors.CorruptFileError),
        ({"alpha_pattern": {"(((.*)*)*)*c_attn": 3}}, errors.UnsupportedModelError),
        ({"target_modules": 3}, errors.CorruptFileError),
        ({"target_modules": ["c_attn"]}, errors.WeightsMismatchError),
        ({"layers_to_transform": [0]}, errors.WeightsMismatchError),
        ({"layers_to_transform": [1 << 40]}, errors.CorruptFileError),
        ({"layers_pattern": "(h|x)*"}, errors.UnsupportedModelError),
        ({"bias": "most"}, errors.CorruptFileError),
        ({"use_dora": 1}, errors.CorruptFileError),
        ({"use_dora": True}, errors.WeightsMismatchError),
        ({"modules_to_save": ["ln_f"]}, errors.WeightsMismatchError),
        ({"layer_replication": [[0, 2]]}, errors.UnsupportedModelError),
        ({"trainable_token_indices": [1]}, errors.UnsupportedModelError),
        ({"an option of 2030": "on"}, errors.UnsupportedModelError),
        ({"init_lora_weights": {"a": []}}, errors.UnsupportedModelError),
        ({"base_model_name_or_path": "\0"}, errors.MissingFileError),
        ({"base_model_name_or_path": "x" * 5000}, errors.MissingFileError),
        ({"base_model_name_or_path": "../nowhere"}, errors.MissingFileError),
        ({"base_model_name_or_path": "nobody/nothing", "revision": {"a": 1}}, errors.MissingFileError),
    ],
)
def test_a_setting_that_does_not_fit_the_tensors_is_refused(settings, error, tmp_path):
    adapted = Adapted(tmp_path)
    adapted.edit(**settings)
    with pytest.raises(error):
        convert_checkpoint(adapted.folder, tmp_path / "ours")


def test_an_expression_that_does_not_end_is_not_evaluated(tmp_path):
    adapted = Adapted(tmp_path)
    adapted.edit(target_modules="((((((.*)*)*)*)*)*)x", rank_pattern={"((((.*)*)*)*)*x": 3})
    record = convert_checkpoint(adapted.folder, tmp_path / "ours")
    assert any("expression" in note for note in record.notes)
    torch.testing.assert_close(package_numbers(tmp_path / "ours")[0], adapted.original.numbers()[0], rtol=0, atol=1e-3)


def test_an_adapter_that_lies_in_the_base_is_not_loaded(tmp_path):
    adapted = Adapted(tmp_path)
    (adapted.base / "adapter_config.json").write_text((adapted.folder / "adapter_config.json").read_text())
    (adapted.base / "adapter_model.safetensors").write_bytes(b"no adapter")
    convert_checkpoint(adapted.folder, tmp_path / "ours")
    torch.testing.assert_close(package_numbers(tmp_path / "ours")[0], adapted.original.numbers()[0], rtol=0, atol=1e-3)
