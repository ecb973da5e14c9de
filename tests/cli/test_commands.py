import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Esper = Callable[..., "subprocess.CompletedProcess[str]"]

pytestmark = pytest.mark.timeout(60)


def test_the_command_line_does_not_import_torch() -> None:
    program = "import sys, esper, esper.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_version_names_what_matters(esper: Esper) -> None:
    output = esper("--version").stdout
    assert output.startswith("esper 0.")
    assert "torch" in output
    assert "python" in output


@pytest.mark.parametrize("command", ["train", "report", "runs", "doctor", "config show"])
def test_help_teaches_by_example(esper: Esper, command: str) -> None:
    result = esper(*command.split(), "--help")
    assert result.returncode == 0
    assert f"esper {command}" in result.stdout.split("Example")[1]


def test_config_show_tells_value_and_origin(esper: Esper, workplace: Path) -> None:
    (workplace / "esper.toml").write_text("[train]\nepochs = 3\n")
    rows = {
        line.split()[0]: line
        for line in esper("config", "show").stdout.splitlines()
        if line.strip()
    }
    assert "3" in rows["train.epochs"].split()
    assert "esper.toml" in rows["train.epochs"]
    assert "default" in rows["train.seed"]
    toml = esper("config", "show", "--toml", "--set", "guard.window=9").stdout
    assert "window = 9" in toml
    (workplace / "other.toml").write_text(toml)
    assert esper("config", "show", "--config", "other.toml", "--toml").stdout == toml


def test_an_assignment_without_a_value_is_refused(esper: Esper) -> None:
    result = esper("config", "show", "--set", "guard.window")
    assert result.returncode == 2
    assert "write --set section.key=value" in result.stderr


def test_runs_are_listed_and_reported(esper: Esper, workplace: Path) -> None:
    assert "no runs in runs" in esper("runs").stdout
    esper("train", "tiny_job:build", "--epochs", "1", "--name", "one")
    output = esper("runs").stdout
    assert "one" in output
    assert "completed" in output
    page = workplace / "runs" / "one" / "report.html"
    page.unlink()
    assert esper("report", "one").stdout.strip() == "runs/one/report.html"
    assert page.exists()


def test_a_report_of_nothing_is_refused(esper: Esper) -> None:
    result = esper("report", "nothing")
    assert result.returncode == 2
    assert "there is no run 'nothing'" in result.stderr


def test_damaged_events_are_named(esper: Esper, workplace: Path) -> None:
    esper("train", "tiny_job:build", "--epochs", "1", "--name", "one")
    events = workplace / "runs" / "one" / "events.jsonl"
    events.write_bytes(b"garbage\n" + events.read_bytes())
    result = esper("runs")
    assert result.returncode == 2
    assert "line 1 is damaged" in result.stderr


def test_the_doctor_measures_and_judges(esper: Esper) -> None:
    result = esper("doctor")
    assert result.returncode == 0
    assert "GB/s with fsync" in result.stdout
    assert "a rollback from memory within 500 ms: up to" in result.stdout


def test_the_doctor_says_what_cannot_work(esper: Esper, workplace: Path) -> None:
    (workplace / "file").write_text("")
    result = esper("doctor", "--runs", "file/runs")
    assert result.returncode == 2
    assert "cannot be written" in result.stderr
