"""Take the README's pictures in a headless Chromium: `make pictures`, after `make demo`.

Needs Debian's packages chromium and chromium-driver.
"""

import multiprocessing
import os
import sys
from pathlib import Path

from transformers import AutoTokenizer

from hub_tools import app
from modeling_gpt2_value import GPT2ValueModel

ROOT = Path(__file__).parent.parent.parent
DEMO, DOCS = ROOT / "demo", ROOT / "docs"
sys.path.insert(0, str(ROOT / "tests"))

from support.browser import Browser  # noqa: E402


def serve(place, say) -> None:
    model = GPT2ValueModel.from_pretrained(DEMO / "package").eval()
    model.name_or_path = "reviews"
    app.serve(place, model, AutoTokenizer.from_pretrained(DEMO / "package"), None, say=say)


def main() -> None:
    with Browser(width=1000, height=640) as browser:
        browser.open((DEMO / "responses.html").as_uri())
        browser.screenshot(DOCS / "demo.png", whole=True)
    os.environ["BROWSER"] = "true"
    place, (hear, say) = app.listen(0), multiprocessing.Pipe()
    server = multiprocessing.get_context("fork").Process(target=serve, args=(place, say.send))
    server.start()
    with Browser(width=1400, height=820) as browser:
        browser.open(hear.recv())
        browser.fill("Prompts for reviews, one a line", "The worst thriller I have ever seen is")
        browser.wait(lambda: browser.count("#responses .gv-likeliest .gv-bar"))
        browser.click("#draw")
        browser.wait(lambda: browser.count("#responses .gv-likeliest .gv-bar") == 0)
        browser.wait(lambda: browser.count("#responses .gv-likeliest .gv-bar"))
        browser.point_at("#responses .gv-chip:nth-child(14)")
        browser.screenshot(DOCS / "app.png")
    server.terminate()


if __name__ == "__main__":
    main()
