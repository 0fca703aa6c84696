"""The model card states facts: nothing invented, no local path, metadata that the Hub accepts."""

import dataclasses

import pytest
from huggingface_hub import ModelCard

from hub_tools import errors
from hub_tools.package.card import CardFacts, is_hub_id, load_lines, render_card
from hub_tools.package.save import save_package

FACTS = CardFacts(
    parameters=124_440_577,
    dtype="float32",
    n_layer=12,
    n_embd=768,
    n_head=12,
    n_positions=1024,
    vocab_size=50257,
    has_tokenizer=True,
    versions={"gpt2-value": "1.2.3", "torch": "2.13.0"},
)


def test_metadata_say_what_the_hub_needs_to_know():
    data = render_card(FACTS, base_model="openai-community/gpt2", license="mit", tags=["reviews"]).data
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert (data.base_model, data.license) == ("openai-community/gpt2", "mit")
    assert {"gpt2", "value-head", "reviews"} <= set(data.tags)


def test_what_is_not_given_is_not_invented():
    card = render_card(FACTS)
    assert (card.data.base_model, card.data.license) == (None, None)
    assert "license" not in str(card).lower()
    assert "Made from" not in str(card)


def test_a_card_survives_the_hub_s_own_reader(tiny_model, tiny_tokenizer, tmp_path):
    save_package(tiny_model, tmp_path / "p", tiny_tokenizer, base_model="openai-community/gpt2")
    card = ModelCard.load(tmp_path / "p" / "README.md")
    assert card.data.base_model == "openai-community/gpt2"
    assert card.text.lstrip().startswith("# ")


@pytest.mark.parametrize("has_tokenizer", [True, False])
def test_the_lines_that_load_it_stand_in_the_card(has_tokenizer):
    facts = dataclasses.replace(FACTS, has_tokenizer=has_tokenizer)
    assert load_lines("user/model", tokenizer=has_tokenizer) in str(render_card(facts, repo_id="user/model"))
    assert load_lines(".", tokenizer=has_tokenizer) in str(render_card(facts))
    assert len(load_lines("user/model", tokenizer=True).splitlines()) == 3


@pytest.mark.parametrize(
    "base_model", ["./gpt2", "/models/gpt2", "a/b/c", "..", "gpt2/", "", "C:\\gpt2", "a--b", "~/x"]
)
def test_a_local_path_is_no_base_model(base_model):
    assert not is_hub_id(base_model)
    with pytest.raises(errors.OptionsError, match="base_model"):
        render_card(FACTS, base_model=base_model)


def test_a_folder_that_looks_like_a_hub_id_is_no_base_model(tmp_path, monkeypatch):
    assert is_hub_id("runs/step100")
    (tmp_path / "runs" / "step100").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(errors.OptionsError, match="local path"):
        render_card(FACTS, base_model="runs/step100")


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"license": "Apache License 2.0"}, "license"),
        ({"license": "mit\nbase_model: x"}, "license"),
        ({"tags": ["a\nb: c"]}, "tag"),
        ({"tags": [""]}, "tag"),
        ({"repo_id": "a/b/c"}, "repo_id"),
    ],
)
def test_metadata_that_the_hub_would_reject_are_refused(options, names):
    with pytest.raises(errors.OptionsError, match=names):
        render_card(FACTS, **options)
