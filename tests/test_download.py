"""Downloads: what lies in the place of a package is named, and every file is the one that was announced."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
from conftest import make_tiny_model, plain_twin, save_adapter
from huggingface_hub import try_to_load_from_cache
from support.hub_server import Fault

from hub_tools import convert_checkpoint, inspect_package
from hub_tools.errors import (
    GPT2ValueHubError,
    HubRefusedError,
    HubUnavailableError,
    NotAPackageError,
    PackageError,
    RemoteNotFoundError,
    SaveFailedError,
)
from hub_tools.hub.download import fetch

REPO = "alice/value"


@pytest.fixture
def files(saved):
    return {path.name: path.read_bytes() for path in saved.iterdir()}


def sizes_in(cache):
    return {path.name: path.stat().st_size for path in cache.rglob("*") if path.is_file()}


IN_ITS_PLACE = {
    "nothing": ({}, NotAPackageError, "holds no package"),
    "a card": ({"README.md": b"words"}, NotAPackageError, r"README\.md"),
    "pickles": ({"config.json": b"{}", "pytorch_model.bin": b"pickle"}, PackageError, r"pytorch_model\.bin"),
}


@pytest.mark.parametrize("case", IN_ITS_PLACE)
def test_what_lies_in_the_place_of_a_package_is_named(server, tmp_path, case):
    content, error, found = IN_ITS_PLACE[case]
    server.create(REPO, content)
    for look in (fetch, inspect_package):
        with pytest.raises(error, match=rf"{REPO}.*{found}"):
            look(REPO, cache_dir=tmp_path)


CHECKPOINTS = [
    ({"pytorch_model.bin", "v_head.bin"}, {"optimizer.bin", "train.sh"}),
    ({"model.safetensors", "v_head.bin", "value_head.safetensors"}, {"pytorch_model.bin", "training_args.bin"}),
    ({"adapter_config.json", "adapter_model.safetensors"}, {"adapter_model.bin"}),
]


@pytest.mark.parametrize(("fetched", "left"), CHECKPOINTS, ids=["pickles", "both", "an adapter"])
def test_of_another_librarys_checkpoint_come_its_weights_heads_and_adapters(server, tmp_path, files, fetched, left):
    content = {name: name.encode() for name in fetched | left}
    if "adapter_config.json" not in fetched:
        content["config.json"] = files["config.json"]
    server.create(REPO, content)
    folder = fetch(REPO, cache_dir=tmp_path / "cache", checkpoint=True)
    assert {path.name for path in folder.iterdir()} == set(content) - left


def test_a_download_is_kept_where_transformers_finds_it_and_not_made_twice(server, tmp_path, files, monkeypatch):
    commit = server.create(REPO, files).refs["refs/heads/main"]
    snapshot = fetch(REPO, cache_dir=tmp_path)
    assert snapshot.name == commit
    assert {path.name: path.read_bytes() for path in snapshot.iterdir()} == files
    assert Path(try_to_load_from_cache(REPO, "config.json", cache_dir=tmp_path)).read_bytes() == files["config.json"]
    server.requests.clear()
    assert fetch(REPO, cache_dir=tmp_path) == snapshot
    assert "resolve" not in server.routes()
    server.faults.append(Fault(cut="before"))  # a Hub that is away leaves the cache to answer
    assert fetch(REPO, cache_dir=tmp_path) == snapshot
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert fetch(REPO, cache_dir=tmp_path) == snapshot
    with pytest.raises(HubUnavailableError, match="not in the cache"):
        fetch(REPO, revision="v9", cache_dir=tmp_path)


def test_a_cache_that_cannot_be_written_is_named(server, tmp_path, files):
    server.create(REPO, files)
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(SaveFailedError, match="could not download alice/value") as refused:
        fetch(REPO, cache_dir=tmp_path / "cache")
    assert "HF_HOME" in refused.value.next_step


LARGE = {
    "tokenizer.json": 400 << 20,
    "modeling_gpt2_value.py": 65 << 20,
    "model.safetensors": 3 << 30,
    "model-00002-of-00002.safetensors": 3 << 30,
}


@pytest.mark.parametrize("name", LARGE)
def test_a_file_larger_than_a_model_needs_is_not_downloaded(server, tmp_path, files, name):
    server.create(REPO, {**files, name: b"x"})
    server.sizes[name] = LARGE[name]
    with pytest.raises(PackageError, match=r"bytes.*download"):
        fetch(REPO, cache_dir=tmp_path)
    assert sum(sizes_in(tmp_path).values()) < 300_000


WRONG = {
    "an endless body": itertools.repeat(bytes(1 << 20)),
    "more than announced": bytes(50_000_000),
    "less": b"{",
    "other bytes": b"[]",
}


@pytest.mark.parametrize("way", WRONG)
def test_what_is_not_as_announced_is_not_kept(server, tmp_path, files, way):
    server.create(REPO, {**files, "config.json": b"{}"})
    server.faults.append(Fault(path="*/config.json", body=WRONG[way]))
    with pytest.raises(HubRefusedError):
        fetch(REPO, cache_dir=tmp_path)
    assert not {"config.json", "model.safetensors"} & set(sizes_in(tmp_path))


def test_a_server_that_knows_no_ranges_does_not_make_inspection_read_all(server, tmp_path, files, monkeypatch):
    server.create(REPO, files)
    server.faults.append(Fault(path="*/model.safetensors", body=files["model.safetensors"]))
    monkeypatch.setattr("hub_tools.hub.download.FIRST_BYTES", 1 << 14)  # less than the weights of a tiny model
    with pytest.raises(HubRefusedError, match="sends more than"):
        inspect_package(REPO, cache_dir=tmp_path)


def test_a_revision_that_is_not_there_is_named(server, tmp_path, files):
    server.create(REPO, files)
    with pytest.raises(RemoteNotFoundError, match="revision v9"):
        fetch(REPO, revision="v9", cache_dir=tmp_path)


def listing(name="config.json", size=2, oid="9e26dfeeb6e641a33dae4961196235bdb965b21b", sha="0" * 40):
    return {"id": REPO, "sha": sha, "siblings": [{"rfilename": name, "size": size, "blobId": oid}]}


ODD = [
    [],
    listing(sha="../../../evil"),
    listing(name="../../evil"),
    listing(oid="../../evil"),
    listing(size="many"),
    {**listing(), "siblings": [listing(name=f"{n}")["siblings"][0] for n in range(10_001)]},
]


@pytest.mark.parametrize("odd", ODD, ids=range(len(ODD)))
def test_nothing_that_a_hub_says_leads_out_of_the_cache(server, tmp_path, files, odd):
    server.create(REPO, files)
    server.faults += [Fault(route="model_info", body=json.dumps(odd).encode()), Fault(route="resolve", body=b"{}")]
    (tmp_path / "outline").mkdir()
    looks = (lambda: fetch(REPO, cache_dir=tmp_path / "cache"), lambda: fetch(REPO, outline=tmp_path / "outline"))
    for look in looks:
        with pytest.raises(GPT2ValueHubError):
            look()
    assert not sizes_in(tmp_path)


def test_the_base_that_an_adapter_names_is_fetched_within_bounds(server, tmp_path, monkeypatch):
    """From the Hub, as the adapter itself; a base of gigabytes is refused before it is downloaded."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    base = plain_twin(make_tiny_model())
    base.save_pretrained(tmp_path / "base")
    save_adapter(base, tmp_path / "adapter", base="alice/base")
    for name in ("base", "adapter"):
        server.create(f"alice/{name}", {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    conversion = convert_checkpoint("alice/adapter", tmp_path / "out", init_value_head=True)
    assert conversion.files[-1].name == "adapter_model.safetensors"
    server.sizes["model.safetensors"] = 5 << 30
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(PackageError, match=r"5,368,709,120 bytes.*none were downloaded"):
        convert_checkpoint("alice/adapter", tmp_path / "other", init_value_head=True)
    assert max(sizes_in(tmp_path / "cache").values()) < 1 << 20
