"""A stage is a private copy: what is not wanted, not a file, too large or half written never gets into it."""

import hashlib
import os
import shutil

import pytest
from conftest import make_tiny_model

from hub_tools import errors, layout
from hub_tools.package import stage as stage_module
from hub_tools.package.save import save_package
from hub_tools.package.stage import stage, stage_package

WANTED = {"a": 100, "b": 100}


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "a").write_bytes(b"first")
    return folder


def test_only_wanted_files_are_copied_and_the_rest_is_listed(folder):
    (folder / "adapter_config.json").write_text("{}")
    (folder / "below").mkdir()
    (folder / "below" / "a").write_bytes(b"x")
    with stage(folder, limit_of=WANTED.get) as copy:
        assert [path.name for path in copy.folder.iterdir()] == ["a"]
        assert copy.names == ("a", "adapter_config.json", "below")
        assert copy.sha256 == {"a": hashlib.sha256(b"first").hexdigest()}
        assert copy.source == folder
        assert copy.folder.parent.stat().st_mode & 0o077 == 0
    assert not copy.folder.parent.exists()


def test_what_happens_to_the_source_later_does_not_reach_the_copy(folder):
    with stage(folder, limit_of=WANTED.get) as copy:
        (folder / "a").write_bytes(b"other")
        shutil.rmtree(folder)
        assert (copy.folder / "a").read_bytes() == b"first"


def link_out(folder):
    (folder.parent / "secret").write_bytes(b"s")
    (folder / "b").symlink_to(folder.parent / "secret")


def link_to_nothing(folder):
    (folder / "b").symlink_to("nothing")


def a_device(folder):
    (folder / "b").symlink_to("/dev/zero")


def a_pipe(folder):
    os.mkfifo(folder / "b")


def a_folder(folder):
    (folder / "b").mkdir()


def too_large(folder):
    (folder / "b").write_bytes(b"x" * 101)


def sparse(folder):
    with open(folder / "b", "wb") as file:
        file.truncate(1 << 40)


def too_many(folder):
    for number in range(30):
        (folder / str(number)).touch()


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (link_out, errors.PackageError),
        (link_to_nothing, errors.PackageError),
        (a_device, errors.PackageError),
        (a_pipe, errors.PackageError),
        (a_folder, errors.PackageError),
        (too_large, errors.PackageError),
        (sparse, errors.PackageError),
        (too_many, errors.PackageError),
    ],
)
def test_what_is_no_file_of_the_folder_or_too_large_is_refused(spoil, error, folder, monkeypatch):
    monkeypatch.setattr("hub_tools.limits.NAMES_IN_A_FOLDER", 20)
    spoil(folder)
    with pytest.raises(error), stage(folder, limit_of=WANTED.get):
        pass


def test_files_that_are_too_large_together_are_refused(folder):
    (folder / "b").write_bytes(b"x" * 100)
    with pytest.raises(errors.PackageError, match="at most 95"), stage(folder, limit_of=WANTED.get, total=100):
        pass


def test_a_folder_that_is_written_to_while_it_is_copied_is_refused(folder, monkeypatch):
    (folder / "b").write_bytes(b"x")
    plain = stage_module.copy_out

    def copy_and_write(source, name, to, **how):
        copied = plain(source, name, to, **how)
        if name == "b":
            (folder / "a").write_bytes(b"later")
        return copied

    monkeypatch.setattr(stage_module, "copy_out", copy_and_write)
    with pytest.raises(errors.PackageChangedError, match="'a'"), stage(folder, limit_of=WANTED.get):
        pass


def test_a_link_that_is_exchanged_after_the_check_is_not_followed(folder, monkeypatch):
    """The file is opened by its name after it was checked; what was opened must be at an allowed place too."""
    (folder.parent / "secret").write_bytes(b"s")
    plain = os.open

    def exchange_and_open(path, *args, **how):
        if os.fspath(path) == os.fspath(folder / "a"):
            (folder / "a").rename(folder / "kept")
            (folder / "a").symlink_to(folder.parent / "secret")
            opened = plain(path, *args, **how)
            (folder / "a").unlink()
            (folder / "kept").rename(folder / "a")
            return opened
        return plain(path, *args, **how)

    monkeypatch.setattr(os, "open", exchange_and_open)
    with pytest.raises(errors.PackageChangedError, match="replaced"), stage(folder, limit_of=WANTED.get):
        pass


def test_a_disk_without_room_is_a_typed_error(folder, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0))
    with (
        pytest.raises(errors.ResourceLimitError, match="has room for 0") as refused,
        stage(folder, limit_of=WANTED.get),
    ):
        pass
    assert "TMPDIR" in refused.value.next_step


def test_of_a_package_only_what_loaders_need_is_copied(tmp_path):
    save_package(make_tiny_model(), tmp_path / "p")
    for name in ("adapter_config.json", "pytorch_model.bin", "LICENSE"):
        (tmp_path / "p" / name).write_text("{}")
    with stage_package(tmp_path / "p") as copy:
        assert set(copy.sha256) == {
            layout.CONFIG, layout.GENERATION_CONFIG, layout.WEIGHTS, layout.RECORD, *layout.REMOTE_CODE
        }  # fmt: skip


def test_weights_larger_than_the_config_calls_for_are_not_copied(tmp_path):
    save_package(make_tiny_model(), tmp_path / "p")
    with open(tmp_path / "p" / layout.WEIGHTS, "r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(errors.PackageError, match=r"model\.safetensors"), stage_package(tmp_path / "p"):
        pass
