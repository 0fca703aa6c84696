"""The app against everybody but its owner: other programs and users, and pages of strangers. It runs in another
process; the page in a browser is in tests/slow/app_in_browser.py."""

import contextlib
import http.client
import json
import multiprocessing
import os
import re
import stat
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_model, tiny_tokenizer
from support.settings import seeded

from hub_tools import app
from hub_tools.errors import MissingLibraryError, SourceError

OWN_HOST = "Host: 127.0.0.1:PORT"
ROUTES = {
    "GET": [
        "", "/", "/config", "/theme.css", "/assets/x.js", "/gradio_api/queue/data?session_hash=abc", "/gradio_api/info",
        "/gradio_api/heartbeat/abc", "/gradio_api/startup-events", "/gradio_api/file=/etc/passwd", "/file=/etc/passwd",
        "/gradio_api/stream/abc/0/0/playlist.m3u8", "/gradio_api/proxy=https://example.org", "/gradio_api/queue/status",
        "/gradio_api/deep_link", "/monitoring", "/login", "/logout", "/docs", "/openapi.json", "/gradio_api/mcp/",
        "/gradio_api/call/sample/abc", "/gradio_api/app_id", "/static/../../../../etc/passwd", "/svelte/x",
    ],
    "POST": [
        "/gradio_api/queue/join", "/gradio_api/upload", "/gradio_api/run/sample", "/gradio_api/api/predict",
        "/gradio_api/call/sample", "/gradio_api/reset", "/gradio_api/cancel", "/gradio_api/component_server", "/login",
        "/gradio_api/process_recording", "/gradio_api/stream/abc", "/gradio_api/vibe-code", "/gradio_api/mcp/",
    ],
    "OPTIONS": ["/", "/gradio_api/queue/join"],
    "PUT": ["/gradio_api/queue/join"],
}  # fmt: skip
PAGES = ("", "config", "theme.css", "gradio_api/startup-events")
NEEDED = [("POST", "/gradio_api/queue/join"), *(("GET", f"/{end}") for end in PAGES)]
STREAMS = ("/assets/", "/gradio_api/queue/data", "/gradio_api/heartbeat/")


def serve(place, say):
    tokenizer = tiny_tokenizer._fixture_function()
    app.serve(place, make_tiny_model(), tokenizer, make_tiny_model(seed=1), say=say)


@contextlib.contextmanager
def running():
    """The app in a process of its own: its port, the path with the secret, and the process."""
    pytest.importorskip("gradio", reason="the oldest versions are tested without the app")
    fork = multiprocessing.get_context("fork")
    place, (hear, say) = app.listen(0), fork.Pipe()
    os.environ["BROWSER"] = "true"  # the program that does nothing
    process = fork.Process(target=serve, args=(place, say.send))
    process.start()
    place.close()
    try:
        assert hear.poll(60)
        port, path = re.fullmatch(r"http://127\.0\.0\.1:(\d+)(/[\w-]{32})/", hear.recv()).groups()
        yield int(port), path, process
    finally:
        process.terminate()
        process.join(20)


@pytest.fixture(scope="module")
def page():
    with running() as (port, path, _):
        yield port, path


def ask(port, path, method="GET", body=None, headers=(OWN_HOST,), *, read=True):
    """The answer to one request, with its `text`. A header is a line, in which PORT is the port."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.putrequest(method, path, skip_host=True)
    data = None if body is None else json.dumps(body).encode()
    lengths = [] if data is None else ["Content-Type: application/json", f"Content-Length: {len(data)}"]
    for header in (*headers, *lengths):
        connection.putheader(*header.replace("PORT", str(port)).split(": "))
    connection.endheaders(data)
    answer = connection.getresponse()
    answer.text = answer.read().decode(errors="replace") if read else ""
    connection.close()
    return answer


def call(page, function, data):
    """What the page shows after a click: each answer's HTML, as the browser gets it."""
    port, path = page
    config = json.loads(ask(port, f"{path}/config").text)
    index = next(one["id"] for one in config["dependencies"] if len(one["inputs"]) == (7 if function == "draw" else 1))
    body = {"data": data, "fn_index": index, "session_hash": "abc"}
    joined = ask(port, f"{path}/gradio_api/queue/join", "POST", body)
    if joined.status != 200:
        return [f"{joined.status}: {joined.text}"]
    stream = ask(port, f"{path}/gradio_api/queue/data?session_hash=abc").text
    events = [json.loads(line[5:]) for line in stream.splitlines() if line.startswith("data:")]
    return [str(event["output"].get("data") or event) for event in events if "output" in event]


def draw(page, prompt="ab", responses=1, longest=5, temperature=1.0, top_k=0, top_p=1.0, seed=1):
    return call(page, "draw", [prompt, responses, longest, temperature, top_k, top_p, seed])


def test_nobody_gets_in_without_the_secret(page):
    port, path = page
    wrong = [path[:-1], path[:-1] + "%C3%A9", path.swapcase(), f"/x{path}", "/" + "A" * 32, f"{path[:-2]}%00"]
    everywhere = [(method, route) for method, routes in ROUTES.items() for route in routes]
    for method, route in [*everywhere, *(("GET", start + end) for start in wrong for end in ("/", "/config"))]:
        answer = ask(port, route, method, {})
        assert (answer.status, answer.text) == (403, "This is not your page.\n"), (method, route)


def test_with_the_secret_there_is_no_more_than_the_page_needs(page):
    port, path = page
    for method, routes in ROUTES.items():
        for route in routes:
            needed = (method, route) in NEEDED or (method == "GET" and route.startswith(STREAMS))
            assert (ask(port, path + route, method, {}, read=False).status != 403) == needed, (method, route)


@pytest.mark.parametrize(
    "headers",
    [
        [],
        ["Host: evil.example"],
        ["Host: evil.example:PORT"],
        ["Host: 127.0.0.1"],
        ["Host: 127.0.0.1:PORT.evil.example"],
        [OWN_HOST, "Host: evil.example"],
        ["Host: evil.example", "X-Forwarded-Host: 127.0.0.1:PORT"],
        [OWN_HOST, "Origin: http://evil.example"],
        [OWN_HOST, "Origin: http://127.0.0.1:1"],
        [OWN_HOST, "Origin: null"],
        [OWN_HOST, "Sec-Fetch-Site: cross-site"],
        [OWN_HOST, "Sec-Fetch-Site: same-site"],
    ],
    ids=str,
)
def test_other_hosts_and_origins_are_refused_everywhere(page, headers):
    port, path = page
    for method, route in NEEDED:  # no body: where Host is wrong, the server may close before one arrives
        assert ask(port, path + route, method, headers=headers).status in (400, 403), route


def test_the_page_loads_nothing_from_elsewhere(page):
    port, path = page
    answer = ask(port, f"{path}/")
    assert answer.status == 200
    assert answer.headers["content-security-policy"].startswith("default-src 'self'")
    assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
    assert answer.headers["referrer-policy"] == "no-referrer"


def test_websockets_are_refused(page):
    port, path = page
    socket = ["Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Key: eA==", "Sec-WebSocket-Version: 13"]
    for route in ("/gradio_api/queue/join", "/queue/join", "/ws"):
        assert ask(port, path + route, headers=[OWN_HOST, *socket]).status in (403, 404, 405)
        assert ask(port, route, headers=[OWN_HOST, *socket]).status == 403


def test_tokens_appear_while_they_are_drawn(page):
    shown = draw(page, "ab\nHello", 2, 20)
    counts = [html.count("tabindex") for html in shown]
    assert counts[0] == 2 * (2 + 1) + 2 * (5 + 1)  # two responses to each prompt, of one token so far
    assert len(counts) > 5
    assert max(counts) > 2 * counts[0]
    assert "gv-by-ratio" in shown[-1]  # the second model has scored them
    chips = [draw(page, seed=3)[-1].split("</fieldset>")[1] for _ in range(2)]
    assert chips[0] == chips[1]
    assert "gv-given" in call(page, "read", ["Hello\nab"])[-1]


@pytest.mark.parametrize(
    "given",
    [
        {"prompt": "x" * 4_001},
        {"prompt": "a\n" * 9},
        {"prompt": "a" * 60},  # positions end at 64
        {"prompt": " \n "},
        {"prompt": {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}},
        {"responses": 10**9},
        {"longest": 10**9},
        {"temperature": 0},
        {"top_k": -1},
        {"top_p": 7},
        {"seed": 1 << 70},
        {"seed": "custom_generate=x trust_remote_code=true"},
    ],
    ids=lambda given: str(given)[:50],
)
def test_what_is_out_of_bounds_is_refused_before_it_costs_anything(page, given):
    (*_, last) = draw(page, **given)
    assert "gv-chip" not in last
    assert "root:" not in last


@pytest.mark.parametrize(
    "headers",
    [
        ["Content-Length: 20000000"],
        ["Content-Length: " + "9" * 30],
        ["Transfer-Encoding: chunked"],
        ["Content-Length: 5", "Transfer-Encoding: chunked"],
    ],
)
def test_a_body_that_is_too_large_is_not_read(page, headers):
    port, path = page
    assert ask(port, f"{path}/gradio_api/queue/join", "POST", headers=[OWN_HOST, *headers]).status in (400, 403)


def test_its_files_are_private_and_go_with_it():
    before = set(Path("/tmp").glob("gpt2-value-app-*"))
    with running() as (port, path, process):
        (folder,) = set(Path("/tmp").glob("gpt2-value-app-*")) - before
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert path in (folder / "open.html").read_text()
        assert ask(port, f"{path}/").status == 200
    assert not process.is_alive()
    assert not folder.exists()


def test_a_port_that_is_taken_is_said_before_anything_is_loaded(gpt2_value, package):
    pytest.importorskip("gradio")
    with app.listen(0) as taken:
        port = taken.getsockname()[1]
        status, _, err = gpt2_value("app", package, "--port", port)
        assert status == 2
        assert f"port {port} cannot be used" in err
        assert "--port" in err


def test_what_is_missing_or_does_not_fit_is_named(tiny_tokenizer, monkeypatch):
    model = make_tiny_model()
    for tokenizer, other, named in (
        (tiny_tokenizer, make_tiny_model(vocab_size=97), "96 and 97 tokens"),
        (None, None, "no tokenizer"),
    ):
        with pytest.raises(SourceError, match=named):
            app.serve(None, model, tokenizer, other, say=print)
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(MissingLibraryError, match="pip install gradio"):
        app.listen(0)


@pytest.mark.parametrize("settings", [{"top_k": 9, "temperature": 1.5}, {"top_p": 0.7, "eos_token_id": [*range(40)]}])
def test_a_draw_in_stages_is_one_draw(tiny_model, settings):
    """What the page relies on: with one seed, a longer draw begins with the tokens of a shorter one."""
    short, long = (
        tiny_model.rollout([[5, 6], [7]], max_new_tokens=T, generator=seeded(3), **settings).responses for T in (7, 40)
    )
    assert torch.equal(short, long[:, : short.shape[1]])
