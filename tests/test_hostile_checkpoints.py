"""A stranger's checkpoint runs nothing, reads nothing outside, exhausts nothing, and is refused by a typed error."""

import json
import os
import struct
import zipfile

import pytest
import torch
from safetensors.torch import load_file
from test_convert import Original, assert_same_numbers, package_numbers, write_trl, write_trl_pickle
from test_convert_peft import Adapted

from hub_tools import convert_checkpoint, errors, export_policy, save_package
from hub_tools.convert.pickles import read_tensors

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
    with pytest.raises(errors.PackageError, match="for itself"):
        read_tensors(file, limit=1 << 30)


def test_tensors_that_share_their_numbers_do_not_become_a_hundred_times_the_file(tmp_path):
    shared = torch.zeros(100_000)
    torch.save({"a": shared, "b": shared}, tmp_path / "tied.bin")  # as a tied lm_head is
    assert set(read_tensors(tmp_path / "tied.bin", limit=1 << 30)) == {"a", "b"}
    torch.save({f"{i}": shared for i in range(100)}, tmp_path / "shared.bin")
    with pytest.raises(errors.PackageError, match="for itself"):
        read_tensors(tmp_path / "shared.bin", limit=1 << 30)


@pytest.mark.parametrize("shape", [[0, 1 << 47, 1 << 47], [1 << 47, 1 << 47, 0], [1 << 47] * 7 + [0]], ids=range(3))
def test_a_tensor_of_no_numbers_and_a_shape_beyond_counting_is_not_a_traceback(shape, tmp_path):
    header = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 8)
    with pytest.raises(errors.PackageError, match=r"a\.safetensors"):
        read_tensors(tmp_path / "a.safetensors", limit=1 << 30)


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
    with pytest.raises(errors.PackageError, match=r"deflated\.bin"):
        read_tensors(file, limit=1 << 30)


def test_attributes_that_a_pickle_gives_its_tensors_do_not_reach_us(tmp_path):
    tensor = torch.zeros(3)
    tensor.isfinite = 5
    torch.save({"a": tensor}, tmp_path / "attribute.bin")
    assert not hasattr(read_tensors(tmp_path / "attribute.bin", limit=1 << 30)["a"].isfinite, "real")


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
    with pytest.raises((errors.PackageError, errors.PackageError), match=r"pytorch_model\.bin"):
        read_tensors(file, limit=1 << 30)
    assert not (tmp_path / "it-ran").exists()


@pytest.mark.parametrize("legacy", [False, True], ids=["archive", "stream"])
def test_every_kind_of_number_is_read_as_torch_reads_it(legacy, tmp_path):
    dtypes = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool)
    state = {str(dtype): (10 * torch.randn(3, 5)).to(dtype) for dtype in dtypes}
    state |= {"scalar": torch.tensor(-1e4), "empty": torch.zeros(0, 4), "slice": torch.randn(9)[2:7]}
    state |= {"parameter": torch.nn.Parameter(torch.randn(4)), "one row": torch.randn(4, 3)[:1]}
    torch.save(state, tmp_path / "state.bin", _use_new_zipfile_serialization=not legacy)
    read = read_tensors(tmp_path / "state.bin", limit=1 << 30)
    theirs = torch.load(tmp_path / "state.bin", weights_only=True)
    assert set(read) == set(state)
    for name, tensor in theirs.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)


# Fields


def edited(folder, name, **fields):
    """A JSON file with other fields."""
    file = folder / name
    held = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**held, **fields}))


WRONG_CONFIGS = [
    {"activation_function": 5},
    {"activation_function": "os.system"},
    {"activation_function": ["gelu"]},
    {"architectures": 5},
    {"architectures": [{"a": 1}]},
    {"n_layer": 1 << 40},
    {"n_embd": True},
    {"summary_dropout_prob": "x"},
    {"tie_word_embeddings": 1},
    {"hidden_size": 8},
    {"attn_implementation": "other/kernel"},
    {"pruned_heads": {"0": [0]}},
    {"bos_token_id": [[]]},
    {"layer_norm_epsilon": {}},
]
HARMLESS_CONFIGS = [
    {"num_labels": 1 << 31},
    {"dtype": 7, "torch_dtype": "save"},
    {"attribute_map": 5},
    {"attribute_map": {"n_embd": "n_layer"}},
    {"watermarking_config": 5},
    {"id2label": "x", "label2id": 3},
    {"to_dict": 1, "__class__": "x", "save_pretrained": None},
    {"auto_map": {"AutoModel": "other/repo--x.Y"}},
    {"n_ctx": 5},
]


def test_a_config_field_that_cannot_be_is_refused_by_name_and_never_by_another_exception(tmp_path):
    write_trl(Original(), tmp_path / "theirs")
    config = (tmp_path / "theirs" / "config.json").read_text()
    for fields in WRONG_CONFIGS:
        edited(tmp_path / "theirs", "config.json", **fields)
        with pytest.raises(errors.GPT2ValueHubError, match=next(iter(fields))):
            convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")
        (tmp_path / "theirs" / "config.json").write_text(config)
    assert not (tmp_path / "ours").exists()


def test_a_config_field_that_is_not_known_reaches_no_library_and_changes_no_number(tmp_path):
    original = Original()
    write_trl(original, tmp_path / "theirs")
    config = (tmp_path / "theirs" / "config.json").read_text()
    for fields in HARMLESS_CONFIGS:
        edited(tmp_path / "theirs", "config.json", **fields)
        convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")
        assert_same_numbers(tmp_path / "ours", original.numbers())
        (tmp_path / "theirs" / "config.json").write_text(config)


def test_fields_that_were_left_out_are_in_the_record(tmp_path):
    write_trl(Original(), tmp_path / "theirs")
    assert not any("left out" in note for note in convert_checkpoint(tmp_path / "theirs", tmp_path / "ours").notes)
    edited(tmp_path / "theirs", "config.json", attention_of_tomorrow=5)
    record = convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    assert any("attention_of_tomorrow" in note for note in record.notes)


WRONG_GENERATION = [
    {"temperature": "hot"},
    {"eos_token_id": {"a": 1}},
    {"temperature": "\x1b[2J\u202e\x07"},
    {"num_beams": 1 << 40},
    {"bad_words_ids": [["x"]]},
]


@pytest.mark.parametrize("function", ["convert", "export"])
def test_a_generation_config_that_cannot_be_is_refused_by_name(function, tiny_model, tmp_path):
    if function == "convert":
        write_trl(Original(), tmp_path / "theirs")
    else:
        save_package(tiny_model, tmp_path / "theirs")
    for fields in WRONG_GENERATION:
        (tmp_path / "theirs" / "generation_config.json").write_text(json.dumps(fields))
        with pytest.raises(errors.GPT2ValueHubError, match=next(iter(fields))) as refusal:
            (convert_checkpoint if function == "convert" else export_policy)(tmp_path / "theirs", tmp_path / "ours")
        assert all(char.isprintable() or char == "\n" for char in str(refusal.value))


@pytest.mark.parametrize(
    "fields",
    [
        {"activation_function": 5},
        {"architectures": 5},
        {"num_labels": 1 << 31},
        {"n_inner": "x"},
        {"resid_pdrop": [0.1]},
        {"eos_token_id": {"a": "\x1b[2J"}},
        {"summary_type": "attn"},
        {"quantization_config": {"quant_method": "x"}},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_export_refuses_a_hostile_config_by_name(fields, tiny_model, tmp_path):
    save_package(tiny_model, tmp_path / "package")
    edited(tmp_path / "package", "config.json", **fields)
    with pytest.raises(errors.GPT2ValueHubError, match=next(iter(fields))):
        export_policy(tmp_path / "package", tmp_path / "policy")
    assert not (tmp_path / "policy").exists()


def test_an_adapter_that_lies_in_a_package_does_not_change_its_policy(tiny_model, tmp_path):
    save_package(tiny_model, tmp_path / "package")
    (tmp_path / "package" / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "../outside", "megatron_core": "armed.payload"})
    )
    (tmp_path / "package" / "adapter_model.safetensors").write_bytes(b"no adapter")
    export_policy(tmp_path / "package", tmp_path / "policy")
    exported = load_file(tmp_path / "policy" / "model.safetensors")
    assert all(torch.equal(weight, tiny_model.state_dict()[name]) for name, weight in exported.items())


# Files


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "config.json"])
def test_a_link_out_of_the_checkpoint_is_not_followed(name, tmp_path):
    (write_trl_pickle if name.endswith(".bin") else write_trl)(Original(), tmp_path / "theirs")
    (tmp_path / "theirs" / name).rename(tmp_path / "outside")
    (tmp_path / "theirs" / name).symlink_to(tmp_path / "outside")
    with pytest.raises(errors.PackageError, match="leads out"):
        convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_a_pipe_in_the_place_of_weights_is_refused_and_not_waited_for(tmp_path):
    write_trl(Original(), tmp_path / "theirs")
    (tmp_path / "theirs" / "model.safetensors").unlink()
    os.mkfifo(tmp_path / "theirs" / "model.safetensors")
    with pytest.raises(errors.PackageError, match="regular file"):
        convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")


# Adapters


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    return Adapted(tmp_path_factory.mktemp("adapted"))


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
    with pytest.raises(errors.ConversionError, match="megatron_config"):
        convert_checkpoint(adapted.folder, tmp_path / "ours")
    adapted.edit(megatron_config=None)  # then the name of the module is of no effect
    convert_checkpoint(adapted.folder, tmp_path / "ours")
    assert not (tmp_path / "it-ran").exists()


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"r": 50_000_000}, errors.PackageError),
        ({"r": 5}, errors.PackageError),
        ({"r": "4"}, errors.PackageError),
        ({"lora_alpha": None}, errors.PackageError),
        ({"lora_alpha": 1e308}, errors.PackageError),
        ({"rank_pattern": {"c_attn": 3}}, errors.PackageError),
        ({"rank_pattern": ["c_attn"]}, errors.PackageError),
        ({"alpha_pattern": {"(((.*)*)*)*c_attn": 3}}, errors.ConversionError),
        ({"target_modules": 3}, errors.PackageError),
        ({"target_modules": ["c_attn"]}, errors.PackageError),
        ({"layers_to_transform": [0]}, errors.PackageError),
        ({"layers_to_transform": [1 << 40]}, errors.PackageError),
        ({"layers_pattern": "(h|x)*"}, errors.PackageError),
        ({"bias": "most"}, errors.PackageError),
        ({"use_dora": 1}, errors.PackageError),
        ({"use_dora": True}, errors.PackageError),
        ({"modules_to_save": ["ln_f"]}, errors.PackageError),
        ({"layer_replication": [[0, 2]]}, errors.ConversionError),
        ({"trainable_token_indices": [1]}, errors.ConversionError),
        ({"an option of 2030": "on"}, errors.ConversionError),
        ({"init_lora_weights": {"a": []}}, errors.ConversionError),
        ({"base_model_name_or_path": "\0"}, errors.PackageError),
        ({"base_model_name_or_path": "x" * 5000}, errors.PackageError),
        ({"base_model_name_or_path": "../nowhere"}, errors.PackageError),
        ({"base_model_name_or_path": "nobody/nothing", "revision": {"a": 1}}, errors.PackageError),
    ],
)
def test_a_setting_that_does_not_fit_the_tensors_is_refused(settings, error, adapted, tmp_path):
    before = (adapted.folder / "adapter_config.json").read_text()
    adapted.edit(**settings)
    try:
        with pytest.raises(error):
            convert_checkpoint(adapted.folder, tmp_path / "ours")
    finally:
        (adapted.folder / "adapter_config.json").write_text(before)


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


# Tokenizers


@pytest.mark.parametrize("function", ["convert", "export"])
def test_a_vocabulary_outside_is_neither_read_nor_copied(function, tiny_model, tiny_tokenizer, tmp_path):
    if function == "convert":
        write_trl(Original(), tmp_path / "theirs")
        tiny_tokenizer.save_pretrained(tmp_path / "theirs")
    else:
        save_package(tiny_model, tmp_path / "theirs", tiny_tokenizer)
    (tmp_path / "secret.json").write_text('{"a-secret": 0}')
    (tmp_path / "secret.txt").write_text("#version: 0.2\n")
    outside = {"vocab": str(tmp_path / "secret.json"), "merges": str(tmp_path / "secret.txt")}
    edited(tmp_path / "theirs", "tokenizer_config.json", tokenizer_class="GPT2Tokenizer", **outside)
    (convert_checkpoint if function == "convert" else export_policy)(tmp_path / "theirs", tmp_path / "ours")
    assert not any(b"a-secret" in path.read_bytes() for path in (tmp_path / "ours").iterdir())


def test_a_template_that_is_a_link_is_not_copied_onward(tiny_tokenizer, tmp_path):
    write_trl(Original(), tmp_path / "theirs")
    tiny_tokenizer.save_pretrained(tmp_path / "theirs")
    (tmp_path / "outside").write_text("a secret")
    (tmp_path / "theirs" / "chat_template.jinja").symlink_to(tmp_path / "outside")
    with pytest.raises(errors.PackageError, match="chat_template"):
        convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_templates_in_a_folder_of_their_own_are_not_copied_onward(tiny_model, tiny_tokenizer, tmp_path):
    save_package(tiny_model, tmp_path / "package", tiny_tokenizer)
    (tmp_path / "outside").write_text("a secret")
    templates = tmp_path / "package" / "additional_chat_templates"
    templates.mkdir()
    (templates / "x.jinja").symlink_to(tmp_path / "outside")
    export_policy(tmp_path / "package", tmp_path / "policy")
    assert not any(b"a secret" in path.read_bytes() for path in (tmp_path / "policy").rglob("*") if path.is_file())
