"""`inspect_package` says what is inside a package, runs none of it, and refuses files that lie."""

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import make_tiny_model

from hub_tools import errors, inspect_package, layout, save_package
from hub_tools.package.config import expected_shapes

MODELING, BIAS = "modeling_gpt2_value.py", "v_head.summary.bias"


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
    assert report.versions["gpt2-value"] == layout.__version__
    assert report.code_sha256 == layout.installed_hashes()
    assert report.code == report.code_sha256
    assert (report.missing, report.changed, report.pickles, report.foreign) == ((), (), (), ())
    json.dumps(report.to_json())


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tie_word_embeddings": False, "n_inner": 48},
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


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickles_and_code_are_named_and_neither_opened_nor_run(package, tmp_path):
    (package / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "boom")))
    with open(package / MODELING, "a") as file:
        file.write(f"open({str(tmp_path / 'boom')!r}, 'w')\n")
    (package / "setup.py").write_text(f"open({str(tmp_path / 'boom')!r}, 'w')\n")
    report = inspect_package(package)
    assert report.pickles == ("pytorch_model.bin",)
    installed = layout.installed_hashes()
    assert {name for name, digest in report.code.items() if digest != installed.get(name)} == {MODELING, "setup.py"}
    assert report.changed == (MODELING,)
    (package / layout.WEIGHTS).unlink()
    with pytest.raises(errors.PackageError, match=r"pickles, which were not opened: \['pytorch_model\.bin'\]"):
        inspect_package(package)
    assert not (tmp_path / "boom").exists()


def test_files_that_do_not_belong_are_named(package):
    foreign = {"adapter_config.json", "train.log", ".env"}
    for name in (*foreign, "LICENSE", "loss.png", ".gitattributes", "model-00001-of-00002.safetensors"):
        (package / name).write_text("{}")
    (package / "checkpoint-100").mkdir()
    report = inspect_package(package)
    assert set(report.foreign) == {*foreign, "checkpoint-100"}
    assert report.changed == ("model-00001-of-00002.safetensors",)


def test_a_file_that_is_not_the_one_that_was_saved_is_named(package):
    edit_json(package / layout.CONFIG, detach_value_head=True)
    data = bytearray((package / layout.WEIGHTS).read_bytes())
    data[-1] ^= 1
    (package / layout.WEIGHTS).write_bytes(data)
    (package / layout.CARD).write_text("edited by hand, as cards are")
    assert inspect_package(package).changed == (layout.CONFIG,)
    assert inspect_package(package, hash_weights=True).changed == (layout.CONFIG, layout.WEIGHTS)


# What it refuses: each case spoils a sound package


def fields(name=layout.CONFIG, **changed):
    return lambda package: edit_json(package / name, **changed)


def content(name, data):
    return lambda package: (package / name).write_bytes(data)


def size(name, length):
    """Cut a file, or lengthen it by a hole that takes no space."""
    return lambda package: os.truncate(package / name, length)


def link(name, target):
    def spoil(package):
        (package / name).unlink()
        (package / name).symlink_to(target)

    return spoil


def instead(name, make):
    def spoil(package):
        (package / name).unlink()
        make(package / name)

    return spoil


def header(edit):
    return lambda package: edit_header(package / layout.WEIGHTS, edit)


def entry(**changed):
    return header(lambda found: found[BIAS].update(changed))


def overlapping(found):
    first, second = [name for name in found if found[name].get("shape") == [32]][:2]
    found[second]["data_offsets"] = found[first]["data_offsets"]


UNREADABLE = "model.safetensors: Error while deserializing"  # the reason is in the words of the installed safetensors

REFUSED = {
    "no config": (instead(layout.CONFIG, lambda path: None), "config.json"),
    "no weights": (instead(layout.WEIGHTS, lambda path: None), "model.safetensors"),
    "another model": (fields(model_type="gpt2"), "'gpt2'"),
    "another repository's code": (fields(auto_map={"AutoModel": "user/repo--modeling.Model"}), "user/repo--"),
    "no auto_map": (fields(auto_map=...), "'auto_map': None"),
    "a list": (content(layout.CONFIG, b"[]"), "config.json holds .* a list"),
    "10 GB of JSON": (size(layout.CONFIG, 10 << 30), "10,737,418,240 bytes"),
    "NaN": (fields(layer_norm_epsilon=float("nan")), "nan"),
    "not UTF-8": (content(layout.CONFIG, b'{"model_type": "\xff\xfe"}'), "utf-8"),
    "an endless number": (content(layout.CONFIG, b'{"n_layer": ' + b"9" * 100_000 + b"}"), "digits"),
    "negative layers": (fields(n_layer=-1), "'n_layer' is -1"),
    "a billion layers": (fields(n_layer=1_000_000_000), "'n_layer' is 1000000000"),
    "layers as text": (fields(n_layer="2"), "'n_layer'"),
    "no width": (fields(n_embd=None), "'n_embd'"),
    "a second name for the width": (fields(hidden_size=64), "'hidden_size'"),
    "a link out": (link(layout.WEIGHTS, "/dev/zero"), "/dev/zero"),
    "a link to itself": (link(layout.WEIGHTS, layout.WEIGHTS), "link to nothing"),
    "a pipe": (instead(layout.CONFIG, os.mkfifo), "not a regular file"),
    "a folder": (instead(layout.CONFIG, Path.mkdir), "not a regular file"),
    "empty weights": (content(layout.WEIGHTS, b""), UNREADABLE),
    "truncated weights": (size(layout.WEIGHTS, 60_000), UNREADABLE),
    "longer weights": (size(layout.WEIGHTS, 120_000), UNREADABLE),
    "a terabyte of header": (content(layout.WEIGHTS, struct.pack("<Q", 1 << 40) + b"{"), "claims 1,099,511,627,776"),
    "a header that is no JSON": (header(lambda found: b"{" + b"\0" * 100), "header"),
    "a deep header": (header(lambda found: b'{"a":' * 100_000 + b"1" + b"}" * 100_000), UNREADABLE),
    "overlapping tensors": (header(overlapping), UNREADABLE),
    "offsets beyond the file": (entry(data_offsets=[1 << 40, (1 << 40) + 4]), UNREADABLE),
    "negative offsets": (entry(data_offsets=[-4, 0]), UNREADABLE),
    "an endless shape": (entry(shape=[1 << 40] * 1000), UNREADABLE),
    "an unknown dtype": (entry(dtype=UNREADABLE), UNREADABLE),
    "integers": (entry(dtype="I32"), "I32"),
    "another shape": (entry(shape=[1, 1]), BIAS),
    "an unknown tensor": (header(lambda found: found.update(x=found.pop("transformer.ln_f.bias"))), "'x'"),
    "a record that is none": (fields(layout.RECORD, versions="abc"), "no record of format 1"),
    "10 GB of code": (size(MODELING, 10 << 30), "10,737,418,240 bytes"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_file_that_lies_is_refused_by_name(what, package):
    spoil, names = REFUSED[what]
    spoil(package)
    with pytest.raises(errors.PackageError, match=names):
        inspect_package(package)


@pytest.mark.parametrize(
    ("moved", "names"),
    [
        (lambda shard, package: "../outside.safetensors", r"names the files \['\.\./outside"),
        (lambda shard, package: str(package / shard), r"names the files \['/"),
        (lambda shard, package: [shard], "names the files"),
        (lambda shard, package: "model-00009-of-00009.safetensors", "model-00009"),
        (lambda shard, package: shard.replace("00001", "00002"), "disagree"),
        (lambda shard, package: None, r"names the files \['None'"),
    ],
    ids=range(6),
)
def test_an_index_that_lies_is_refused(moved, names, tmp_path):
    package = tmp_path / "package"
    save_package(make_tiny_model(), package, max_shard_size=40_000)
    shutil.copy(package / "model-00001-of-00004.safetensors", tmp_path / "outside.safetensors")
    weight_map = json.loads((package / layout.WEIGHTS_INDEX).read_text())["weight_map"]
    tensor = next(name for name, shard in weight_map.items() if "00001" in shard)
    for changed in ({**weight_map, tensor: moved(weight_map[tensor], package)}, {}):
        edit_json(package / layout.WEIGHTS_INDEX, weight_map=changed)
        with pytest.raises(errors.PackageError, match=names if changed else r"names the files \{\}"):
            inspect_package(package)


def test_every_error_says_what_to_do_next():
    for name, kind in vars(errors).items():
        if isinstance(kind, type) and issubclass(kind, errors.GPT2ValueHubError):
            more = {"step": 1} if kind is errors.CheckpointPushError else {}
            error = kind("found this", expected="that", next_step="do so", **more)
            assert str(error) == "found this\n  expected: that\n  next: do so", name
            assert kind.__doc__, name
