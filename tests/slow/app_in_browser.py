"""The running app and a saved page in a headless Chromium: `make app-test`. Screenshots are left in runs/app.

Needs Debian's packages chromium and chromium-driver.
"""

import http.server
import threading
from pathlib import Path

import pytest
from support.browser import TAB, Browser
from test_app import running

SHOTS = Path(__file__).parent.parent.parent / "runs" / "app"
SIZES = {
    "wide": {"width": 1400, "height": 1000},
    "phone": {"width": 390, "height": 844},
    "dark": {"width": 1400, "height": 1000, "dark": True},
}


@pytest.fixture(scope="module")
def address():
    with running() as (port, path, _):
        yield f"http://127.0.0.1:{port}{path}/"


def is_done(browser):
    return browser.count("#responses .gv-likeliest .gv-bar")  # after the last stage


@pytest.mark.parametrize("size", SIZES)
def test_an_example_is_drawn_when_the_page_opens(address, size):
    with Browser(**SIZES[size]) as browser:
        browser.open(address)
        browser.wait(lambda: is_done(browser))
        browser.screenshot(SHOTS / f"{size}.png")
        button = browser.run("return document.querySelector('#draw').getBoundingClientRect().bottom")
        assert button < SIZES[size]["height"]  # above the fold
        assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
        shown = "return getComputedStyle(document.querySelector('#responses .gv-chip').lastChild).display"
        assert browser.run(shown) == "none"
        browser.point_at("#responses .gv-chip:nth-child(9)")
        card = "return getComputedStyle(document.querySelectorAll('#responses .gv-chip')[8].lastChild).display"
        assert browser.run(card) == "block"
        browser.screenshot(SHOTS / f"{size}-card.png")
        browser.run("document.querySelector('#responses .gv-chip').focus()")
        browser.press(TAB)
        assert browser.run("return document.activeElement.className").startswith("gv-chip")
        ground = "return getComputedStyle(document.querySelectorAll('#responses .gv-chip')[9]).backgroundColor"
        by_value = browser.run(ground)
        browser.click("#responses .gv-by-logprob")
        assert browser.run(ground) != by_value
        elsewhere = (
            "return performance.getEntriesByType('resource').filter(e => !e.name.startsWith(location.origin)).length"
        )
        assert browser.run(elsewhere) == 0


def test_what_is_typed_is_only_shown(address):
    with Browser(**SIZES["wide"]) as browser:
        browser.open(address)
        browser.wait(lambda: is_done(browser))
        text = "${document.title='run'}<img src=x onerror=alert(1)>"
        browser.run(
            "document.querySelectorAll('button[role=tab]').forEach(e => e.innerText == 'Your texts' && e.click())"
        )
        browser.fill("Texts, one a line", text)
        browser.click("#read")
        browser.wait(lambda: browser.count("#texts .gv-chip") > 20)
        assert browser.count("#texts img") == 0
        assert browser.run("return document.title") != "run"


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


@pytest.mark.parametrize("host", ["127.0.0.1", "rebound.example"])
def test_a_page_of_a_stranger_gets_nothing(address, host):
    """From another port, and under a name that now leads to this machine; even where it has learnt the secret."""
    root = address.rsplit("/", 2)[0] + "/"
    if host != "127.0.0.1":
        address, root = address.replace("127.0.0.1", host), root.replace("127.0.0.1", host)
    page = (STRANGER % {"app": address, "root": root}).encode()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server, Browser(**SIZES["wide"]) as browser:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser.open(f"http://{host}:{server.server_port}/")
        browser.wait(lambda: browser.run("return document.title") == "done")
        found = browser.run("return window.found")
        assert len(found) == 7
        for what in found:
            assert what.split(":")[1] in ("no", "403", "opaque"), found
        browser.screenshot(SHOTS / f"stranger-{host}.png")
        assert browser.run("try { return frames[0].document.title } catch (e) { return 'apart' }") in ("apart", "")
        if host != "127.0.0.1":
            browser.open(address)
            assert "This is not your page." in browser.text("body")
        server.shutdown()
