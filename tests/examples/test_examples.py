import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_the_two_losses_example_trains_as_its_user_would_run_it(tmp_path: Path) -> None:
    result = subprocess.run(
        [
            sys.executable, "-m", "esper", "train", "two_losses:build",
            "--epochs", "3", "--runs", str(tmp_path), "--name", "example",
        ],
        cwd=EXAMPLES, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "example" / "report.html").exists()
    assert len((EXAMPLES / "two_losses.py").read_text().splitlines()) <= 40
