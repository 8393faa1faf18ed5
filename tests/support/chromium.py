"""A headless Chromium that is driven as a person would use it, if one is installed."""

import base64
import json
import shutil
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

QUIET = (
    *("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run"),
    *("disable-background-networking", "disable-component-update", "disable-sync"),
    "hide-scrollbars",
)
"""Flags, so that what it asks a network for is asked by the page."""


class Tab:
    """A page in Chromium, of a size and a colour scheme."""

    def __init__(self, driver):
        self.driver = driver

    def open(self, file: Path, width: int = 1280, height: int = 900, scheme: str = "light"):
        size = dict(width=width, height=height, deviceScaleFactor=1, mobile=width < 500)
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.scheme(scheme)
        self.complaints(), self.requests()  # those of the page before
        self.driver.get(file.as_uri())
        self.wait("document.documentElement.dataset.drawn === 'yes'")

    def scheme(self, name: str):
        features = [{"name": "prefers-color-scheme", "value": name}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def js(self, expression: str):
        return self.driver.execute_script(f"return {expression}")

    def wait(self, condition: str, seconds: float = 30):
        until = time.monotonic() + seconds
        while not self.js(condition):
            assert time.monotonic() < until, f"never true: {condition}"
            time.sleep(0.05)

    def press(self, *keys: str):
        from selenium.webdriver import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()

    def complaints(self) -> list[str]:
        """What its console has said since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """The addresses asked for since the last call; those of data in the page left out."""
        events = [json.loads(e["message"])["message"] for e in self.driver.get_log("performance")]
        asked = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
        return [e["request"]["url"] for e in asked if not e["request"]["url"].startswith("data:")]

    def picture(self, file: Path):
        shot = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})
        file.write_bytes(base64.b64decode(shot["data"]))


@contextmanager
def chromium():
    """Yield a Tab; skips the test where selenium, Chromium or its driver is not installed."""
    selenium = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.chrome.service import Service

    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("no Chromium with chromedriver (Debian: apt-get install chromium-driver)")
    options = selenium.ChromeOptions()
    options.binary_location = browser
    for flag in QUIET:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = selenium.Chrome(options=options, service=Service(driver))
    try:
        yield Tab(found)
    finally:
        found.quit()
