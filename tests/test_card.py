"""The model card states facts: nothing invented, no local path, metadata that the Hub accepts."""

import pytest
from huggingface_hub import ModelCard

from hub_tools import errors, save_package
from hub_tools.package.card import load_lines


def card_of(saved):
    return ModelCard.load(saved.folder / "README.md")


def test_metadata_say_what_the_hub_needs_to_know(tiny_model, tmp_path):
    facts = {"base_model": "openai-community/gpt2", "license": "mit", "tags": ["reviews"]}
    card = card_of(save_package(tiny_model, tmp_path / "p", **facts))
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    assert (card.data.base_model, card.data.license) == ("openai-community/gpt2", "mit")
    assert {"gpt2", "value-head", "reviews"} <= set(card.data.tags)
    assert card.text.lstrip().startswith("# ")
    assert f"| {sum(weight.numel() for weight in tiny_model.parameters()):,}, float32 |" in card.text


def test_what_is_not_given_is_not_invented(tiny_model, tmp_path):
    card = card_of(save_package(tiny_model, tmp_path / "p"))
    assert (card.data.base_model, card.data.license) == (None, None)
    assert "license" not in str(card).lower()
    assert "Made from" not in str(card)


@pytest.mark.parametrize("has_tokenizer", [True, False])
def test_the_lines_that_load_it_stand_in_the_card(has_tokenizer, tiny_model, tiny_tokenizer, tmp_path):
    for repo_id in ("user/model", None):
        card = card_of(
            save_package(tiny_model, tmp_path / "p", tiny_tokenizer if has_tokenizer else None, repo_id=repo_id)
        )
        lines = load_lines(repo_id or ".", tokenizer=has_tokenizer)
        assert lines in str(card)
        assert len(lines.splitlines()) == 2 + has_tokenizer


PATHS = ["./gpt2", "/models/gpt2", "a/b/c", "..", "", "C:\\gpt2", "~/x", "runs/step100"]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *[("base_model", path) for path in PATHS],
        ("license", "Apache License 2.0"),
        ("license", "mit\nbase_model: x"),
        ("tags", ["a\nb: c"]),
        ("tags", [""]),
        ("repo_id", "a/b/c"),
    ],
)
def test_what_the_hub_would_reject_and_local_paths_are_refused(option, value, tiny_model, tmp_path, monkeypatch):
    (tmp_path / "runs" / "step100").mkdir(parents=True)  # a folder that looks like an id
    monkeypatch.chdir(tmp_path)
    with pytest.raises(errors.OptionsError, match=option):
        save_package(tiny_model, tmp_path / "p", **{option: value})
    assert not (tmp_path / "p").exists()
