"""The tests' Hub keeps those promises of the real one that our code leans on; spoken to by the unmodified client."""

import io
import time
import urllib.error
import urllib.request

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from support.hub_server import Fault, User

REPO = "alice/model"


@pytest.fixture
def api(server):
    return HfApi()


def add():
    return [CommitOperationAdd("a", b"a")]


def refused(status, call, *args, **kwargs):
    with pytest.raises(HfHubHTTPError) as error:
        call(*args, **kwargs)
    return error.value.response.status_code == status


def test_a_commit_holds_what_was_sent_and_none_is_made_on_another_parent(server, api):
    api.create_repo(REPO)
    weights = b"w" * 3000
    made = api.create_commit(
        REPO,
        [CommitOperationAdd("config.json", b"{}"), CommitOperationAdd("model.safetensors", io.BytesIO(weights))],
        commit_message="title",
        commit_description="why",
    )
    assert server.history(REPO)[0].oid == made.oid == api.model_info(REPO).sha
    assert {k: v for k, v in server.files(REPO).items() if k != ".gitattributes"} == {
        "config.json": b"{}",
        "model.safetensors": weights,
    }
    assert (api.list_repo_commits(REPO)[0].title, api.list_repo_commits(REPO)[0].message) == ("title", "why")
    files = {entry.path: entry for entry in api.list_repo_tree(REPO, recursive=True)}
    assert files["model.safetensors"].lfs.size == 3000
    assert files["config.json"].blob_id == "9e26dfeeb6e641a33dae4961196235bdb965b21b"  # git hash-object
    assert server.uploaded()["lfs_upload"] == 3000
    api.create_commit(REPO, [CommitOperationDelete("config.json")], commit_message="less", parent_commit=made.oid)
    assert set(server.files(REPO)) == {".gitattributes", "model.safetensors"}
    assert refused(412, api.create_commit, REPO, add(), commit_message="a", parent_commit=made.oid)
    assert "a" not in server.files(REPO)


def test_branches_tags_and_pull_requests(server, api):
    first = server.create(REPO).refs["refs/heads/main"]
    api.create_branch(REPO, branch="feature/x", revision=first)
    on_branch = api.create_commit(REPO, add(), commit_message="a", revision="feature/x")
    api.create_tag(REPO, tag="v1", revision=on_branch.oid)
    proposal = api.create_commit(REPO, [CommitOperationAdd("b", b"b")], commit_message="b", create_pr=True)
    refs = api.list_repo_refs(REPO, include_pull_requests=True)
    assert {ref.name: ref.target_commit for ref in refs.branches} == {"main": first, "feature/x": on_branch.oid}
    assert {ref.name: ref.target_commit for ref in refs.tags} == {"v1": on_branch.oid}
    assert [(ref.ref, ref.target_commit) for ref in refs.pull_requests] == [("refs/pr/1", proposal.oid)]
    assert refused(409, api.create_tag, REPO, tag="v1")
    assert refused(409, api.create_branch, REPO, branch="main")
    api.delete_tag(REPO, tag="v1")
    assert not api.list_repo_refs(REPO).tags


def test_what_is_missing_is_named_and_parts_of_files_are_sent(server, api, tmp_path):
    server.create(REPO, {"model.safetensors": b"0123456789"})
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("alice/nothing")
    with pytest.raises(RevisionNotFoundError):
        api.model_info(REPO, revision="nothing")
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download(REPO, "nothing", cache_dir=tmp_path)
    url = f"{server.url}/{REPO}/resolve/main/model.safetensors"
    part = urllib.request.urlopen(urllib.request.Request(url, headers={"Range": "bytes=4-"}))
    assert (part.status, part.read(), part.headers["Content-Range"]) == (206, b"456789", "bytes 4-9/10")


def test_tokens_decide_who_may_what(server):
    server.create(REPO)
    server.create("alice/secret", private=True)
    server.tokens |= {"hf_reader": User("alice", role="read"), "hf_bob": User("bob")}
    for token, status in (("hf_wrong", 401), ("hf_reader", 403), ("hf_bob", 403)):
        assert refused(status, HfApi(token=token).create_commit, REPO, add(), commit_message="a")
    bob = HfApi(token="hf_bob")
    assert refused(403, bob.create_repo, "alice/another")
    assert refused(404, bob.model_info, "alice/secret")
    assert bob.create_commit(REPO, add(), commit_message="a", create_pr=True).pr_num == 1
    assert bob.whoami()["name"] == "bob"


def test_content_that_is_not_what_was_announced_is_refused(server):
    server.create(REPO)
    put = urllib.request.Request(f"{server.url}/lfs/{REPO}/{'0' * 64}", data=b"other", method="PUT")
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(put)


def test_faults_strike_the_requests_they_are_told_to(server, api):
    server.create(REPO)
    server.faults = [Fault(route="model_info", nth=2, status=503), Fault(route="refs", every=2, delay=0.2)]
    api.model_info(REPO)
    assert refused(503, api.model_info, REPO)
    api.model_info(REPO)
    api.list_repo_refs(REPO)
    started = time.perf_counter()
    api.list_repo_refs(REPO)
    assert time.perf_counter() - started >= 0.2


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
    assert ("refs/heads/x" in server.repos[REPO].refs) == bool(acted)
