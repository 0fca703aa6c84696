"""The app against everybody but its owner: other programs and users, and pages of strangers. It runs in another
process; the page in a browser is in tests/slow/app_in_browser.py."""

import http.client
import json
import multiprocessing
import os
import re
import stat
import time
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_model, tiny_tokenizer

from hub_tools import app
from hub_tools.errors import MissingLibraryError, OptionsError, SourceError

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
NEEDED = {"/", "/config", "/theme.css", "/gradio_api/queue/join", "/gradio_api/startup-events"}
STREAMS = ("/assets/", "/gradio_api/queue/data", "/gradio_api/heartbeat/")


def serve(place, compare, say):
    tokenizer = tiny_tokenizer._fixture_function()
    app.serve(place, make_tiny_model(), tokenizer, make_tiny_model(seed=1) if compare else None, say=say)


@pytest.fixture(scope="module")
def page():
    """(port, path with the secret) of the app in a process of its own."""
    pytest.importorskip("gradio", reason="the oldest versions are tested without the app")
    with running() as (port, path, _):
        yield port, path


class running:
    def __enter__(self):
        fork = multiprocessing.get_context("fork")
        place, (hear, say) = app.listen(0), fork.Pipe()
        os.environ["BROWSER"] = "true"  # the program that does nothing
        self.process = fork.Process(target=serve, args=(place, True, say.send))
        self.process.start()
        place.close()
        assert hear.poll(60)
        address = hear.recv()
        port, path = re.fullmatch(r"http://127\.0\.0\.1:(\d+)(/[\w-]{32})/", address).groups()
        return int(port), path, self.process

    def __exit__(self, *_):
        self.process.terminate()
        self.process.join(20)


def ask(port, path, method="GET", body=None, *, host=None, read=True, **headers):
    """(status, body) of one request; `host` None is the right one."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.putrequest(method, path, skip_host=True)
    for name in [f"127.0.0.1:{port}"] if host is None else host:
        connection.putheader("Host", name)
    for name, value in headers.items():
        connection.putheader(name.replace("_", "-"), value)
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    if data is not None:
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Content-Length", str(len(data)))
    connection.endheaders(data)
    answer = connection.getresponse()
    said = answer.read().decode(errors="replace") if read else ""
    connection.close()
    return answer.status, said


def call(page, function, data, session="abc"):
    """What the page shows after a click: each answer's HTML, as the browser gets it."""
    port, path = page
    config = json.loads(ask(port, f"{path}/config")[1])
    index = next(one["id"] for one in config["dependencies"] if len(one["inputs"]) == (7 if function == "draw" else 1))
    body = {"data": data, "fn_index": index, "session_hash": session}
    status, said = ask(port, f"{path}/gradio_api/queue/join", "POST", body)
    if status != 200:
        return [f"{status}: {said}"]
    stream = ask(port, f"{path}/gradio_api/queue/data?session_hash={session}")[1]
    events = [json.loads(line[5:]) for line in stream.splitlines() if line.startswith("data:")]
    return [str(event["output"].get("data") or event) for event in events if "output" in event]


def draw(page, prompt="ab", responses=1, longest=5, temperature=1.0, top_k=0, top_p=1.0, seed=1):
    return call(page, "draw", [prompt, responses, longest, temperature, top_k, top_p, seed])


def test_nobody_gets_in_without_the_secret(page):
    port, path = page
    wrong = ["", path[:-1], path[:-1] + "%C3%A9", path.swapcase(), f"/x{path}", "/" + "A" * 32, f"{path[:-2]}%00"]
    for start in wrong:
        for method, routes in ROUTES.items() if start == "" else [("GET", ["/", "/config"])]:
            for route in routes:
                if start + route:
                    status, said = ask(port, start + route, method, b"{}")
                    assert (status, said) == (403, "This is not your page.\n"), (method, start + route)


def test_with_the_secret_there_is_no_more_than_the_page_needs(page):
    port, path = page
    for method, routes in ROUTES.items():
        for route in routes:
            needed = (route in NEEDED and method == ("POST" if "join" in route else "GET")) or route.startswith(STREAMS)
            status, _ = ask(port, path + route, method, b"{}", read=False)
            assert (status != 403) == needed, (method, route, status)


@pytest.mark.parametrize(
    "headers",
    [
        {"host": []},
        {"host": ["evil.example"]},
        {"host": ["evil.example:{port}"]},
        {"host": ["127.0.0.1"]},
        {"host": ["127.0.0.1:{port}.evil.example"]},
        {"host": ["127.0.0.1:{port}", "evil.example"]},
        {"host": ["evil.example"], "X-Forwarded-Host": "127.0.0.1:{port}"},
        {"Origin": "http://evil.example"},
        {"Origin": "http://127.0.0.1:1"},
        {"Origin": "null"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
    ],
    ids=str,
)
def test_other_hosts_and_origins_are_refused_everywhere(page, headers):
    port, path = page

    def filled(value):
        return [one.format(port=port) for one in value] if isinstance(value, list) else value.format(port=port)

    given = {name: filled(value) for name, value in headers.items()}
    for method, route in ("GET", "/"), ("GET", "/config"), ("POST", "/gradio_api/queue/join"), ("GET", "/theme.css"):
        assert ask(port, path + route, method, b"{}" if method == "POST" else None, **given)[0] in (400, 403)


def test_forwarding_headers_change_no_address(page):
    port, path = page
    status, said = ask(port, f"{path}/", X_Forwarded_Host="evil.example", X_Forwarded_Proto="https")
    assert status == 200
    assert "evil.example" not in said


def test_websockets_are_refused(page):
    port, path = page
    upgrade = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec_WebSocket_Key": "eA==",
        "Sec_WebSocket_Version": "13",
    }
    for route in ("/gradio_api/queue/join", "/queue/join", "/ws"):
        assert ask(port, path + route, **upgrade)[0] in (403, 404, 405)
        assert ask(port, route, **upgrade)[0] == 403


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
        {"prompt": None},
        {"responses": 10**9},
        {"responses": -1},
        {"longest": 10**9},
        {"longest": "5"},
        {"temperature": 0},
        {"temperature": "1"},
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


def test_a_body_that_is_too_large_is_not_read(page):
    port, path = page
    chunked = {"Transfer_Encoding": "chunked"}
    for headers in (
        {"Content_Length": "20000000"},
        chunked,
        {"Content_Length": "5", **chunked},
        {"Content_Length": "9" * 30},
    ):
        status, _ = ask(port, f"{path}/gradio_api/queue/join", "POST", **headers)
        assert status in (400, 403)


def test_there_are_only_a_few_sessions_at_a_time(page):
    port, path = page
    open_ones = []
    for number in range(app.MOST_OPEN + 1):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request("GET", f"{path}/gradio_api/heartbeat/{number}")
        open_ones.append((connection, connection.getresponse()))
    statuses = [answer.status for _, answer in open_ones]
    assert statuses.count(200) <= app.MOST_OPEN
    assert statuses[-1] == 403
    for connection, answer in open_ones:
        answer.close()
        connection.close()
    waited = time.monotonic() + 20
    while ask(port, f"{path}/")[0] != 200:
        assert time.monotonic() < waited
        time.sleep(0.2)


def test_the_page_may_load_nothing_from_elsewhere(page):
    port, path = page
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", f"{path}/")
    answer = connection.getresponse()
    assert answer.headers["content-security-policy"].startswith("default-src 'self'")
    assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
    assert answer.headers["referrer-policy"] == "no-referrer"


def test_its_files_are_private_and_go_with_it():
    pytest.importorskip("gradio")
    before = set(Path("/tmp").glob("gpt2-value-app-*"))
    with running() as (port, path, process):
        (folder,) = set(Path("/tmp").glob("gpt2-value-app-*")) - before
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert path in (folder / "open.html").read_text()
        assert ask(port, f"{path}/")[0] == 200
        command = Path(f"/proc/{process.pid}/cmdline")
        assert not command.exists() or path.encode() not in command.read_bytes()
    assert not process.is_alive()
    assert not folder.exists()


def test_a_port_that_is_taken_is_said_before_anything_is_loaded(gpt2_value, package):
    pytest.importorskip("gradio")
    with app.listen(0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OptionsError, match=f"port {port} cannot be used"):
            app.listen(port)
        status, _, err = gpt2_value("app", package, "--port", port)
        assert status == 1
        assert "--port" in err


def test_a_missing_gradio_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    with pytest.raises(MissingLibraryError, match="pip install gradio"):
        app.listen(0)


def test_models_that_cannot_be_compared_are_refused(tiny_tokenizer):
    with app.listen(0) as place:
        with pytest.raises(SourceError, match="96 and 97 tokens"):
            app.serve(place, make_tiny_model(), tiny_tokenizer, make_tiny_model(vocab_size=97), say=print)
        with pytest.raises(SourceError, match="no tokenizer"):
            app.serve(place, make_tiny_model(), None, None, say=print)


def test_a_draw_in_stages_is_one_draw(tiny_model):
    """What the page relies on: with one seed, a longer draw begins with the tokens of a shorter one."""
    for settings in {}, {"top_k": 9, "temperature": 1.5}, {"top_p": 0.7, "eos_token_id": list(range(40))}:
        draws = [
            tiny_model.rollout(
                [[5, 6], [7]], max_new_tokens=T, generator=torch.Generator().manual_seed(3), **settings
            ).responses
            for T in (7, 19, 40)
        ]
        for shorter in draws[:-1]:
            assert torch.equal(shorter, draws[-1][:, : shorter.shape[1]])
