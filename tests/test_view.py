"""`gpt2_value.show`: the numbers of each token, and HTML that a stranger's tokens cannot break out of."""

import html
import math
import re

import pytest
import torch
from conftest import make_tiny_model, plain_twin
from support.settings import seeded
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from gpt2_value import rescore, show
from gpt2_value.view import TokenTexts, labels, tokens
from sampler_audit import rollout_from_tokens

HOSTILE = [
    "<script>document.title='run'</script>",
    '"><img src=x onerror=alert(1)>',
    "\u202eabc\u200f",
    "x" * 3_600_000,
    "\n",
    "\x00\x1b[2J",
    "&amp;",
    "",
    "e\u0301",
    "</span></div></bdi></style>",
    "';--value:url(http://example.org)",
    "${alert(1)}{{alert(1)}}",
]


@pytest.fixture
def other():
    return make_tiny_model(seed=1)


def words(texts, decoder=None):
    """A tokenizer with these texts as its first tokens."""
    vocabulary = {text: id for id, text in enumerate(["<end>", *texts])}
    vocabulary |= {f"w{id}": id for id in range(len(vocabulary), 96)}
    backend = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<end>"))
    backend.decoder = decoder or decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


def drawn(model, rows=([5, 6, 7], [8], [9, 10]), **settings):
    return model.rollout(list(rows), **{"max_new_tokens": 20, "eos_token_id": 0, "generator": seeded(), **settings})


@pytest.mark.parametrize("settings", [{}, {"top_k": 7, "min_new_tokens": 9, "temperature": 0.7}], ids=str)
def test_all_numbers_are_those_of_rescoring(tiny_model, other, tiny_tokenizer, settings):
    rollout = drawn(tiny_model, **settings)
    scored = rescore(tiny_model, rollout, with_entropy=True, reference=other)
    theirs = rescore(other, rollout)
    with torch.no_grad():
        states = tiny_model(rollout.sequences, attention_mask=rollout.attention_mask).value
    for row, found in enumerate(tokens.read(rollout, tiny_tokenizer, tiny_model, other)):
        mask = rollout.response_mask[row]
        response = [token for token in found if token.drawn]
        for name, column in {
            "logprob": scored.logprobs,
            "before": scored.values,
            "entropy": scored.entropy,
            "kl": scored.kl,
            "their_logprob": theirs.logprobs,
            "their_before": theirs.values,
        }.items():
            shown = [getattr(token, name) for token in response]
            assert shown == pytest.approx(column[row][mask].tolist(), abs=1e-4), name
        after = states[row][rollout.attention_mask[row].bool()]
        assert [token.after for token in found] == pytest.approx(after.tolist(), abs=1e-4)
        for token in response:
            chances = [chance for _, chance in token.likeliest if chance]  # 0 is cut off
            assert chances == sorted(chances, reverse=True)
            assert 1 <= token.rank <= token.choices
            assert token.rank > 1 or math.exp(token.logprob) == pytest.approx(chances[0], abs=1e-5)


def test_without_a_model_the_numbers_are_the_rollouts_own(tiny_model, tiny_tokenizer):
    rollout = drawn(tiny_model)
    for row, found in enumerate(tokens.read(rollout, tiny_tokenizer, None, None)):
        response = [token for token in found if token.drawn]
        mask = rollout.response_mask[row]
        assert [token.logprob for token in response] == rollout.logprobs[row][mask].tolist()
        assert [token.before for token in response] == rollout.values[row][mask].tolist()
        assert [token.after for token in response[:-1]] == [token.before for token in response[1:]]
        assert response[-1].after is None  # nobody computed it
    plain = show(rollout, tiny_tokenizer, plain_twin(tiny_model)).html
    assert "gv-lines" not in plain.split("</style>")[1]


def test_what_cannot_be_shown_is_named(tiny_model, tiny_tokenizer):
    rollout, larger = drawn(tiny_model), make_tiny_model(vocab_size=97)
    for error, named, *wrong in (
        (TypeError, "NoneType", None, tiny_tokenizer),
        (TypeError, "tokenizer", rollout, None),
        (ValueError, "96 and 97", rollout, tiny_tokenizer, tiny_model, larger),
    ):
        with pytest.raises(error, match=named):
            show(*wrong)


def test_texts_that_nobody_drew_have_no_sums_over_draws(tiny_model, other, tiny_tokenizer):
    texts = rollout_from_tokens([[0], [0]], [[5, 6, 7], [8]])
    assert "by these draws" not in show(texts, tiny_tokenizer, tiny_model, other).html
    assert "by these draws" in show(drawn(tiny_model), tiny_tokenizer, tiny_model, other).html
    first = tokens.read(texts, tiny_tokenizer, tiny_model)[0][1]
    assert first.logprob == pytest.approx(rescore(tiny_model, texts).logprobs[0, 0].item(), abs=1e-5)


def test_hostile_tokens_stay_text(tiny_model, other, tmp_path):
    texts = rollout_from_tokens([[0]], [list(range(1, len(HOSTILE) + 1))])
    tiny_model.name_or_path = "<script>evil</script>\x1b\u202e/" + "long" * 100
    page = show(texts, words(HOSTILE), tiny_model, other)
    assert "\x1b" not in repr(page)
    saved = page.save(tmp_path / "page.html").read_text(encoding="utf-8")
    tags, attributes = set(re.findall(r"<(\w+)", saved)), set(re.findall(r"<[^>]*?\s([\w-]+)=", saved))
    assert tags.isdisjoint({"script", "img", "link", "iframe", "a", "form", "object"})
    assert not [name for name in attributes if name.startswith("on") or name in ("src", "href", "action")]
    assert all(saved.count(f"<{tag}") == saved.count(f"</{tag}>") for tag in ("span", "div", "section", "bdi", "style"))
    assert "default-src 'none'" in saved
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\u200e\u200f\u202a-\u202e\u2066-\u2069]", saved)
    text = html.unescape(re.sub(r"<[^>]*>", "", saved))
    for escape in (r"\u202eabc\u200f", r"\x00\x1b[2J", "⏎", "&amp;", "(empty)", HOSTILE[0], "3,600,000·characters"):
        assert escape in text
    assert len(saved) < 200_000


def test_a_decoder_that_multiplies_text_is_not_run(tiny_model):
    bomb = decoders.Sequence([decoders.Replace("w", "w" * 1000)] * 4)  # 10^12 letters for one
    assert len(show(rollout_from_tokens([[0]], [[50, 51]]), words([], bomb), tiny_model).html) < 50_000


def test_a_tokens_text_is_what_its_bytes_say(tiny_tokenizer):
    tiny_tokenizer.add_special_tokens({"additional_special_tokens": ["<é>"]})
    texts, size = TokenTexts(tiny_tokenizer), len(tiny_tokenizer)
    assert [texts[id] for id in (0, size - 1, 99_999)] == ["<|endoftext|>", "<é>", "<token 99999>"]
    assert TokenTexts(words(["▁the", "Ġof", "Ã©", "ðŁ", "ĺĢ"]))[1] == " the"
    bytes_ = TokenTexts(words(["Ġ", "Ġof", "Ã©", "ðŁ", "ĺĢ"]))
    assert [bytes_[id] for id in (2, 3, 4)] == [" of", "é", r"\xf0\x9f"]
    assert bytes_.join([4, 5, 2]) == "😀 of"


@pytest.mark.parametrize("column", ["logprobs", "values"])
def test_numbers_that_are_not_finite_are_shown(tiny_model, tiny_tokenizer, column):
    rollout = drawn(tiny_model)
    getattr(rollout, column)[0, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    assert show(rollout, tiny_tokenizer).html.count("gv-chip") > 3


def test_text_can_be_read_on_every_colour(tiny_model, other, tiny_tokenizer):
    def luminance(colour):
        parts = (part / 255 for part in bytes.fromhex(colour))
        linear = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    page = show(drawn(tiny_model, max_new_tokens=50), tiny_tokenizer, tiny_model, other).html
    found = re.findall(r"--(\w+):#(\w{6});--\w+-number:'[^']*';--\w+-ink:#(\w{6})", page)
    assert {name for name, *_ in found} == {"value", "logprob", "entropy", "ratio"}
    assert len({ink for *_, ink in found}) == 2  # dark and light
    for _, *colours in found:  # the background, the ink
        dark, light = sorted(map(luminance, colours))
        assert (light + 0.05) / (dark + 0.05) > 4, colours  # WCAG 2 asks 4.5 of small text, 3 of large


def test_labels_are_short_and_differ():
    assert labels("/runs/a/package", "/runs/b/package") == ("a/package", "b/package")
    assert labels("me/gpt2", "you/other") == ("gpt2", "other")
    first, second = labels("x" * 500, "x" * 500)
    assert len(first) <= 32
    assert first != second
