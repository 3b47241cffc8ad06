"""Chromium, driven by selenium, and what the tests of pages ask of it."""

from __future__ import annotations

import shutil
from contextlib import contextmanager

import numpy as np
import pytest


@contextmanager
def chromium():
    """Chromium without a window, driven by selenium (the extra `browser`) through Debian's chromium-driver."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: the extra `browser`")
    from selenium.webdriver.chrome.service import Service

    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (program and driver):
        pytest.skip("needs chromium and chromedriver (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    quiet = ("disable-background-networking", "disable-component-update", "disable-sync", "no-first-run")
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-quic", "window-size=1280,900", *quiet):
        options.add_argument(f"--{flag}")
    browser = webdriver.Chrome(options=options, service=Service(driver))
    yield browser
    browser.quit()


def text(browser, selector):
    """Return what an element shows."""
    return browser.execute_script("return document.querySelector(arguments[0]).innerText", selector)


def press(browser, *keys):
    """Press keys: names of selenium's, or texts."""
    from selenium.webdriver.common.keys import Keys

    for key in keys:
        browser.switch_to.active_element.send_keys(getattr(Keys, key, key))


def set_theme(browser, theme=None):
    """Prefer light or dark, as a user would; None is the default."""
    features = [{"name": "prefers-color-scheme", "value": theme}] if theme else []
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def require_names(browser):
    """Check that everything that can have the focus has a name for screen readers. Return the roles on the page."""
    nodes = browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    for node in nodes:
        properties = {p["name"]: p["value"]["value"] for p in node.get("properties", []) if "value" in p["value"]}
        if properties.get("focusable") and node["role"]["value"] != "RootWebArea":
            assert node["name"]["value"].strip(), node
    return {node["role"]["value"] for node in nodes if not node["ignored"]}


def luminance(rgb):
    """Relative luminance of sRGB colours (..., 3) from 0 to 255: WCAG 2.2."""
    x = np.array(rgb) / 255
    return np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]


def contrast(one, other):
    """Return the contrast of two luminances: WCAG 2.2, 1.4.3 demands 4.5."""
    low, high = np.sort([one, other], axis=0)
    return (high + 0.05) / (low + 0.05)
