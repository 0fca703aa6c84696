"""`inspect_package` says what is inside a package, runs none of it, and refuses files that lie."""

import hashlib
import json
import os
import pickle
import random
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import make_tiny_model
from safetensors.torch import load_file, save_file

from hub_tools import errors, layout
from hub_tools.package.config import expected_shapes
from hub_tools.package.inspect import inspect_package
from hub_tools.package.save import save_package
from modeling_gpt2_value import GPT2ValueModel


@pytest.fixture(scope="module")
def saved_in_shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "package"
    save_package(make_tiny_model(), folder, max_shard_size=40_000)
    return folder


@pytest.fixture
def sharded(saved_in_shards, tmp_path):
    return Path(shutil.copytree(saved_in_shards, tmp_path / "package"))


def edit_json(path, **fields):
    values = json.loads(path.read_text())
    values.update(fields)
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not ...}))


def edit_header(path, edit):
    """Rewrite a safetensors file's header; `edit` gets it as a dict and may return bytes instead."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    result = edit(header)
    new = result if isinstance(result, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(new)) + new + data[8 + length :])


# What it says


def test_a_report_says_what_the_model_is(tiny_tokenizer, tmp_path):
    model = make_tiny_model()
    save_package(model, tmp_path / "p", tiny_tokenizer)
    report = inspect_package(tmp_path / "p", hash_weights=True)
    assert report.parameters == sum(weight.numel() for weight in model.parameters())
    assert report.dtypes == {"float32": report.parameters}
    assert (report.head.shape, report.head.dtype) == ((1, 32), "float32")
    assert report.tied_embeddings
    assert report.tokenizer == "PreTrainedTokenizerFast"
    assert report.auto_map == layout.AUTO_MAP
    assert report.versions["gpt2-value"] == layout.__version__
    assert {file.name: file.sha256 for file in report.code} == {
        name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in layout.installed_code().items()
    }
    assert all(file.installed for file in report.code)
    assert (report.missing, report.changed, report.pickles, report.foreign) == ((), (), (), ())
    json.dumps(report.to_json())


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tie_word_embeddings": False},
        {"add_cross_attention": True},
        {"n_inner": 48},
        {"summary_proj_to_labels": False},
        {"summary_use_proj": False},
    ],
)
def test_the_expected_tensors_are_those_of_the_model(fields):
    model = make_tiny_model(**fields)
    found = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del found["lm_head.weight"]
    assert expected_shapes(model.config.to_dict()) == found


def test_shards_are_read_like_one_file(saved, saved_in_shards):
    one, many = inspect_package(saved), inspect_package(saved_in_shards)
    assert len(many.weight_files) > 1
    assert (one.parameters, one.dtypes, one.head) == (many.parameters, many.dtypes, many.head)


def test_what_plain_save_pretrained_writes_can_be_read(tmp_path):
    make_tiny_model().save_pretrained(tmp_path / "p")
    report = inspect_package(tmp_path / "p")
    assert set(report.missing) == {layout.CARD, layout.RECORD}
    assert all(file.installed for file in report.code)


def test_a_snapshot_in_the_hub_s_cache_can_be_read(package, tmp_path):
    """There, files are links to `../../blobs/<hash>`."""
    blobs, snapshot = tmp_path / "models--u--p" / "blobs", tmp_path / "models--u--p" / "snapshots" / "0123abcd"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in package.iterdir():
        blob = blobs / hashlib.sha256(path.name.encode()).hexdigest()
        shutil.move(path, blob)
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    assert inspect_package(snapshot).parameters == make_tiny_model().num_parameters()


def test_inspecting_needs_neither_torch_nor_transformers(package):
    program = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "import hub_tools; print(hub_tools.inspect_package(sys.argv[1], hash_weights=True).parameters)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(package)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == make_tiny_model().num_parameters()


# What it reports and does not refuse


def test_a_missing_head_is_reported(package):
    weights = load_file(package / layout.WEIGHTS)
    body = {name: weight for name, weight in weights.items() if not name.startswith("v_head.")}
    save_file(body, package / layout.WEIGHTS, metadata={"format": "pt"})
    report = inspect_package(package, hash_weights=True)
    assert report.head is None
    assert report.changed == (layout.WEIGHTS,)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickles_are_named_and_never_opened(package, tmp_path):
    (package / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "boom")))
    assert inspect_package(package).pickles == ("pytorch_model.bin",)
    (package / layout.WEIGHTS).unlink()
    with pytest.raises(errors.PackageError, match=r"pytorch_model\.bin"):
        inspect_package(package)
    assert not (tmp_path / "boom").exists()


def test_code_is_hashed_and_never_run(package, tmp_path):
    with open(package / "modeling_gpt2_value.py", "a") as file:
        file.write(f"open({str(tmp_path / 'boom')!r}, 'w')\n")
    (package / "setup.py").write_text(f"open({str(tmp_path / 'boom')!r}, 'w')\n")
    report = inspect_package(package)
    assert {file.name for file in report.code if not file.installed} == {"modeling_gpt2_value.py", "setup.py"}
    assert report.changed == ("modeling_gpt2_value.py",)
    assert not (tmp_path / "boom").exists()


def test_files_that_do_not_belong_are_named(package):
    for name in ("adapter_config.json", "train.log", ".env", "model-00001-of-00002.safetensors"):
        (package / name).write_text("{}")
    (package / "checkpoint-100").mkdir()
    for name in ("LICENSE", "loss.png", ".gitattributes"):
        (package / name).write_text("")
    assert set(inspect_package(package).foreign) == {
        "adapter_config.json",
        "train.log",
        ".env",
        "model-00001-of-00002.safetensors",
        "checkpoint-100",
    }


def test_a_file_that_is_not_the_one_that_was_saved_is_named(package):
    edit_json(package / layout.CONFIG, detach_value_head=True)
    data = bytearray((package / layout.WEIGHTS).read_bytes())
    data[-1] ^= 1
    (package / layout.WEIGHTS).write_bytes(data)
    (package / layout.CARD).write_text("edited by hand, as cards are")
    assert inspect_package(package).changed == (layout.CONFIG,)
    assert inspect_package(package, hash_weights=True).changed == (layout.CONFIG, layout.WEIGHTS)


# What it refuses: each case spoils a sound package


def no_config(package):
    (package / layout.CONFIG).unlink()


def no_weights(package):
    (package / layout.WEIGHTS).unlink()


def another_model(package):
    edit_json(package / layout.CONFIG, model_type="gpt2")


def another_repository_s_code(package):
    edit_json(package / layout.CONFIG, auto_map={"AutoModel": "user/repo--modeling.Model"})


def no_auto_map(package):
    edit_json(package / layout.CONFIG, auto_map=...)


def tokenizer_with_code(package):
    (package / layout.TOKENIZER_CONFIG).write_text('{"auto_map": {"AutoTokenizer": ["tokenizer.Evil", null]}}')


def config_is_a_list(package):
    (package / layout.CONFIG).write_text("[]")


def deep_config(package):
    (package / layout.CONFIG).write_text('{"a":' * 50_000 + "1" + "}" * 50_000)


def huge_config(package):
    with open(package / layout.CONFIG, "ab") as file:
        file.truncate(10 << 30)  # sparse: 10 GB that take no space


def config_with_a_key_twice(package):
    text = (package / layout.CONFIG).read_text()
    (package / layout.CONFIG).write_text(text.replace("{", '{"n_layer": 1, ', 1))


def config_with_nan(package):
    edit_json(package / layout.CONFIG, layer_norm_epsilon=float("nan"))


def config_not_utf8(package):
    (package / layout.CONFIG).write_bytes(b'{"model_type": "\xff\xfe"}')


def config_with_endless_number(package):
    (package / layout.CONFIG).write_text('{"n_layer": ' + "9" * 100_000 + "}")


def negative_layers(package):
    edit_json(package / layout.CONFIG, n_layer=-1)


def a_billion_layers(package):
    edit_json(package / layout.CONFIG, n_layer=1_000_000_000)


def layers_as_text(package):
    edit_json(package / layout.CONFIG, n_layer="2")


def a_second_name_for_the_width(package):
    edit_json(package / layout.CONFIG, hidden_size=64)


def config_leads_out(package):
    outside = package.parent / "outside.json"
    shutil.move(package / layout.CONFIG, outside)
    (package / layout.CONFIG).symlink_to(outside)


def weights_lead_out(package):
    (package / layout.WEIGHTS).unlink()
    (package / layout.WEIGHTS).symlink_to("/dev/zero")


def weights_link_to_themselves(package):
    (package / layout.WEIGHTS).unlink()
    (package / layout.WEIGHTS).symlink_to(layout.WEIGHTS)


def config_is_a_pipe(package):
    (package / layout.CONFIG).unlink()
    os.mkfifo(package / layout.CONFIG)


def config_is_a_folder(package):
    (package / layout.CONFIG).unlink()
    (package / layout.CONFIG).mkdir()


def empty_weights(package):
    (package / layout.WEIGHTS).write_bytes(b"")


def truncated_weights(package):
    os.truncate(package / layout.WEIGHTS, 60_000)


def longer_weights(package):
    with open(package / layout.WEIGHTS, "ab") as file:
        file.write(b"\0")


def header_longer_than_the_file(package):
    data = (package / layout.WEIGHTS).read_bytes()
    (package / layout.WEIGHTS).write_bytes(struct.pack("<Q", 1 << 40) + data[8:])


def header_of_a_gigabyte(package):
    (package / layout.WEIGHTS).write_bytes(struct.pack("<Q", 1 << 30) + b"{")
    os.truncate(package / layout.WEIGHTS, (1 << 30) + 100)


def header_not_json(package):
    edit_header(package / layout.WEIGHTS, lambda header: b"{" + b"\0" * 100)


def deep_header(package):
    edit_header(package / layout.WEIGHTS, lambda header: b'{"a":' * 100_000 + b"1" + b"}" * 100_000)


def header_without_format(package):
    edit_header(package / layout.WEIGHTS, lambda header: header.pop("__metadata__") and None)


def overlapping_tensors(package):
    def edit(header):
        first, second = [name for name in header if header[name].get("shape") == [32]][:2]
        header[second]["data_offsets"] = header[first]["data_offsets"]

    edit_header(package / layout.WEIGHTS, edit)


def offsets_beyond_the_file(package):
    def edit(header):
        header["v_head.summary.bias"]["data_offsets"] = [1 << 40, (1 << 40) + 4]

    edit_header(package / layout.WEIGHTS, edit)


def negative_offsets(package):
    edit_header(package / layout.WEIGHTS, lambda h: h["v_head.summary.bias"].update(data_offsets=[-4, 0]))


def endless_shape(package):
    edit_header(package / layout.WEIGHTS, lambda h: h["v_head.summary.bias"].update(shape=[1 << 40] * 1000))


def unknown_dtype(package):
    edit_header(package / layout.WEIGHTS, lambda h: h["v_head.summary.bias"].update(dtype="F31"))


def integer_weights(package):
    edit_header(package / layout.WEIGHTS, lambda h: h["v_head.summary.bias"].update(dtype="I32"))


def another_shape(package):
    edit_header(package / layout.WEIGHTS, lambda h: h["v_head.summary.weight"].update(shape=[32, 1]))


def unknown_tensor(package):
    edit_header(package / layout.WEIGHTS, lambda h: h.update({"x": h.pop("transformer.ln_f.bias")}))


def half_a_head(package):
    weights = load_file(package / layout.WEIGHTS)
    del weights["v_head.summary.bias"]
    save_file(weights, package / layout.WEIGHTS, metadata={"format": "pt"})


def record_that_is_none(package):
    edit_json(package / layout.RECORD, token_ids="abc")


def record_with_nan(package):
    edit_json(package / layout.RECORD, logsumexp=[float("nan")] * 16)


def two_sets_of_weights(package):
    (package / layout.WEIGHTS_INDEX).write_text('{"weight_map": {}}')


def endless_code(package):
    os.truncate(package / "modeling_gpt2_value.py", 10 << 30)


@pytest.mark.parametrize(
    ("spoil", "error", "names"),
    [
        (no_config, errors.PackageError, "config.json"),
        (no_weights, errors.PackageError, "model.safetensors"),
        (another_model, errors.NotAPackageError, "'gpt2'"),
        (another_repository_s_code, errors.PackageError, "user/repo--"),
        (no_auto_map, errors.PackageError, "auto_map None"),
        (tokenizer_with_code, errors.PackageError, "tokenizer.Evil"),
        (config_is_a_list, errors.PackageError, "config.json holds a list"),
        (deep_config, errors.PackageError, "nested too deep"),
        (huge_config, errors.PackageError, "10,737,418,240 bytes"),
        (config_with_a_key_twice, errors.PackageError, "'n_layer' twice"),
        (config_with_nan, errors.PackageError, "NaN"),
        (config_not_utf8, errors.PackageError, "utf-8"),
        (config_with_endless_number, errors.PackageError, "digits"),
        (negative_layers, errors.PackageError, "'n_layer' is -1"),
        (a_billion_layers, errors.PackageError, "1,000,000,000 layers"),
        (layers_as_text, errors.PackageError, "'n_layer'"),
        (a_second_name_for_the_width, errors.PackageError, "'hidden_size'"),
        (config_leads_out, errors.PackageError, "outside.json"),
        (weights_lead_out, errors.PackageError, "/dev/zero"),
        (weights_link_to_themselves, errors.PackageError, "link to nothing"),
        (config_is_a_pipe, errors.PackageError, "not a regular file"),
        (config_is_a_folder, errors.PackageError, "not a regular file"),
        (empty_weights, errors.PackageError, "too small"),
        (truncated_weights, errors.PackageError, "not fully covered"),
        (longer_weights, errors.PackageError, "not fully covered"),
        (header_longer_than_the_file, errors.PackageError, "claims 1,099,511,627,776 bytes"),
        (header_of_a_gigabyte, errors.PackageError, "claims 1,073,741,824 bytes"),
        (header_not_json, errors.PackageError, "header"),
        (deep_header, errors.PackageError, "recursion"),
        (header_without_format, errors.PackageError, "metadata"),
        (overlapping_tensors, errors.PackageError, "invalid offset"),
        (offsets_beyond_the_file, errors.PackageError, "invalid offset"),
        (negative_offsets, errors.PackageError, "integer `-4`"),
        (endless_shape, errors.PackageError, "shape"),
        (unknown_dtype, errors.PackageError, "F31"),
        (integer_weights, errors.PackageError, "I32"),
        (another_shape, errors.PackageError, r"v_head\.summary\.weight"),
        (unknown_tensor, errors.PackageError, "'x'"),
        (half_a_head, errors.PackageError, r"v_head\.summary\.bias"),
        (record_that_is_none, errors.PackageError, "'token_ids'"),
        (record_with_nan, errors.PackageError, "NaN"),
        (two_sets_of_weights, errors.PackageError, "two different models"),
        (endless_code, errors.PackageError, "10,737,418,240 bytes"),
    ],
)
def test_a_file_that_lies_is_refused_by_name(spoil, error, names, package):
    inspect_package(package)
    spoil(package)
    started = time.perf_counter()
    with pytest.raises(error, match=names) as caught:
        inspect_package(package)
    assert caught.value.next_step
    assert time.perf_counter() - started < 5  # nothing hangs


def path_traversal(index, package):
    outside = package.parent / "outside.safetensors"
    name = next(iter(set(index["weight_map"].values())))
    shutil.move(package / name, outside)
    return {tensor: "../outside.safetensors" if file == name else file for tensor, file in index["weight_map"].items()}


def absolute_path(index, package):
    return {tensor: str(package / file) for tensor, file in index["weight_map"].items()}


def missing_shard(index, package):
    (package / sorted(set(index["weight_map"].values()))[0]).unlink()
    return index["weight_map"]


def tensor_in_another_shard(index, package):
    files = sorted(set(index["weight_map"].values()))
    return {tensor: files[0] if file == files[1] else file for tensor, file in index["weight_map"].items()}


def tensor_left_out(index, package):
    return dict(list(index["weight_map"].items())[1:])


def list_of_shards(index, package):
    return {tensor: [file] for tensor, file in index["weight_map"].items()}


@pytest.mark.parametrize(
    ("spoil", "error", "names"),
    [
        (path_traversal, errors.PackageError, "outside.safetensors"),
        (absolute_path, errors.PackageError, "names the file '/"),
        (missing_shard, errors.PackageError, "model-00001"),
        (tensor_in_another_shard, errors.PackageError, "disagree"),
        (tensor_left_out, errors.PackageError, "disagree"),
        (list_of_shards, errors.PackageError, "names the file"),
        (lambda index, package: {}, errors.PackageError, "weight_map"),
    ],
)
def test_an_index_that_lies_is_refused(spoil, error, names, sharded):
    inspect_package(sharded)
    index = json.loads((sharded / layout.WEIGHTS_INDEX).read_text())
    edit_json(sharded / layout.WEIGHTS_INDEX, weight_map=spoil(index, sharded))
    with pytest.raises(error, match=names):
        inspect_package(sharded)


@pytest.mark.parametrize("source", ["no/such/folder", "a file"])
def test_what_is_not_a_folder_is_refused(source, tmp_path):
    (tmp_path / "a file").write_text("")
    with pytest.raises(errors.NotAPackageError, match=source):
        inspect_package(tmp_path / source)


def test_every_error_says_what_to_do_next():
    for name, kind in vars(errors).items():
        if isinstance(kind, type) and issubclass(kind, errors.GPT2ValueHubError):
            more = {"step": 1} if kind is errors.CheckpointPushError else {}
            error = kind("found this", expected="that", next_step="do so", **more)
            assert str(error) == "found this\n  expected: that\n  next: do so", name
            assert kind.__doc__, name


# Random damage: what is not refused must be what was saved


def damage(content, chance):
    """A few random changes to the beginning of a file, where its structure is."""
    content = bytearray(content)
    for _ in range(chance.randint(1, 3)):
        place = chance.randrange(min(len(content), 4000) or 1)
        kind = chance.choice(["flip", "cut", "insert", "repeat"])
        if kind == "flip" and content:
            content[place] ^= 1 << chance.randrange(8)
        elif kind == "cut":
            del content[place:]
        elif kind == "insert":
            content[place:place] = chance.randbytes(chance.randint(1, 20))
        else:
            content += content[place : place + 1000]
    return bytes(content)


@pytest.mark.parametrize("seed", range(20))
def test_a_damaged_package_is_refused_or_known_to_have_changed(seed, saved, saved_in_shards, tmp_path):
    chance = random.Random(seed)
    for attempt in range(10):
        original = chance.choice([saved, saved_in_shards])
        name = chance.choice(sorted(path.name for path in original.iterdir() if path.name != layout.CARD))
        content = damage((original / name).read_bytes(), chance)
        if content == (original / name).read_bytes():
            continue
        package = Path(shutil.copytree(original, tmp_path / str(attempt)))
        (package / name).write_bytes(content)
        try:
            report = inspect_package(package, hash_weights=True)
        except errors.GPT2ValueHubError:
            continue
        assert report.changed or name == layout.RECORD
        if name == layout.RECORD:  # the weights, at least, are the ones that were saved
            GPT2ValueModel.from_pretrained(package)
