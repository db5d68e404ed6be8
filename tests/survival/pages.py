"""A report as a browser sees it: whatever stands in it, none of it is done."""

import re
import shutil
import subprocess
from pathlib import Path

from tests.pages import Page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"


def assert_harmless(page: Path, scratch: Path) -> None:
    """The texts that want to be scripts are shown, and did not become any: texts that ran call the page "owned"."""
    read = Page(page.read_text())
    assert "owned" in read.text
    assert not [name for _, name, _ in read.attributes if name.startswith("on")]
    assert all(value.startswith("data:") for tag, name, value in read.attributes if (tag, name) == ("img", "src"))
    assert read.tags.count("script") <= 1  # the page's own
    if CHROMIUM is None:
        return
    command = [CHROMIUM, *FLAGS.split(), f"--user-data-dir={scratch / 'chromium'}", "--dump-dom"]
    done = subprocess.run([*command, f"{page.as_uri()}#q=script"], capture_output=True, check=True, timeout=120)
    title = re.search("<title>(.*?)</title>", done.stdout.decode(), re.DOTALL)
    assert title is not None
    assert "owned" not in title[1]
