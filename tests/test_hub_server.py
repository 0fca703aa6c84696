"""The tests' Hub keeps those promises of the real one that our code leans on; spoken to by the unmodified client."""

from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from support.hub_server import Fault

REPO = "alice/model"
ADD = [CommitOperationAdd("a", b"a")]


def test_what_is_committed_is_downloaded_and_what_may_not_be_is_refused(server, tmp_path):
    api, files = HfApi(), {"config.json": b"{}", "model.safetensors": b"w" * 3000}
    server.tokens["hf_bob"] = "bob"
    api.create_repo(REPO)
    made = api.create_commit(REPO, [CommitOperationAdd(*file) for file in files.items()], commit_message="title")
    api.create_tag(REPO, tag="v1")
    delete = [CommitOperationDelete("config.json")]
    api.create_commit(REPO, delete, commit_message="less", parent_commit=made.oid)
    folder = Path(api.snapshot_download(REPO, revision="v1", cache_dir=tmp_path))
    assert files.items() <= {path.name: path.read_bytes() for path in folder.iterdir()}.items()
    assert set(api.list_repo_files(REPO)) == {".gitattributes", "model.safetensors"}
    for status, token, options in (
        (412, None, {"parent_commit": made.oid}),
        (401, "hf_wrong", {}),
        (403, "hf_bob", {}),
        (400, None, {"revision": "v1"}),
    ):
        with pytest.raises(HfHubHTTPError) as refused:
            HfApi(token=token).create_commit(REPO, ADD, commit_message="a", **options)
        assert refused.value.response.status_code == status
    for error, repo_id, name, revision in (
        (RepositoryNotFoundError, "alice/nothing", "a", "main"),
        (RevisionNotFoundError, REPO, "a", "nothing"),
        (EntryNotFoundError, REPO, "a", "main"),
    ):
        with pytest.raises(error):
            api.hf_hub_download(repo_id, name, revision=revision, cache_dir=tmp_path)


@pytest.mark.parametrize("fault", [{"cut": True}, {"status": 504}], ids=str)
@pytest.mark.parametrize("acts", [False, True])
def test_a_failed_request_has_acted_only_where_the_fault_says_so(server, fault, acts):
    server.create(REPO)
    server.faults.append(Fault(route="create_tag", acts=acts, **fault))
    with pytest.raises(Exception, match=r"504|onnection|disconnected"):
        HfApi().create_tag(REPO, tag="v1")
    assert ("refs/tags/v1" in server.repos[REPO].refs) == acts
