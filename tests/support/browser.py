"""A headless Chromium for the tests of the app, driven by selenium.

Needs Debian's packages chromium and chromium-driver.
"""

import contextlib
import shutil

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

ARGUMENTS = [
    "--headless=new",
    "--no-sandbox",
    "--hide-scrollbars",
    "--lang=en",
    "--host-resolver-rules=MAP rebound.example 127.0.0.1, MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]


@contextlib.contextmanager
def chromium(width, height, dark=False):
    """A window of so many CSS pixels; `dark` is what pages are told of the system."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in ARGUMENTS:
        options.add_argument(argument)
    with webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver"))) as driver:
        driver.implicitly_wait(30)  # for each element that is looked for
        resize(driver, width, height)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        yield driver


def resize(driver, width, height):
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def find(driver, selector):
    """The first element, once there is one."""
    return driver.find_element(By.CSS_SELECTOR, selector)


def fill(driver, label, text):
    """Replace what stands in the field with this label."""
    field = driver.find_element(By.XPATH, f"//label[contains(., '{label}')]//textarea")
    field.clear()
    field.send_keys(text)


def wait(driver, script):
    """Until this expression of JavaScript is true."""
    WebDriverWait(driver, 30).until(lambda _: driver.execute_script(f"return {script}"))
