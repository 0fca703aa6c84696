"""The tests' Hub keeps those promises of the real one that our code leans on; spoken to by the unmodified client."""

import io
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from slow.fault_sweep import serving
from support.hub_server import Fault, HubServer, User

REPO = "alice/model"


@pytest.fixture
def server():
    with serving(xet=False) as server:
        server.tokens["hf_reader"] = User("alice", role="read")
        server.tokens["hf_bob"] = User("bob")
        yield server


@pytest.fixture
def api(server):
    return HfApi()


def status_of(error):
    return error.value.response.status_code


def test_a_commit_holds_what_was_sent(server, api):
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
    api.create_commit(REPO, [CommitOperationDelete("config.json")], commit_message="less")
    assert set(server.files(REPO)) == {".gitattributes", "model.safetensors"}


def test_a_commit_on_another_parent_is_refused(server, api):
    first = server.create(REPO).refs["refs/heads/main"]
    api.create_commit(REPO, [CommitOperationAdd("a", b"a")], commit_message="a", parent_commit=first)
    with pytest.raises(HfHubHTTPError) as refused:
        api.create_commit(REPO, [CommitOperationAdd("b", b"b")], commit_message="b", parent_commit=first)
    assert status_of(refused) == 412
    assert "b" not in server.files(REPO)


def test_branches_tags_and_pull_requests(server, api):
    first = server.create(REPO).refs["refs/heads/main"]
    api.create_branch(REPO, branch="feature/x", revision=first)
    on_branch = api.create_commit(REPO, [CommitOperationAdd("a", b"a")], commit_message="a", revision="feature/x")
    api.create_tag(REPO, tag="v1", revision=on_branch.oid)
    proposal = api.create_commit(REPO, [CommitOperationAdd("b", b"b")], commit_message="b", create_pr=True)
    refs = api.list_repo_refs(REPO, include_pull_requests=True)
    assert {ref.name: ref.target_commit for ref in refs.branches} == {"main": first, "feature/x": on_branch.oid}
    assert {ref.name: ref.target_commit for ref in refs.tags} == {"v1": on_branch.oid}
    assert [(ref.ref, ref.target_commit) for ref in refs.pull_requests] == [("refs/pr/1", proposal.oid)]
    for make in (lambda: api.create_tag(REPO, tag="v1"), lambda: api.create_branch(REPO, branch="main")):
        with pytest.raises(HfHubHTTPError) as refused:
            make()
        assert status_of(refused) == 409
    api.delete_tag(REPO, tag="v1")
    assert not api.list_repo_refs(REPO).tags


def test_downloads_are_whole_or_from_where_they_broke_off(server, api, tmp_path):
    server.create(REPO, {"model.safetensors": b"0123456789", "sub/notes.txt": b"notes"})
    path = api.hf_hub_download(REPO, "sub/notes.txt", cache_dir=tmp_path)
    assert Path(path).read_bytes() == b"notes"
    url = f"{server.url}/{REPO}/resolve/main/model.safetensors"
    part = urllib.request.urlopen(urllib.request.Request(url, headers={"Range": "bytes=4-"}))
    assert (part.status, part.read(), part.headers["Content-Range"]) == (206, b"456789", "bytes 4-9/10")
    head = urllib.request.urlopen(urllib.request.Request(url, method="HEAD"))
    assert (head.headers["X-Repo-Commit"], head.read()) == (server.history(REPO)[0].oid, b"")


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
    add = [CommitOperationAdd("a", b"a")]
    for token, status in (("hf_wrong", 401), ("hf_reader", 403), ("hf_bob", 403)):
        with pytest.raises(HfHubHTTPError) as refused:
            HfApi(token=token).create_commit(REPO, add, commit_message="a")
        assert status_of(refused) == status
    with pytest.raises(HfHubHTTPError) as refused:
        HfApi(token="hf_bob").create_repo("alice/another")
    assert status_of(refused) == 403
    with pytest.raises(HfHubHTTPError) as refused:
        HfApi(token="hf_bob").model_info("alice/secret")
    assert status_of(refused) == 404
    assert HfApi(token="hf_bob").create_commit(REPO, add, commit_message="a", create_pr=True).pr_num == 1
    assert HfApi(token="hf_bob").whoami()["name"] == "bob"


def test_content_that_is_not_what_was_announced_is_refused(server):
    server.create(REPO)
    put = urllib.request.Request(f"{server.url}/lfs/{REPO}/{'0' * 64}", data=b"other", method="PUT")
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(put)
    assert refused.value.code == 400


def test_faults_strike_the_requests_they_are_told_to(server, api):
    server.create(REPO)
    server.faults = [Fault(route="model_info", nth=2, status=503), Fault(route="refs", every=2, delay=0.2)]
    api.model_info(REPO)
    with pytest.raises(HfHubHTTPError) as refused:
        api.model_info(REPO)
    assert status_of(refused) == 503
    api.model_info(REPO)
    api.list_repo_refs(REPO)
    started = time.perf_counter()
    api.list_repo_refs(REPO)
    assert time.perf_counter() - started >= 0.2


@pytest.mark.parametrize(
    ("fault", "acted"),
    [
        ({"cut": "before"}, False),
        ({"cut": "after"}, True),
        ({"status": 504, "acts": True}, True),
        ({"status": 504}, False),
    ],
)
def test_a_failed_request_has_acted_only_where_the_fault_says_so(server, fault, acted):
    server.create(REPO)
    server.faults = [Fault(**fault)]
    branch = urllib.request.Request(
        f"{server.url}/api/models/{REPO}/branch/x", data=b"{}", headers={"Authorization": f"Bearer {server.token}"}
    )
    with pytest.raises((urllib.error.HTTPError, ConnectionError)):
        urllib.request.urlopen(branch)
    assert ("refs/heads/x" in server.repos[REPO].refs) == acted


def test_two_servers_share_nothing():
    with HubServer() as one, HubServer() as other:
        one.create(REPO)
        assert one.url != other.url
        assert other.repos == {}
