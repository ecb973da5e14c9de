import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "rollback.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", str(BENCHMARK), *arguments],
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_the_benchmark_of_both_tiers_prints_every_table(tmp_path: Path) -> None:
    done = run("--sizes", "4", "--rounds", "2", "--directory", str(tmp_path))
    assert done.returncode == 0, done.stderr
    for title in ("Memory", "Saving", "Loading from a warm page cache", "Stall of a save"):
        assert f"**{title}" in done.stdout
    for way in ("Esper, snapshot", "Esper, restore", "Esper, save", "Esper, verified load"):
        row = next(line for line in done.stdout.splitlines() if line.startswith(f"| {way} "))
        assert re.search(r"\d: (reached|missed)", row) or re.search("reached|missed", row)
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_a_size_that_makes_no_sense_is_refused() -> None:
    assert "megabytes above 0" in run("--sizes", "0").stderr
