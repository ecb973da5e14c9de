"""Make the README's pictures from a finished run: the terminal as SVG, the report as PNG.

    python scripts/readme_pictures.py RUN

The terminal is the run's events replayed; the report is photographed by headless Chromium.
"""

import io
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from esper.leyline import StepRecord
from esper.nissa import read_records
from esper.nissa.report import write_report
from esper.nissa.terminal import TerminalSink

IMAGES = Path(__file__).parent.parent / "docs" / "images"
WINDOW = "1280,1420"


def main() -> int:
    """Write both pictures."""
    run = Path(sys.argv[1])
    IMAGES.mkdir(parents=True, exist_ok=True)
    picture_terminal(run, IMAGES / "terminal.svg")
    picture_page(write_report(run), IMAGES / "report.png")
    return 0


def picture_terminal(run: Path, target: Path) -> None:
    """Replay a run's epochs and events into an SVG."""
    console = Console(record=True, width=112, file=io.StringIO(), highlight=False)
    sink = TerminalSink(console)
    for record in read_records(run / "events.jsonl"):
        if not isinstance(record, StepRecord):
            sink.write(record)
    target.write_text(console.export_svg(title="esper train"), encoding="utf-8")


def picture_page(page: Path, target: Path) -> None:
    """Photograph a page."""
    chromium = shutil.which("chromium")
    if chromium is None:
        raise SystemExit("chromium is not installed; it takes the picture of the report")
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run(
            [
                chromium,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-background-networking",
                "--hide-scrollbars",
                f"--user-data-dir={profile}",
                f"--window-size={WINDOW}",
                "--virtual-time-budget=3000",
                f"--screenshot={target}",
                page.resolve().as_uri(),
            ],
            check=True,
            capture_output=True,
        )


if __name__ == "__main__":
    sys.exit(main())
