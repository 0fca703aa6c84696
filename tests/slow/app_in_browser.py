"""The running app and a saved page in a headless Chromium: `make app-test`. Screenshots are left in runs/app."""

import http.server
import threading
from pathlib import Path

import pytest
from selenium.webdriver import ActionChains, Keys
from support.browser import chromium, fill, find, wait
from test_app import running

SHOTS = Path(__file__).parent.parent.parent / "runs" / "app"
SIZES = {"wide": (1400, 1000), "phone": (390, 844), "dark": (1400, 1000, True)}
DONE = "document.querySelector('#responses .gv-likeliest .gv-bar')"  # there after the last stage


@pytest.fixture(scope="module")
def address():
    SHOTS.mkdir(parents=True, exist_ok=True)
    with running() as (port, path, _):
        yield f"http://127.0.0.1:{port}{path}/"


@pytest.mark.parametrize("size", SIZES)
def test_an_example_is_drawn_when_the_page_opens(address, size):
    with chromium(*SIZES[size]) as browser:
        browser.get(address)
        wait(browser, DONE)
        browser.save_screenshot(SHOTS / f"{size}.png")
        button = browser.execute_script("return document.querySelector('#draw').getBoundingClientRect().bottom")
        assert button < SIZES[size][1]  # above the fold
        assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
        chip, card = (find(browser, f"#responses .gv-chip:nth-child(9){end}") for end in ("", " > :last-child"))
        assert card.value_of_css_property("display") == "none"
        ActionChains(browser).move_to_element(chip).perform()
        assert card.value_of_css_property("display") == "block"
        browser.save_screenshot(SHOTS / f"{size}-card.png")
        browser.execute_script("document.querySelector('#responses .gv-chip').focus()")
        ActionChains(browser).send_keys(Keys.TAB).perform()
        assert browser.switch_to.active_element.get_attribute("class").startswith("gv-chip")
        by_value = chip.value_of_css_property("background-color")
        find(browser, "#responses .gv-by-logprob").click()
        assert chip.value_of_css_property("background-color") != by_value
        loaded = browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
        assert all(name.startswith(address.rsplit("/", 2)[0]) for name in loaded)


def test_what_is_typed_is_only_shown(address):
    with chromium(*SIZES["wide"]) as browser:
        browser.get(address)
        wait(browser, DONE)
        find(browser, "button[role=tab]:nth-of-type(2)").click()
        fill(browser, "Texts, one a line", "${document.title='run'}<img src=x onerror=alert(1)>")
        find(browser, "#read").click()
        wait(browser, "document.querySelectorAll('#texts .gv-chip').length > 20")
        assert browser.execute_script("return document.querySelectorAll('#texts img').length") == 0
        assert browser.title != "run"


STRANGER = """<!doctype html><title>quiet</title><iframe src="%(app)s"></iframe><script>
const tried = [], json = {"Content-Type": "application/json"};
const say = (what, asked) => tried.push(asked.then(r => what + ":" + (r.status || r.type), e => what + ":no"));
for (const base of ["%(app)s", "%(root)s"]) {
  say("read", fetch(base + "config"));
  say("join", fetch(base + "gradio_api/queue/join", {method: "POST", body: "{}", headers: json}));
  say("blind", fetch(base + "gradio_api/queue/join", {method: "POST", mode: "no-cors", body: "{}"}));
}
const socket = new WebSocket("%(root)s".replace("http", "ws") + "gradio_api/queue/join");
tried.push(new Promise(done => {
  socket.onopen = () => done("socket:open");
  socket.onerror = () => done("socket:no");
}));
Promise.all(tried).then(all => { document.title = "done"; window.found = all; });
</script>"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.mark.parametrize("host", ["127.0.0.1", "rebound.example"])
def test_a_page_of_a_stranger_gets_nothing(address, host, tmp_path, monkeypatch):
    """From another port, and under a name that now leads to this machine; even where it has learnt the secret."""
    address = address.replace("127.0.0.1", host)
    (tmp_path / "index.html").write_text(STRANGER % {"app": address, "root": address.rsplit("/", 2)[0] + "/"})
    monkeypatch.chdir(tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server, chromium(*SIZES["wide"]) as browser:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser.get(f"http://{host}:{server.server_port}/")
        wait(browser, "document.title === 'done'")
        found = browser.execute_script("return window.found")
        assert len(found) == 7
        assert {what.split(":")[1] for what in found} <= {"no", "403", "opaque"}, found
        browser.save_screenshot(SHOTS / f"stranger-{host}.png")
        inside = "try { return frames[0].document.title } catch (e) { return '' }"
        assert browser.execute_script(inside) == ""
        if host != "127.0.0.1":
            browser.get(address)
            assert "This is not your page." in find(browser, "body").text
        server.shutdown()
