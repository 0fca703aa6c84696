"""The app as a browser sees it, through Gradio's client; code that nobody has read; two visitors at once."""

import json
import socket
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_model, write_published_checkpoint
from PIL import Image
from test_app_page import Reader, assert_chips_show
from test_verify import record_again

from generation_gpt2_value import rescore, rollout
from hub_tools import layout
from hub_tools.app.page.desk import Desk, Named
from hub_tools.app.review import Source, review_page, unread_code
from hub_tools.app.serve import open_app
from hub_tools.errors import SourceError
from hub_tools.package.writing.save import save_package

pytest.importorskip("gradio", reason="the oldest versions are tested without the app")
import httpx
from gradio_client import Client, handle_file

from hub_tools.app.page.app import build, launch
from hub_tools.app.page.handlers import GENERATE, ROLLOUT

PROMPT = "Hello\nabc"
SAMPLE = (PROMPT, 2, 12, 0, 0.9, 5, 1.0, 7)  # prompts, responses, longest, shortest, temperature, top-k, top-p, seed
HERE = {"server_name": "127.0.0.1", "prevent_thread_lock": True}


def tokenizer_of(vocabulary):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


@pytest.fixture(scope="module")
def models():
    return make_tiny_model(), make_tiny_model(seed=1)


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:95]
    return tokenizer_of({"<|endoftext|>": 0, **{letter: place for place, letter in enumerate(letters, 1)}})


@pytest.fixture(scope="module")
def url(models, tokenizer):
    """The app for two models, running."""
    desk = Desk(Named("mine", models[0], tokenizer), Named("<b>theirs</b>", models[1], tokenizer))
    page = build(desk)
    launch(page, **HERE)
    yield page.local_url
    page.close(verbose=False)


@pytest.fixture
def visitor(url):
    return Client(url, verbose=False)


def read(shown):
    return Reader(shown)


def test_what_is_drawn_in_the_page_is_a_rollout_with_rescore_s_numbers(visitor, models, tokenizer):
    chips = [chip for chip in read(visitor.predict(*SAMPLE, api_name="/sample")).chips if "data-rank" in chip]
    queries = [torch.tensor(tokenizer(text)["input_ids"]) for text in PROMPT.splitlines()]
    found = rollout(
        models[0],
        queries,
        num_return_sequences=2,
        max_new_tokens=12,
        temperature=0.9,
        top_k=5,
        eos_token_id=0,
        generator=torch.Generator().manual_seed(7),
    )
    with torch.no_grad():
        scored = rescore(models[0], found, with_entropy=True, reference=models[1])
        theirs = rescore(models[1], found)
    assert_chips_show(chips, found, scored, theirs)


def test_tokens_appear_while_they_are_drawn(visitor):
    job = visitor.submit("a", 1, 60, 0, 1.0, 0, 1.0, 1, api_name="/sample")
    job.result(timeout=60)
    lengths = [len(read(shown).chips) for shown in job.outputs()]
    assert len(lengths) > 2
    assert lengths == sorted(lengths)


def test_a_draw_can_be_stopped_and_shows_all_about_what_it_has(visitor, models, monkeypatch):
    from hub_tools.app.page import stream

    def slow(*arguments, **settings):
        time.sleep(0.15)
        return rollout(*arguments, **settings)

    monkeypatch.setattr(stream, "rollout", slow)
    job = visitor.submit("a", 1, 63, 60, 1.0, 0, 1.0, 1, api_name="/sample")
    while not job.outputs():
        time.sleep(0.05)
    visitor.predict(api_name="/stop")
    shown = read(job.result(timeout=60))
    drawn = [chip for chip in shown.chips if "data-rank" in chip]
    assert 0 < len(drawn) == len(shown.chips) - 1 < 60


def test_two_visitors_do_not_disturb_each_other(url, visitor):
    """Each gets what it would get alone, and one that stops does not stop the other."""
    alone = {
        seed: [
            chip["data-id"]
            for chip in read(visitor.predict("a", 2, 40, 0, 1.0, 0, 1.0, seed, api_name="/sample")).chips
        ]
        for seed in (1, 2)
    }
    visitors = {seed: Client(url, verbose=False) for seed in alone}
    jobs = {seed: one.submit("a", 2, 40, 0, 1.0, 0, 1.0, seed, api_name="/sample") for seed, one in visitors.items()}
    visitor.predict(api_name="/stop")  # a third
    for seed, job in jobs.items():
        assert [chip["data-id"] for chip in read(job.result(timeout=60)).chips] == alone[seed]
    for seed, one in visitors.items():  # each exports its own
        told = json.loads(Path(one.predict(api_name="/export_json")).read_text())
        assert told["settings"]["seed"] == seed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: ""}, "no text"),
        ({0: "a" * 100}, "100 tokens"),
        ({0: "<script>" * 20}, "text 1"),
        ({1: 9}, "1 to 16"),
        ({2: 63}, "positions end at 64"),
        ({3: 13}, "min_new_tokens=13"),
        ({4: 0.0}, "temperature=0.0"),
        ({4: None}, "temperature=None"),
        ({6: 1.5}, "top_p=1.5"),
    ],
)
def test_wrong_input_is_an_error_in_the_page_and_not_the_end_of_it(visitor, change, message):
    arguments = [change.get(place, value) for place, value in enumerate(SAMPLE)]
    shown = visitor.predict(*arguments, api_name="/sample")
    assert 'role="alert"' in shown
    assert message in shown
    assert "<script>" not in shown
    assert "data-rank" in visitor.predict(*SAMPLE, api_name="/sample")


def test_a_text_of_one_s_own_and_a_file_of_texts_are_read(visitor, models, tokenizer, tmp_path):
    (tmp_path / "texts.txt").write_text("Hi\n\nYou\n")
    shown = read(visitor.predict("Hello", handle_file(tmp_path / "texts.txt"), api_name="/read"))
    ids = [tokenizer(text)["input_ids"] for text in ("Hello", "Hi", "You")]
    assert [int(chip["data-id"]) for chip in shown.chips] == [id for text in ids for id in text]
    with torch.no_grad():
        logprobs = models[0](torch.tensor([ids[0]])).logits[0, :-1].log_softmax(-1)
    read_back = [float(chip["data-logprob"]) for chip in shown.chips[1:5]]
    assert read_back == pytest.approx(logprobs.gather(-1, torch.tensor(ids[0])[1:, None])[:, 0].tolist(), abs=1e-5)


def test_a_file_that_is_no_text_is_an_error_in_the_page(visitor, tmp_path):
    (tmp_path / "texts.txt").write_bytes(b"\xff\xfe\x00")
    assert 'role="alert"' in visitor.predict("", handle_file(tmp_path / "texts.txt"), api_name="/read")


def test_the_table_and_the_files_hold_what_was_drawn(visitor):
    page = read(visitor.predict(*SAMPLE, api_name="/sample"))
    rows, says = visitor.predict(api_name="/compare")
    assert "&lt;b&gt;theirs" in says
    column = {name: place for place, name in enumerate(rows["headers"])}
    drawn = [chip for chip in page.chips if "data-rank" in chip]
    assert sum(row[column["tokens"]] for row in rows["data"]) == len(drawn)
    for name, attribute in (("log-prob.", "logprob"), ("KL, this draw", "log-ratio"), ("KL, exact", "kl")):
        total = sum(float(chip[f"data-{attribute}"]) for chip in drawn)
        assert sum(row[column[name]] for row in rows["data"]) == pytest.approx(total, abs=1e-3)
    told = json.loads(Path(visitor.predict(api_name="/export_json")).read_text())
    assert [token["id"] for response in told["responses"] for token in response["tokens"]] == [
        int(chip["data-id"]) for chip in drawn
    ]
    with Image.open(visitor.predict(api_name="/export_picture")) as image:
        assert image.format == "PNG"


AUDIT = ("", 2000, ROLLOUT, "", 1.0, 0, 1.0, 0, False, 1)


def test_an_audit_says_in_words_whether_the_sampler_is_honest(visitor):
    job = visitor.submit(*AUDIT, api_name="/audit")
    shown = job.result(timeout=60)
    assert "<b>honest</b>" in shown
    assert "data:image/png;base64," in shown
    assert any("of 2,000 tokens drawn" in told for told in job.outputs()[:-1])
    asked = [
        GENERATE if value == ROLLOUT else "max_new_tokens=20" if place == 3 else value
        for place, value in enumerate(AUDIT)
    ]
    assert "<b>dishonest</b>" in visitor.predict(*asked, api_name="/audit")  # the hidden top_k=50


def test_an_audit_leaves_torch_s_global_generator_alone(visitor):
    state = torch.get_rng_state()
    visitor.predict("a", 60, GENERATE, "top_k=0", 1.0, 0, 1.0, 0, False, 1, api_name="/audit")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("options", "message"), [("top_k", "KEY=VALUE"), ("top_k=None", "null"), ("no_such_thing=1", "no_such_thing")]
)
def test_wrong_options_of_generate_are_an_error_in_the_page(visitor, options, message):
    shown = visitor.predict("a", 60, GENERATE, options, 1.0, 0, 1.0, 0, False, 1, api_name="/audit")
    assert 'role="alert"' in shown
    assert message in shown


def test_the_page_asks_for_nothing_outside_this_machine(url):
    page = httpx.get(url).text
    assert "fonts.googleapis" not in page
    assert '"share_url": "http' not in page
    assert '"analytics_enabled":false' in page.replace(" ", "")


# Opening


@pytest.fixture
def package(tmp_path, models, tokenizer):
    save_package(models[0], tmp_path / "package", tokenizer)
    return tmp_path / "package"


def named(source, reviewed):
    from hub_tools.cli.pages import _load

    return _load(source, reviewed)


def test_known_code_needs_no_review(package):
    assert unread_code(Source(str(package))) is None


def test_unread_code_is_shown_and_not_run_until_somebody_agrees(package, tmp_path):
    name = "configuration_gpt2_value.py"
    with open(package / name, "a") as file:
        file.write(f"open({str(tmp_path / 'ran')!r}, 'w')  # </pre><script>\n")
    record_again(package)
    digest = layout.sha256_of(package / name)
    unread = unread_code(Source(str(package)))
    assert unread.sha256 == {name: digest}
    shown = review_page([unread])
    assert digest in shown
    assert f"+open(&#x27;{tmp_path / 'ran'}&#x27;, &#x27;w&#x27;)  # &lt;/pre&gt;&lt;script&gt;" in shown

    said, opened = [], []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = {"in_browser": False, "say": said.append, "port": port}
    opening = {"target": lambda: opened.append(open_app([Source(str(package))], named, **where))}
    opener = threading.Thread(**opening, daemon=True)
    opener.start()
    try:
        review = reached(f"http://127.0.0.1:{port}")
        assert 'role="alert"' in review.predict(False, api_name="/agree")
        assert not (tmp_path / "ran").exists()
        assert "loading" in review.predict(True, api_name="/agree")
    finally:
        opener.join(timeout=20)
    assert (tmp_path / "ran").exists()
    (page,) = opened
    assert page.server_port == port  # the page of the review turns into the app
    assert "data-rank" in Client(page.local_url, verbose=False).predict(*SAMPLE, api_name="/sample")
    page.close(verbose=False)


def reached(url):
    """A client of the server at this address, once it is up."""
    for _ in range(300):
        try:
            return Client(url, verbose=False)
        except (httpx.HTTPError, ValueError):
            time.sleep(0.1)
    raise AssertionError(f"no server at {url}")


def test_a_package_is_compared_with_a_plain_gpt2(package, models, tmp_path):
    write_published_checkpoint(tmp_path / "plain", seed=1)
    sources = [Source(str(package)), Source(str(tmp_path / "plain"))]
    page = open_app(sources, named, in_browser=False, say=lambda text: None)
    try:
        shown = read(Client(page.local_url, verbose=False).predict(*SAMPLE, api_name="/sample"))
    finally:
        page.close(verbose=False)
    drawn = [chip for chip in shown.chips if "data-rank" in chip]
    assert any(abs(float(chip["data-kl"])) > 0.1 for chip in drawn)
    assert {chip["data-other-value"] for chip in drawn} == {"0.0"}
    assert named(sources[1], {}).about == "its value head is new, so every value is 0"


def test_models_that_cannot_be_compared_are_refused_before_the_page_opens(package, tokenizer, tmp_path):
    save_package(make_tiny_model(vocab_size=99), tmp_path / "wide")
    with pytest.raises(SourceError, match="vocabularies differ"):
        open_app([Source(str(package)), Source(str(tmp_path / "wide"))], named, in_browser=False, say=print)
    with pytest.raises(SourceError, match="no tokenizer"):
        open_app([Source(str(tmp_path / "wide"))], named, in_browser=False, say=print)


def test_the_command_refuses_what_cannot_be_opened(gpt2_value, package, tmp_path, monkeypatch):
    status, _, err = gpt2_value("app", tmp_path / "nowhere")
    assert status == 1
    assert "nowhere" in err
    assert gpt2_value("app", package, "--compare-revision", "main")[0] == 2
    assert gpt2_value("app", package, "--revision", "main")[0] == 2
    monkeypatch.setitem(sys.modules, "gradio", None)
    status, _, err = gpt2_value("app", package)
    assert status == 1
    assert "pip install 'gpt2-value[app]'" in err
