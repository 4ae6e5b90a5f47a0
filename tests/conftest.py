"""What several test files share: one thread, as the number of threads changes the last digits, and one browser."""

import os
import shutil

import pytest
import torch
from playwright.sync_api import sync_playwright

torch.set_num_threads(1)

NAMES = [
    "chromium",
    "chromium-browser",
    "google-chrome",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
]
OFFLINE = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="session")
def browser():
    """The Chromium of the system, one for all tests: playwright allows one in a process."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if not found:
        reason = f"the pages are not tested: no browser found (looked for {', '.join(NAMES[:3])})"
        # skipped, or failed where a browser must be there
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=OFFLINE)
        yield browser
        browser.close()
