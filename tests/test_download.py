"""What a download finds in the place of a package is named."""

import pytest
from slow.fault_sweep import serving

from hub_tools.errors import NotAPackageError, PackageError
from hub_tools.hub.download import fetch, fetch_outline

REPO = "alice/value"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
CASES = [
    ({}, NotAPackageError, "holds no package"),
    ({"README.md": b"words"}, NotAPackageError, r"README\.md"),
    ({"config.json": b"{}", "pytorch_model.bin": b"pickle"}, PackageError, r"pytorch_model\.bin"),
    ({"config.json": b"{}", "model.safetensors": POINTER}, PackageError, "pointer of git-lfs"),
]


@pytest.mark.parametrize(("files", "error", "found"), CASES, ids=["empty", "a card", "pickles", "a pointer"])
def test_what_lies_in_the_place_of_a_package_is_named(tmp_path, files, error, found):
    with serving(xet=False) as server:
        server.create(REPO, files)
        with pytest.raises(error, match=found) as fetched:
            fetch(REPO, cache_dir=tmp_path / "cache")
        assert REPO in str(fetched.value)
        (tmp_path / "outline").mkdir()
        with pytest.raises(error, match=found):
            fetch_outline(REPO, tmp_path / "outline", cache_dir=tmp_path / "cache")
