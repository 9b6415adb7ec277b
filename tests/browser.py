"""The browser that pages are opened in: Debian's chromium, without a window."""

import shutil

from tests.conftest import needs_tool

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# Without these a browser talks to its makers' servers, and does not start as root.
QUIET = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
QUIET += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]


def browser() -> str:
    """The name of the program; skips the test where there is none."""
    return next(filter(shutil.which, BROWSERS), None) or needs_tool("chromium")
