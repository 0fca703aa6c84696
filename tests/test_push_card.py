"""The card of a repository: its words are its owner's, the metadata ours."""

import huggingface_hub
import pytest
from support.pushing import REPO, push_verified

from hub_tools.errors import OptionsError
from hub_tools.package.save import save_package


@pytest.fixture
def package(tmp_path, tiny_model):
    save_package(tiny_model, tmp_path / "package", repo_id=REPO)
    return tmp_path / "package"


def test_a_card_on_the_hub_keeps_its_words_and_gets_our_metadata(server, package):
    metadata = "---\nlicense: apache-2.0\nlanguage: de\ntags:\n- mine\npipeline_tag: fill-mask\n---\n"
    words = "# Mine\r\n\u00fcber alles\r\n"
    server.create(REPO, {"README.md": (metadata + words).encode()})
    push_verified(package)
    card = server.files(REPO)["README.md"]
    assert card.endswith(("---\n" + words).encode())
    data = huggingface_hub.ModelCard(card.decode(), ignore_metadata_errors=True).data.to_dict()
    assert (data["license"], data["language"], data["pipeline_tag"]) == ("apache-2.0", "de", "text-generation")
    assert data["tags"][0] == "mine"
    assert "value-head" in data["tags"]
    assert not push_verified(package).committed, "merging again changes nothing"
    assert server.files(REPO)["README.md"] == card


def test_a_card_that_was_written_for_a_folder_gets_the_repositorys_address(server, tiny_model, tmp_path):
    folder = tmp_path / "local"
    save_package(tiny_model, folder)
    assert 'from_pretrained(".", ' in (folder / "README.md").read_text()
    push_verified(folder)
    card = server.files(REPO)["README.md"].decode()
    assert f'AutoModel.from_pretrained("{REPO}", trust_remote_code=True)' in card
    assert 'from_pretrained(".", ' not in card
    assert "In the folder of this package" not in card
    assert not push_verified(folder).committed


@pytest.mark.parametrize("theirs", [b"---\nlicense: mit\n---\n", b"---\r\nlicense: mit\r\n---", b"", b"# Only words\n"])
def test_a_card_without_metadata_or_without_text_is_completed(server, package, theirs):
    server.create(REPO, {"README.md": theirs})
    push_verified(package)
    card = server.files(REPO)["README.md"]
    assert b"library_name: transformers" in card
    assert (b"license: mit" in card) == (b"license" in theirs)
    assert b"# Only words" in card or b"AutoModel.from_pretrained" in card
    assert not push_verified(package).committed


def test_a_card_that_cannot_be_read_is_not_overwritten(server, package):
    server.create(REPO, {"README.md": b"---\ntags: [unclosed\n---\nwords"})
    with pytest.raises(OptionsError, match=r"README.md in the repository"):
        push_verified(package)
    assert server.files(REPO)["README.md"].endswith(b"words")
