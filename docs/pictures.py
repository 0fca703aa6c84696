"""Take the README's pictures in a headless Chromium: `make pictures`, after `make demo`."""

import multiprocessing
import os
import sys
from pathlib import Path

from selenium.webdriver import ActionChains
from transformers import AutoTokenizer

from hub_tools import app
from modeling_gpt2_value import GPT2ValueModel

ROOT = Path(__file__).parent.parent
DEMO, DOCS = ROOT / "demo", ROOT / "docs"
sys.path.insert(0, str(ROOT / "tests"))

from support.browser import chromium, fill, find, resize, wait  # noqa: E402

DRAWN = "document.querySelector('#responses .gv-likeliest .gv-bar')"  # there after the last stage


def serve(place, say):
    model = GPT2ValueModel.from_pretrained(DEMO / "package").eval()
    model.name_or_path = "reviews"
    app.serve(place, model, AutoTokenizer.from_pretrained(DEMO / "package"), None, say=say)


if __name__ == "__main__":
    with chromium(1000, 640) as browser:
        browser.get((DEMO / "responses.html").as_uri())
        resize(browser, 1000, browser.execute_script("return document.documentElement.scrollHeight"))
        browser.save_screenshot(DOCS / "demo.png")
    os.environ["BROWSER"] = "true"
    place, (hear, say) = app.listen(0), multiprocessing.Pipe()
    server = multiprocessing.get_context("fork").Process(target=serve, args=(place, say.send))
    server.start()
    with chromium(1400, 820) as browser:
        browser.get(hear.recv())
        wait(browser, DRAWN)
        fill(browser, "Prompts for reviews, one a line", "The worst thriller I have ever seen is")
        find(browser, "#draw").click()
        wait(browser, f"!{DRAWN}")
        wait(browser, DRAWN)
        ActionChains(browser).move_to_element(find(browser, "#responses .gv-chip:nth-child(14)")).perform()
        browser.save_screenshot(DOCS / "app.png")
    server.terminate()
