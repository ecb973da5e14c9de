import os
import subprocess
import sys
from pathlib import Path

import pytest

from esper.leyline import CheckpointError
from esper.tolaria import TolariaTrainer
from support.jobs import config, two_task_job


def test_a_run_that_another_process_trains_is_refused_at_once(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from esper.tolaria import TolariaTrainer\n"
        "from support.jobs import config, two_task_job\n"
        "job, directory = two_task_job(), Path(sys.argv[1])\n"
        "trainer = TolariaTrainer.from_job(job, config=config(), directory=directory)\n"
        "steps = trainer.steps(); next(steps); print('ready', flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        second = TolariaTrainer.from_job(two_task_job(), config=config(), directory=tmp_path)
        with pytest.raises(CheckpointError, match=f"written by process {other.pid}"):
            next(iter(second.steps()))
        other.communicate(timeout=15)
    assert other.returncode == 0
