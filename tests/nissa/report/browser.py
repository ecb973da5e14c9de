"""A real browser without a network."""

import shutil
import subprocess
from pathlib import Path

import pytest


def drawn(page: Path, folder: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    """Let a browser draw a page; return the document that comes of it, and what it complained of.

    :param folder: for the browser's own files.
    """
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed: the page is not tested in a browser")
    result = subprocess.run(
        [
            chromium, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr",
            f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=3000", "--dump-dom",
            *options, page.as_uri(),
        ],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert 'data-ready="true"' in result.stdout
    return result
