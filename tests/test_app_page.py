"""The app's pages without a server: tokens while they are drawn, all about each of them, and how that looks."""

import dataclasses
import html
import html.parser
import itertools
import json
import math
import re

import pytest
import torch
from conftest import make_tiny_model, plain_twin, sampling_logprobs
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from generation_gpt2_value import rescore, rollout
from hub_tools.app.page import palettes
from hub_tools.app.page.chips import view
from hub_tools.app.page.desk import Desk, Named
from hub_tools.app.page.document import document
from hub_tools.app.page.records import as_json, as_read, records
from hub_tools.app.page.stream import stream
from hub_tools.app.page.token_text import TokenTexts, visible
from hub_tools.package.writing.save import save_package
from sampling_gpt2_value import Sampling

QUERIES = [torch.tensor([5, 6, 7]), torch.tensor([8]), torch.tensor([9, 10])]
SETTINGS = {
    "plain": {},
    "ends": {"eos_token_id": tuple(range(40, 60))},
    "min_new_tokens": {"eos_token_id": tuple(range(40, 60)), "min_new_tokens": 7},
    "top_k": {"top_k": 2, "temperature": 1.5},
    "top_k, as bits": {"top_k": 20, "eos_token_id": (41, 42)},
    "top_p": {"top_p": 0.7, "temperature": 0.7, "eos_token_id": (41, 42, 43)},
}
HOSTILE = [
    "<script>document.title='run'</script>",
    '"><img src=x onerror=alert(1)>',
    "\u202eabc\u200f",
    "x" * 10_000,
    "\n",
    "\x00\x1b[2J",
    "&amp;",
    " ",
    "e\u0301",
    "\u05e9\u05dc\u05d5\u05dd",
    "</span></div></bdi>",
    "';--value:url(http://example.org)",
]


@pytest.fixture
def other():
    return make_tiny_model(seed=1)


@pytest.fixture
def hostile_tokenizer():
    vocabulary = {text: id for id, text in enumerate(["<end>", *HOSTILE])}
    vocabulary |= {f"w{id}": id for id in range(len(vocabulary), 96)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<end>")), eos_token="<end>"
    )


def drawn(model, seed=0, **settings):
    generator = torch.Generator().manual_seed(seed)
    return rollout(model, QUERIES, max_new_tokens=20, generator=generator, **settings)


# While they are drawn


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("copies", [1, 3])
def test_streamed_tokens_are_those_of_one_rollout(tiny_model, name, copies):
    sampling = Sampling(**SETTINGS[name])
    for seed in range(3):
        settings = {"max_new_tokens": 30, "num_return_sequences": copies}
        whole = rollout(
            tiny_model,
            QUERIES,
            generator=torch.Generator().manual_seed(seed),
            **settings,
            **dataclasses.asdict(sampling),
        )
        generator = torch.Generator().manual_seed(seed)
        *_, last = stream(tiny_model, QUERIES, sampling=sampling, generator=generator, **settings)
        T = last.responses.shape[1]
        assert not whole.response_mask[:, T:].any()  # the stream ends with the last row
        assert last.sampling == whole.sampling
        for field in ("responses", "response_mask"):
            assert torch.equal(getattr(last, field), getattr(whole, field)[:, :T]), field
        assert torch.equal(last.truncated, whole.truncated)
        P = whole.sequences.shape[1] - whole.responses.shape[1]
        for field in ("sequences", "attention_mask"):
            assert torch.equal(getattr(last, field), getattr(whole, field)[:, : P + T]), field
        for field in ("logprobs", "values"):
            assert torch.allclose(getattr(last, field), getattr(whole, field)[:, :T], atol=1e-5), field
        assert (last.kept is None) == (whole.kept is None)
        if last.kept is not None:
            zeros = torch.zeros(*last.responses.shape, 96)
            mask = last.response_mask
            kept, of_whole = (
                sampling_logprobs(zeros, Sampling(), kept=k[:, :T])[mask] for k in (last.kept, whole.kept)
            )
            assert torch.equal(kept, of_whole)
        assert torch.allclose(rescore(tiny_model, last).logprobs, last.logprobs, atol=1e-5)


def test_a_stream_begins_with_the_first_token_and_only_grows(tiny_model):
    generator = torch.Generator().manual_seed(0)
    lengths = {"max_new_tokens": 40, "num_return_sequences": 1}
    shown = [
        found.responses for found in stream(tiny_model, QUERIES, sampling=Sampling(), generator=generator, **lengths)
    ]
    sizes = [responses.shape[1] for responses in shown]
    assert sizes[:8] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert sizes[-1] == 40
    for shorter, longer in itertools.pairwise(shown):
        assert torch.equal(longer[:, : shorter.shape[1]], shorter)
        assert longer.shape[1] > shorter.shape[1]


@pytest.mark.parametrize(
    ("settings", "lengths", "message"),
    [
        ({}, {"max_new_tokens": 0}, "max_new_tokens=0"),
        ({}, {"max_new_tokens": 62}, "positions end at 64"),
        ({}, {"num_return_sequences": 0}, "num_return_sequences=0"),
        ({"eos_token_id": 0, "min_new_tokens": 9}, {"max_new_tokens": 8}, "min_new_tokens=9"),
    ],
)
def test_a_stream_refuses_what_a_rollout_refuses(tiny_model, settings, lengths, message):
    lengths = {"max_new_tokens": 5, "num_return_sequences": 1, **lengths}
    with pytest.raises(ValueError, match=message):
        rollout(tiny_model, QUERIES, **settings, **lengths)
    with pytest.raises(ValueError, match=message):
        next(stream(tiny_model, QUERIES, sampling=Sampling(**settings), generator=torch.Generator(), **lengths))


# All about a token


@pytest.mark.parametrize("name", SETTINGS)
def test_records_are_what_rescore_says(tiny_model, tiny_tokenizer, other, name):
    found = drawn(tiny_model, **SETTINGS[name])
    with torch.no_grad():
        scored = rescore(tiny_model, found, with_entropy=True, reference=other)
        theirs = rescore(other, found)
    for row, response in enumerate(records(tiny_model, tiny_tokenizer, found, other=other)):
        mask = found.response_mask[row]
        assert [token.id for token in response.tokens] == found.responses[row][mask].tolist()
        assert [token.id for token in response.prompt] == QUERIES[row].tolist()
        for name, numbers in (
            ("logprob", scored.logprobs),
            ("entropy", scored.entropy),
            ("value_before", scored.values),
            ("kl", scored.kl),
            ("other_logprob", theirs.logprobs),
            ("other_value_before", theirs.values),
            ("log_ratio", scored.logprobs - theirs.logprobs),
        ):
            assert [getattr(token, name) for token in response.tokens] == pytest.approx(
                numbers[row][mask].tolist(), abs=1e-6
            ), name


def test_the_value_after_a_token_is_the_value_before_the_next(tiny_model, tiny_tokenizer, other):
    found = drawn(tiny_model)
    for row, response in enumerate(records(tiny_model, tiny_tokenizer, found, other=other)):
        with torch.no_grad():
            values = tiny_model(found.sequences[row][found.attention_mask[row].bool()][None]).value[0]
        shown = [token.value_after for token in (*response.prompt, *response.tokens)]
        assert shown == pytest.approx(values.tolist(), abs=1e-5)
        for mine, following in itertools.pairwise(response.tokens):
            assert mine.value_after == pytest.approx(following.value_before, abs=1e-5)
            assert mine.other_value_after == pytest.approx(following.other_value_before, abs=1e-5)
        assert response.prompt[-1].value_after == pytest.approx(response.tokens[0].value_before, abs=1e-5)


def test_the_likeliest_tokens_are_those_of_the_distribution_and_say_what_was_cut_off(tiny_model, tiny_tokenizer):
    found = drawn(tiny_model, top_k=3, temperature=0.8)
    (response, *_) = records(tiny_model, tiny_tokenizer, found)
    with torch.no_grad():
        logits = tiny_model(torch.cat([QUERIES[0], found.responses[0]])[None]).logits[0, 2:-1]
    best = logits.topk(5).indices
    probs = (logits.gather(-1, best)[:, :3] / 0.8).softmax(-1)
    for step, token in enumerate(response.tokens):
        assert [entry.id for entry in token.likeliest] == best[step].tolist()
        chances = [entry.probability for entry in token.likeliest]
        assert chances == pytest.approx([*probs[step].tolist(), 0.0, 0.0], abs=1e-5)
        assert (token.choices, token.kept) == (3, True)
        assert 1 <= token.rank <= 3
        assert token.likeliest[token.rank - 1].id == token.id
        assert math.exp(token.logprob) == pytest.approx(chances[token.rank - 1], abs=1e-5)


def test_a_suppressed_end_of_text_is_not_among_the_likeliest(tiny_model, tiny_tokenizer):
    ends = tuple(range(48))
    found = drawn(tiny_model, eos_token_id=ends, min_new_tokens=4)
    for response in records(tiny_model, tiny_tokenizer, found):
        for token in response.tokens[:4]:
            assert not {entry.id for entry in token.likeliest} & set(ends)
            assert token.choices == 48


def test_a_text_that_is_read_is_scored_by_the_model_s_own_distribution(tiny_model, tiny_tokenizer, other):
    texts = [torch.tensor([3, 4, 5, 0, 7]), torch.tensor([9])]
    long, short = records(tiny_model, tiny_tokenizer, as_read(texts), other=other)
    with torch.no_grad():
        output = tiny_model(texts[0][None])
    logprobs = output.logits[0, :-1].log_softmax(-1).gather(-1, texts[0][1:, None]).squeeze(-1)
    assert [token.logprob for token in long.tokens] == pytest.approx(logprobs.tolist(), abs=1e-5)
    assert [token.value_before for token in long.tokens] == pytest.approx(output.value[0, :-1].tolist(), abs=1e-5)
    assert [len(long.prompt), len(short.prompt), len(short.tokens)] == [1, 1, 0]
    assert short.prompt[0].value_after == pytest.approx(tiny_model(texts[1][None]).value.item(), abs=1e-5)


def test_a_model_without_a_head_has_no_values_and_all_the_rest(tiny_model, tiny_tokenizer):
    plain = plain_twin(tiny_model)
    (response, *_) = records(plain, tiny_tokenizer, drawn(plain), other=tiny_model)
    assert all(token.value_before is None and token.value_after is None for token in response.tokens)
    assert all(
        token.kl == pytest.approx(0, abs=1e-5) and token.other_value_after is not None for token in response.tokens
    )
    assert 'data-other-value="' in view([response], names=("plain", "tiny"))


# Texts of tokens


def test_a_token_s_text_is_its_characters_or_its_bytes(tiny_tokenizer):
    texts = TokenTexts(tiny_tokenizer)
    assert texts[tiny_tokenizer.convert_tokens_to_ids("H")] == "H"
    assert texts[tiny_tokenizer.convert_tokens_to_ids("¡")] == "\\xa1"  # the byte, which is no text by itself
    assert texts[0] == "<|endoftext|>"
    assert texts[1_000] == "<token 1000>"


def test_what_cannot_be_seen_gets_a_sign():
    assert visible(" a\n\u202e\u200fb\x00") == [
        ("·", True),
        ("a", False),
        ("⏎\\u202e\\u200f", True),
        ("b", False),
        ("\\x00", True),
    ]


# HTML


class Reader(html.parser.HTMLParser):
    """Elements and their attributes, the chips' own attributes, and the text of each chip; checks the nesting."""

    VOID = {"input", "meta", "br", "line", "polyline"}

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.chips, self.texts, self.attributes = [], set(), [], [], set()
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.add(tag)
        self.attributes |= attributes.keys()
        if tag not in self.VOID:
            self.open.append((tag, attributes.get("class", "")))
        if attributes.get("class", "").startswith("gv-chip"):
            self.chips.append(attributes)
            self.texts.append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if any(kind.startswith("gv-chip") for _, kind in self.open) and not any(k == "gv-card" for _, k in self.open):
            self.texts[-1] += data


TAGS = {
    "div",
    "fieldset",
    "legend",
    "label",
    "input",
    "span",
    "b",
    "i",
    "bdi",
    "br",
    "section",
    "figure",
    "svg",
    "line",
}
TAGS |= {"polyline", "text", "figcaption", "small"}
ATTRIBUTES = re.compile(
    r"class|style|tabindex|role|aria-\w+|data-[\w-]+|type|name|value|checked|points|viewbox|[xy][12]?|text-anchor"
)


def assert_chips_show(chips, found, scored, theirs):
    """The chips are the drawn tokens, with what both models' `rescore` says of them."""
    mask = found.response_mask
    assert [int(chip["data-id"]) for chip in chips] == found.responses[mask].tolist()
    for name, numbers in (
        ("logprob", scored.logprobs),
        ("value", scored.values),
        ("entropy", scored.entropy),
        ("kl", scored.kl),
        ("other-logprob", theirs.logprobs),
        ("other-value", theirs.values),
        ("log-ratio", scored.logprobs - theirs.logprobs),
    ):
        read = [float(chip[f"data-{name}"]) for chip in chips]
        assert read == pytest.approx(numbers[mask].tolist(), abs=1e-6), name


def test_the_numbers_in_the_page_are_rescore_s(tiny_model, tiny_tokenizer, other):
    found = drawn(tiny_model, top_p=0.9, eos_token_id=(41, 42))
    page = Reader(view(records(tiny_model, tiny_tokenizer, found, other=other), names=("mine", "theirs")))
    with torch.no_grad():
        scored = rescore(tiny_model, found, with_entropy=True, reference=other)
        theirs = rescore(other, found)
    assert_chips_show([chip for chip in page.chips if "data-logprob" in chip], found, scored, theirs)


def test_hostile_tokens_are_shown_as_text(tiny_model, hostile_tokenizer):
    ids = torch.tensor([*range(1, len(HOSTILE) + 1), 20])
    found = view(records(tiny_model, hostile_tokenizer, as_read([ids]), other=tiny_model), names=("<b>", "'\"><i>"))
    page = Reader(found)
    assert page.tags <= TAGS
    assert all(ATTRIBUTES.fullmatch(name) for name in page.attributes), page.attributes
    assert "\u202e" not in found
    assert "\u200f" not in found
    shown = ["".join(piece for piece, _ in visible(text)) for text in HOSTILE]
    assert page.texts[: len(HOSTILE)] == shown
    assert page.texts[3] == "x" * 10_000
    assert shown[5] == "\\x00\\x1b[2J"


def test_a_page_by_itself_loads_and_runs_nothing(tiny_model, hostile_tokenizer):
    ids = torch.tensor([*range(1, len(HOSTILE) + 1), 20])
    found = records(tiny_model, hostile_tokenizer, as_read([ids]))
    page = document(found, title="<title>", facts="</p><script>", names=("m", None))
    read = Reader(page.removeprefix("<!DOCTYPE html>"))
    assert read.tags <= TAGS | {"html", "head", "meta", "title", "style", "body", "h1", "p"}
    assert "default-src 'none'; style-src 'unsafe-inline'" in page
    assert not re.search(r"(src|href)\s*=\s*[\"'](?!x onerror)", re.sub("&[a-z#0-9]+;", "", page))
    assert "url(" not in re.sub("&#x27;;--value:url", "", page)
    assert "@media (prefers-color-scheme: dark)" in page


def test_every_chip_can_be_reached_by_keyboard_and_has_its_card(tiny_model, tiny_tokenizer):
    found = view(records(tiny_model, tiny_tokenizer, drawn(tiny_model)), names=("m", None))
    page = Reader(found)
    assert len(page.chips) == 6 + 3 * 20
    assert all(chip["tabindex"] == "0" for chip in page.chips)
    assert found.count('role="tooltip"') == len(page.chips)


def test_a_view_offers_only_colourings_that_have_something_to_show(tiny_model, tiny_tokenizer, other):
    found = drawn(tiny_model)
    alone = view(records(tiny_model, tiny_tokenizer, found))
    both = view(records(tiny_model, tiny_tokenizer, found, other=other), names=("a", "b"))
    plain = view(records(plain_twin(tiny_model), tiny_tokenizer, found))
    offered = [re.findall(r'type="radio"[^>]*value="(\w+)"', page) for page in (alone, both, plain)]
    assert offered == [
        ["value", "logprob", "entropy"],
        ["value", "logprob", "entropy", "ratio"],
        ["logprob", "entropy"],
    ]
    assert [page.count("<polyline class=") for page in (alone, both, plain)] == [6, 12, 0]  # each line, and its key


def test_an_exported_response_is_json_with_all_numbers(tiny_model, tiny_tokenizer, other):
    (response, *_) = records(tiny_model, tiny_tokenizer, drawn(tiny_model), other=other)
    read = json.loads(json.dumps(as_json(response), allow_nan=False))
    assert [token["log_ratio"] for token in read["tokens"]] == [token.log_ratio for token in response.tokens]
    assert read["tokens"][0]["likeliest"][0]["probability"] == response.tokens[0].likeliest[0].probability
    infinite = dataclasses.replace(response, tokens=(dataclasses.replace(response.tokens[0], logprob=-math.inf),))
    assert json.loads(json.dumps(as_json(infinite), allow_nan=False))["tokens"][0]["logprob"] is None


# Colours

SCALES = [palettes.by_value(2.0), palettes.by_logprob(), palettes.by_entropy(5.0), palettes.by_log_ratio(1.0)]
# Machado, Oliveira and Fernandes, "A Physiologically-based Model for Simulation of Color Vision Deficiency", 2009:
# severity 1, on linear RGB.
DEFICIENCIES = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def linear(colour):
    parts = torch.tensor([int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)])
    return torch.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


@pytest.mark.parametrize("scale", SCALES)
def test_text_can_be_read_on_every_colour_of_a_page(scale):
    weights = torch.tensor([0.2126, 0.7152, 0.0722])
    for number in torch.linspace(scale.low - 1, scale.high + 1, 200).tolist():
        ground = scale.colour(number)
        dark, light = sorted(float(linear(colour) @ weights) for colour in (palettes.ink_on(ground), ground))
        assert (light + 0.05) / (dark + 0.05) > 4, (number, ground)  # WCAG 2 asks 4.5 of small text, 3 of large


@pytest.mark.parametrize("deficiency", DEFICIENCIES)
@pytest.mark.parametrize("scale", SCALES)
def test_low_middle_and_high_look_different_to_the_colour_blind(scale, deficiency):
    matrix = torch.tensor(DEFICIENCIES[deficiency])
    middle = (scale.low + scale.high) / 2
    seen = [(matrix @ linear(scale.colour(n))).clamp(0, 1) ** (1 / 2.2) for n in (scale.low, middle, scale.high)]
    for first, second in ((0, 1), (1, 2), (0, 2)):
        assert (seen[first] - seen[second]).norm() > 0.25


def test_limits_are_round_and_hold_every_number():
    assert palettes.limit_of([]) == palettes.limit_of([0.0]) == 1.0
    for number in (0.001, 0.13, 0.2, 0.51, 1.0, 3.0, -7.3, 1234.5):
        limit = palettes.limit_of([number, 0.0, math.inf])
        assert abs(number) <= limit <= 1.5 * abs(number)
        assert float(f"{limit:.1e}") == limit


# The desk


def test_two_models_with_different_vocabularies_are_not_compared(tiny_model, tiny_tokenizer):
    small = Named("small", make_tiny_model(vocab_size=90), None)
    with pytest.raises(ValueError, match="small 90"):
        Desk(Named("tiny", tiny_model, tiny_tokenizer), small)


def test_a_draw_that_is_stopped_ends_with_all_about_what_was_drawn(tiny_model, tiny_tokenizer):
    desk = Desk(Named("tiny", tiny_model, tiny_tokenizer))
    shown = []
    for found in desk.sample(["Hi"], max_new_tokens=50, seed=3, is_stopped=lambda: len(shown) == 5):
        shown.append(found)
    assert [found.done for found in shown] == [False] * 5 + [True]
    assert shown[-1].drawn == 5
    assert shown[-1].responses[0].tokens[0].likeliest


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([], {}, "no text"),
        ([""], {}, "no tokens"),
        (["a" * 65], {}, "65 tokens.*64"),
        (["a"] * 17, {}, "1 to 16"),
        (["a"], {"responses": 0}, "1 to 16"),
        (["a"], {"temperature": 0.0}, "temperature=0.0"),
        (["a"], {"top_p": 2.0}, "top_p"),
        (["a"], {"seed": -1}, "seed"),
        (["a"], {"max_new_tokens": 64}, "positions end at 64"),
    ],
)
def test_the_desk_says_what_is_wrong_with_a_prompt_or_a_setting(tiny_model, tiny_tokenizer, prompts, settings, message):
    desk = Desk(Named("tiny", tiny_model, tiny_tokenizer))
    with pytest.raises(ValueError, match=message):
        list(desk.sample(prompts, **settings))


# The command


def test_respond_writes_a_page_with_the_numbers_that_it_shows(gpt2_value, tiny_model, tiny_tokenizer, tmp_path):
    save_package(tiny_model, tmp_path / "package", tiny_tokenizer)
    file = tmp_path / "page.html"
    command = ("respond", tmp_path / "package", "Hello", "abc", "--seed", 1, "--max-new-tokens", 6, "--json")
    status, out, _ = gpt2_value(*command, "--html", file)
    assert status == 0
    told = [token for response in json.loads(out)["responses"] for token in response["tokens"]]
    chips = [chip for chip in Reader(file.read_text().removeprefix("<!DOCTYPE html>")).chips if "data-rank" in chip]
    assert [int(chip["data-id"]) for chip in chips] == [token["id"] for token in told]
    for chip, token in zip(chips, told, strict=True):
        assert float(chip["data-logprob"]) == pytest.approx(token["logprob"], abs=1e-5)
        assert float(chip["data-value"]) == pytest.approx(token["value"], abs=1e-5)
    status, _, err = gpt2_value(*command, "--html", tmp_path / "nowhere" / "page.html")
    assert status == 2
    assert "no folder" in err
