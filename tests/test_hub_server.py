"""The tests' Hub keeps those promises of the real one that our code leans on; spoken to by the unmodified client."""

import urllib.error
import urllib.request

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from support.hub_server import Fault, User

REPO = "alice/model"
ADD = [CommitOperationAdd("a", b"a")]


@pytest.fixture
def api(server):
    return HfApi()


def refused(status, call, *args, **kwargs):
    with pytest.raises(HfHubHTTPError) as error:
        call(*args, **kwargs)
    return error.value.response.status_code == status


def test_a_commit_holds_what_was_sent_and_none_is_made_on_another_parent(server, api):
    api.create_repo(REPO)
    files = {"config.json": b"{}", "model.safetensors": b"w" * 3000}
    made = api.create_commit(REPO, [CommitOperationAdd(*file) for file in files.items()], commit_message="title")
    assert server.history(REPO)[0].oid == made.oid == api.model_info(REPO).sha
    assert files.items() <= server.files(REPO).items()
    listed = {entry.rfilename: entry for entry in api.model_info(REPO, files_metadata=True).siblings}
    assert listed["model.safetensors"].lfs.size == server.uploaded()["lfs_upload"] == 3000
    assert listed["config.json"].blob_id == "9e26dfeeb6e641a33dae4961196235bdb965b21b"  # git hash-object
    api.create_commit(REPO, [CommitOperationDelete("config.json")], commit_message="less", parent_commit=made.oid)
    assert set(server.files(REPO)) == {".gitattributes", "model.safetensors"}
    assert refused(412, api.create_commit, REPO, ADD, commit_message="a", parent_commit=made.oid)
    assert "a" not in server.files(REPO)


def test_branches_and_tags_are_made_once(server, api):
    server.create(REPO)
    api.create_branch(REPO, branch="feature/x")
    api.create_tag(REPO, tag="v1")
    assert refused(409, api.create_branch, REPO, branch="feature/x")
    assert refused(409, api.create_tag, REPO, tag="v1")


def test_what_is_missing_is_named(server, api, tmp_path):
    server.create(REPO)
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("alice/nothing")
    with pytest.raises(RevisionNotFoundError):
        api.model_info(REPO, revision="nothing")
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download(REPO, "nothing", cache_dir=tmp_path)


def test_tokens_decide_who_may_what(server):
    server.create(REPO)
    server.create("alice/secret", private=True)
    server.tokens |= {"hf_reader": User("alice", role="read"), "hf_bob": User("bob")}
    for token, status in (("hf_wrong", 401), ("hf_reader", 403), ("hf_bob", 403)):
        assert refused(status, HfApi(token=token).create_commit, REPO, ADD, commit_message="a")
    bob = HfApi(token="hf_bob")
    assert refused(403, bob.create_repo, "alice/another")
    assert refused(404, bob.model_info, "alice/secret")
    assert bob.create_commit(REPO, ADD, commit_message="a", create_pr=True).pr_num == 1


def test_content_that_is_not_what_was_announced_is_refused(server):
    server.create(REPO)
    put = urllib.request.Request(f"{server.url}/lfs/{REPO}/{'0' * 64}", data=b"other", method="PUT")
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(put)


FAULTS = [
    ({"cut": "before"}, False),
    ({"cut": "after"}, True),
    ({"status": 504, "acts": True}, True),
    ({"status": 504}, False),
]


@pytest.mark.parametrize(("fault", "acted"), FAULTS, ids=str)
def test_a_failed_request_has_acted_only_where_the_fault_says_so(server, fault, acted):
    server.create(REPO)
    server.faults = [Fault(**fault)]
    branch = urllib.request.Request(
        f"{server.url}/api/models/{REPO}/branch/x", data=b"{}", headers={"Authorization": f"Bearer {server.token}"}
    )
    with pytest.raises((urllib.error.HTTPError, ConnectionError)):
        urllib.request.urlopen(branch)
    assert ("refs/heads/x" in server.repos[REPO].refs) == acted
