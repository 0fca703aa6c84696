"""A headless Chromium for the tests of the app, driven by chromedriver over W3C WebDriver.

Imports the standard library. Needs Debian's packages chromium and chromium-driver. The protocol:
https://www.w3.org/TR/webdriver2/.
"""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the protocol's name for a reference to an element
TAB, END = "\ue004", "\ue010"  # keys


class Browser:
    """One window. Use it as a context.

    Args:
        width, height: of the window, in CSS pixels.
        dark: whether pages are told that the system is dark.
    """

    def __init__(self, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        self.width, self.height, self.dark = width, height, dark

    def __enter__(self) -> Browser:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        driver, chromium = shutil.which("chromedriver"), shutil.which("chromium")
        if driver is None or chromium is None:
            raise RuntimeError("chromium is not installed: apt-get install chromium chromium-driver")
        self._driver = subprocess.Popen([driver, f"--port={port}", "--log-level=SEVERE"], stdout=subprocess.DEVNULL)
        self._url = f"http://127.0.0.1:{port}"
        self.wait(lambda: self._ask("GET", "/status")["ready"])
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--lang=en"]
        arguments += [
            f"--window-size={self.width},{self.height}",
            "--host-resolver-rules=MAP rebound.example 127.0.0.1, MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        ]
        options = {"binary": chromium, "args": arguments}
        asked = {
            "capabilities": {"alwaysMatch": {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}}
        }
        session = self._ask("POST", "/session", asked)["sessionId"]
        self._url += f"/session/{session}"
        size = {"width": self.width, "height": self.height, "deviceScaleFactor": 1, "mobile": self.width < 600}
        self.devtools("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if self.dark else "light"}
        self.devtools("Emulation.setEmulatedMedia", features=[scheme])
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._ask("DELETE", "")
        finally:
            self._driver.terminate()
            self._driver.wait()

    def open(self, url: str) -> None:
        self._ask("POST", "/url", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        """What a function body of JavaScript returns."""
        return self._ask("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def find(self, selector: str) -> Any:
        """The first element, once there is one."""
        found = self.wait(lambda: self._ask("POST", "/elements", {"using": "css selector", "value": selector}))
        return found[0]

    def count(self, selector: str) -> int:
        return int(self.run("return document.querySelectorAll(arguments[0]).length", selector))

    def text(self, selector: str) -> str:
        return str(self.run("return document.querySelector(arguments[0])?.innerText ?? ''", selector))

    def click(self, selector: str) -> None:
        element = self.find(selector)
        self.run("arguments[0].scrollIntoView({block: 'center'})", element)
        self._ask("POST", f"/element/{element[ELEMENT]}/click", {})

    def click_text(self, selector: str, text: str) -> None:
        """Click the first element of a selector whose text this is."""
        script = "return [...document.querySelectorAll(arguments[0])].find(e => e.innerText.trim() === arguments[1])"
        element = self.wait(lambda: self.run(script, selector, text))
        self._ask("POST", f"/element/{element[ELEMENT]}/click", {})

    def fill(self, label: str, text: str) -> None:
        """Replace what stands in the field with this label."""
        script = """const label = [...document.querySelectorAll('label')].find(
            e => e.innerText.trim() === arguments[0] && e.offsetParent);
            return label?.querySelector('input, textarea')"""
        element = self.wait(lambda: self.run(script, label))
        self._ask("POST", f"/element/{element[ELEMENT]}/clear", {})
        self._ask("POST", f"/element/{element[ELEMENT]}/value", {"text": text})

    def press(self, keys: str) -> None:
        """Press keys, one after the other, wherever the focus is."""
        strokes = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self._ask("POST", "/actions", {"actions": [{"type": "key", "id": "keys", "actions": strokes}]})

    def point_at(self, selector: str) -> None:
        """Move the mouse over an element."""
        element = self.find(selector)
        self.run("arguments[0].scrollIntoView({block: 'center'})", element)
        move = {"type": "pointerMove", "duration": 0, "x": 0, "y": 0, "origin": element}
        self._ask("POST", "/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": [move]}]})

    def screenshot(self, file: Path, *, whole: bool = False) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        taken = self.devtools("Page.captureScreenshot", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(taken["data"]))

    def complaints(self) -> list[str]:
        """Errors in the page's console since the last call."""
        entries = self._ask("POST", "/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] == "SEVERE"]

    def devtools(self, command: str, **parameters: Any) -> Any:
        return self._ask("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def wait(self, condition: Callable[[], Any], *, seconds: float = 30.0) -> Any:
        """What `condition` returns once that is true; raises TimeoutError."""
        end = time.monotonic() + seconds
        while True:
            try:
                if found := condition():
                    return found
            except urllib.error.URLError:
                if self._driver.poll() is not None:
                    raise
            if time.monotonic() > end:
                raise TimeoutError(f"not within {seconds:g} s")
            time.sleep(0.05)

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(json.load(error)["value"]["message"]) from error
