"""The running app and the static page in a headless Chromium: `make app-test`.

Needs Debian's chromium and chromium-driver. Screenshots go to runs/app, to be looked at.
"""

import re
import socket
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_model
from support.browser import TAB, Browser
from test_app import named, reached, tokenizer_of
from test_app_page import HOSTILE
from test_verify import record_again

from generation_gpt2_value import rollout
from hub_tools.app.page import stream
from hub_tools.app.page.app import build, launch
from hub_tools.app.page.desk import Desk, Named
from hub_tools.app.page.document import document
from hub_tools.app.page.records import as_read, records
from hub_tools.app.page.token_text import visible
from hub_tools.app.review import Source
from hub_tools.app.serve import open_app
from hub_tools.package.writing.save import save_package

SHOTS = Path(__file__).parent.parent.parent / "runs" / "app"
DONE = "#responses .gv-chip[data-rank]"
LETTERS = [chr(code) for code in range(ord("!"), ord("~") + 1)]


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = tokenizer_of({"<|endoftext|>": 0, **{letter: place for place, letter in enumerate(LETTERS, 1)}})
    tokenizer.add_tokens(HOSTILE)
    return tokenizer


@pytest.fixture(scope="module")
def models(tokenizer):
    return [make_tiny_model(seed, vocab_size=len(tokenizer)) for seed in (0, 1)]


@pytest.fixture(scope="module")
def url(models, tokenizer):
    page = build(Desk(Named("mine", models[0], tokenizer), Named("theirs", models[1], tokenizer)))
    launch(page, server_name="127.0.0.1", prevent_thread_lock=True)
    yield page.local_url
    page.close(verbose=False)


@pytest.fixture
def browser(url):
    with Browser() as browser:
        browser.open(url)
        browser.find("#draw")
        yield browser
        complaints = [said for said in browser.complaints() if "127.0.0.1" in said.split(" ")[0]]
        assert [said for said in complaints if "favicon" not in said and "manifest" not in said] == []


def draw(browser, *, prompts="Hello\nabc", longest=12, seed=7):
    browser.fill("Prompts, one a line", prompts)
    browser.fill("Tokens at most", str(longest))
    browser.fill("Seed, for the same draw again", str(seed))
    browser.click("#draw")
    browser.wait(lambda: browser.count(DONE))


def shown_cards(browser):
    return browser.run(
        "return [...document.querySelectorAll('.gv-card')].filter(e => getComputedStyle(e).display !== 'none').length"
    )


def test_a_draw_shows_rescore_s_numbers_and_all_about_a_token_on_hover(browser, models, tokenizer):
    draw(browser)
    found = rollout(
        models[0],
        [torch.tensor(tokenizer(text)["input_ids"]) for text in ("Hello", "abc")],
        max_new_tokens=12,
        eos_token_id=0,
        generator=torch.Generator().manual_seed(7),
    )
    for name, numbers in (("logprob", found.logprobs), ("value", found.values)):
        read = browser.run(f"return [...document.querySelectorAll('{DONE}')].map(e => +e.dataset.{name})")
        assert read == pytest.approx(numbers[found.response_mask].tolist(), abs=1e-5)
    assert shown_cards(browser) == 0
    browser.point_at(DONE)
    assert shown_cards(browser) == 1
    card = browser.text(f"{DONE}:hover .gv-card")
    for fact in ("id", "log-probability", "value before", "value after", "rank", "entropy", "kept set", "likeliest"):
        assert fact in card
    assert card.count("%") >= 5
    box = browser.run(
        "const b = document.querySelector(arguments[0]).getBoundingClientRect();"
        "return [b.left, b.right, b.top, b.bottom]",
        f"{DONE}:hover .gv-card",
    )
    assert 0 <= box[0] < box[1] <= 1280
    assert 0 <= box[2] < box[3] <= 900
    browser.screenshot(SHOTS / "light.png")


def test_tokens_are_reached_by_keyboard(browser):
    draw(browser)
    browser.run("document.querySelector('#responses .gv-numbers').focus()")
    browser.press(TAB)
    assert browser.run("return document.activeElement === document.querySelector('#responses .gv-chip')")
    assert shown_cards(browser) == 1
    browser.press(TAB * 6)
    assert browser.run("return document.activeElement.matches(arguments[0])", DONE)
    assert shown_cards(browser) == 1
    assert browser.run("return getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_colours_change_without_the_server_and_numbers_can_be_shown(browser):
    draw(browser)
    colour = "return getComputedStyle(document.querySelector(arguments[0])).backgroundColor"
    number = "return getComputedStyle(document.querySelector(arguments[0]), '::after').content"
    colours, numbers = set(), set()
    browser.click("#responses .gv-numbers")
    for name in ("value", "logprob", "entropy", "ratio"):
        browser.click(f"#responses .gv-by-{name}")
        colours.add(browser.run(colour, DONE))
        numbers.add(browser.run(number, DONE))
        assert browser.count(".gv-legend") == 4
        assert browser.run("return document.querySelector(arguments[0]).offsetHeight", f"#responses .gv-for-{name}") > 0
    assert len(colours) == len(numbers) == 4
    assert all(re.fullmatch(r'"[+-]?\d+\.\d\d"', shown) for shown in numbers)


def test_text_has_contrast_on_every_chip(browser):
    draw(browser, longest=50)
    script = """const parse = c => c.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
        .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
      const light = c => { const [r, g, b] = parse(c); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
      return Math.min(...[...document.querySelectorAll('#responses .gv-chip')].map(chip => {
        const [a, b] = [light(getComputedStyle(chip).backgroundColor),
                        light(getComputedStyle(chip.querySelector('.gv-text')).color)].sort((x, y) => x - y);
        return (b + 0.05) / (a + 0.05); }))"""
    for name in ("value", "logprob", "entropy", "ratio"):
        browser.click(f"#responses .gv-by-{name}")
        assert browser.run(script) > 4


def test_tokens_appear_one_by_one_and_a_button_stops_them(browser, monkeypatch):
    def slow(*arguments, **settings):
        time.sleep(0.3)
        return rollout(*arguments, **settings)

    monkeypatch.setattr(stream, "rollout", slow)
    browser.fill("Prompts, one a line", "a")
    browser.fill("Tokens at least", "55")
    browser.fill("Tokens at most", "60")
    browser.click("#draw")
    lengths = []
    for _ in range(3):
        lengths.append(
            browser.wait(lambda: (n := browser.count("#responses .gv-chip[data-logprob]")) > len(lengths) and n)
        )
    assert browser.count(DONE) == 0
    browser.click("#stop")
    browser.wait(lambda: browser.count(DONE))
    assert lengths[-1] <= browser.count(DONE) < 55


def test_two_sessions_do_not_disturb_each_other(browser, url):
    with Browser() as second:
        second.open(url)
        second.find("#draw")
        draw(browser, seed=1)
        draw(second, seed=2, longest=20)
        mine, theirs = (one.run("return document.querySelector('#responses').innerText") for one in (browser, second))
        assert "seed=1" in mine
        assert "seed=2" in theirs
        for one, tokens in ((browser, 12), (second, 20)):
            one.click_text("button[role=tab]", "Compare")
            cells = one.wait(lambda one=one: one.text("#table [role=grid]"))
            assert str(tokens) in cells.split()


def test_wrong_input_is_an_error_in_the_page(browser):
    browser.fill("Prompts, one a line", "<img src=x onerror=document.title='run'>" * 3)
    browser.click("#draw")
    browser.wait(lambda: "positions" in browser.text("#responses [role=alert]"))
    assert browser.run("return document.title") == "gpt2-value: mine"
    draw(browser)  # the page lives


def test_compare_sorts_and_exports(browser):
    draw(browser)
    browser.click_text("button[role=tab]", "Compare")
    browser.wait(lambda: browser.run("return document.querySelector('#table [role=grid]')?.ariaRowCount") == "3")
    browser.screenshot(SHOTS / "compare.png")
    cells = "return [...document.querySelectorAll('#table [role=gridcell]')].map(e => e.innerText.trim())"
    menu = "return [...document.querySelectorAll('#table [data-testid=header-2] .cell-menu-button')].at(-1).click()"
    for way, sign in (("Sort ascending", 1), ("Sort descending", -1)):
        browser.run(menu)
        browser.click_text("[role=menuitem]", way)
        browser.wait(lambda way=way: browser.count("[role=menuitem]") == 0)
        shown = browser.run(cells)
        logprobs = [sign * float(shown[place]) for place in range(2, len(shown), 13)]
        assert len(logprobs) == 2
        assert logprobs == sorted(logprobs)
    browser.click("#export-json")
    browser.wait(
        lambda: "responses.json" in browser.run("return document.querySelector('#file').innerText.replace(/\\n/g, '')")
    )
    browser.click("#export-png")
    browser.wait(
        lambda: "responses.png" in browser.run("return document.querySelector('#file').innerText.replace(/\\n/g, '')")
    )


def test_an_audit_shows_its_verdict_and_histogram(browser):
    browser.click_text("button[role=tab]", "Audit")
    browser.fill("Tokens to draw", "600")
    browser.click("#audit")
    browser.wait(lambda: "honest" in browser.text("#audited"))
    width = browser.wait(lambda: browser.run("return document.querySelector('.gv-histogram')?.naturalWidth"))
    assert width > 300
    browser.screenshot(SHOTS / "audit.png")


@pytest.fixture
def hostile_page(models, tokenizer, tmp_path):
    ids = torch.tensor([5, *(tokenizer.convert_tokens_to_ids(text) for text in HOSTILE), 6])
    found = records(models[0], tokenizer, as_read([ids]), other=models[1])
    (tmp_path / "page.html").write_text(document(found, title="Hostile tokens", facts="", names=("mine", "theirs")))
    return (tmp_path / "page.html").as_uri()


def test_hostile_tokens_are_text_in_the_app(browser):
    browser.click_text("button[role=tab]", "Your texts")
    text = "".join(HOSTILE[:3]) + HOSTILE[6] + HOSTILE[9] + HOSTILE[10]
    browser.fill("A text", text.replace("\u202e", "").replace("\u200f", ""))
    browser.click("#read")
    browser.wait(lambda: browser.count("#texts .gv-chip[data-rank]"))
    assert browser.run("return document.title") == "gpt2-value: mine"
    assert browser.count("#texts script, #texts img") == 0
    assert HOSTILE[0] in browser.run(
        "return [...document.querySelectorAll('#texts .gv-chip > .gv-text')].map(e => e.innerText)"
    )


@pytest.mark.parametrize(
    ("name", "width", "dark"), [("page", 1280, False), ("page-dark", 1280, True), ("page-phone", 390, False)]
)
def test_the_static_page_opens_from_disk_and_shows_hostile_tokens_as_text(hostile_page, name, width, dark):
    with Browser(width=width, dark=dark) as browser:
        browser.open(hostile_page)
        assert browser.run("return document.title") == "Hostile tokens"
        texts = browser.run("return [...document.querySelectorAll('.gv-chip > .gv-text')].map(e => e.textContent)")
        assert texts[1:-1] == ["".join(piece for piece, _ in visible(text)) for text in HOSTILE]
        assert browser.run("return document.documentElement.scrollWidth") <= width  # 10,000 characters are wrapped
        browser.click(".gv-by-ratio")
        browser.press(TAB * 3)
        assert shown_cards(browser) == 1
        browser.screenshot(SHOTS / f"{name}.png")
        assert browser.complaints() == []


@pytest.mark.parametrize(
    ("name", "width", "dark"), [("dark", 1280, True), ("phone", 390, False), ("phone-dark", 390, True)]
)
def test_the_app_fits_in_the_dark_and_on_a_phone(url, name, width, dark):
    with Browser(width=width, height=844 if width < 600 else 900, dark=dark) as browser:
        browser.open(url)
        browser.find("#draw")
        draw(browser, longest=40)
        browser.run("document.querySelector(arguments[0]).focus()", DONE)
        assert shown_cards(browser) == 1
        assert browser.run("return document.documentElement.scrollWidth") <= width
        browser.screenshot(SHOTS / f"{name}.png")


def test_unread_code_is_read_in_the_browser_and_the_page_turns_into_the_app(models, tokenizer, tmp_path):
    save_package(models[0], tmp_path / "package", tokenizer)
    with open(tmp_path / "package" / "configuration_gpt2_value.py", "a") as file:
        file.write("# <script>document.title = 'run'</script>\n")
    record_again(tmp_path / "package")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    opened = []
    where = {"port": port, "in_browser": False, "say": lambda text: None}
    sources = [Source(str(tmp_path / "package"))]
    threading.Thread(target=lambda: opened.append(open_app(sources, named, **where)), daemon=True).start()
    reached(f"http://127.0.0.1:{port}")
    with Browser() as browser:
        browser.open(f"http://127.0.0.1:{port}")
        browser.find("#agree")
        assert browser.run("return document.title") == "gpt2-value: unread code"
        assert "+# <script>document.title = 'run'</script>" in browser.text(".gv-code")
        browser.screenshot(SHOTS / "review.png")
        browser.click("#read input")
        browser.click("#agree")
        browser.wait(lambda: browser.count("#draw"), seconds=60)
        draw(browser)
    opened[0].close(verbose=False)
