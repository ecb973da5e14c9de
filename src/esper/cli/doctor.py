"""``esper doctor``: what this machine has, and what will and won't work on it."""

import os
import platform
import shutil
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from esper._version import __version__
from esper.cli.options import gather
from esper.cli.run_directory import is_writable
from esper.leyline import EsperError
from esper.tolaria.aggregation import describe_kernels

_COPY_BYTES = 256 * 2**20
_WRITE_BYTES = 64 * 2**20
_ROLLBACK_BUDGET_S = 0.5
_LOW_DISK_BYTES = 2 * 2**30
_OPTIONAL = {"scikit-learn": ("the built-in job", "pip install 'esper[demo]'")}


@dataclass(frozen=True)
class Finding:
    """One line of the verdict.

    :param works: False for something that will not work.
    :param essential: whether training depends on it.
    """

    works: bool
    text: str
    essential: bool = False


class UnfitError(EsperError):
    """Something that training depends on does not work here."""


def examine(runs: Path | None) -> None:
    """Print facts about the machine and a verdict.

    :raises UnfitError: training cannot work here.
    """
    directory = gather(None, None, {"run.directory": (runs, "--runs")}).settings.run.directory
    console = Console(highlight=False)
    memory_speed = copy_bandwidth()
    disk_speed = write_bandwidth(directory) if is_writable(directory) else None
    table = Table.grid(padding=(0, 2))
    for name, value in _facts(directory, memory_speed, disk_speed):
        table.add_row(Text(name, style="dim"), value)
    console.print(table)
    findings = _findings(directory, memory_speed, disk_speed)
    for finding in findings:
        mark, colour = ("✔", "green") if finding.works else ("✘", "yellow")
        console.print(Text.assemble((f"{mark} ", colour), finding.text))
    broken = [finding.text for finding in findings if finding.essential and not finding.works]
    if broken:
        raise UnfitError(broken[0])


def copy_bandwidth() -> float:
    """Return how fast warm memory is copied, in bytes per second; the best of five copies."""
    source = torch.ones(_COPY_BYTES, dtype=torch.uint8)
    target = torch.zeros_like(source)
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - began)
    return _COPY_BYTES / best


def write_bandwidth(directory: Path) -> float:
    """Return how fast a file is written and synced there, in bytes per second."""
    existing = directory
    while not existing.exists():
        existing = existing.parent
    block = os.urandom(2**20)
    with tempfile.NamedTemporaryFile(dir=existing, prefix=".esper-doctor-") as file:
        began = time.perf_counter()
        for _ in range(_WRITE_BYTES // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return _WRITE_BYTES / (time.perf_counter() - began)


def _facts(directory: Path, memory_speed: float, disk_speed: float | None) -> list[tuple[str, str]]:
    memory = psutil.virtual_memory()
    devices = ["cpu"]
    devices += [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    packages = ", ".join(f"{name} {_version_of(name) or 'missing'}" for name in _OPTIONAL)
    disk = "cannot be written" if disk_speed is None else f"{disk_speed / 1e9:.2f} GB/s with fsync"
    return [
        ("esper", __version__),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
        ("aggregation kernels", describe_kernels()),
        ("optional", packages),
        ("cores", f"{psutil.cpu_count(logical=True)}, load {os.getloadavg()[0]:.1f}"),
        ("memory", f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free"),
        ("memory copy", f"{memory_speed / 1e9:.1f} GB/s"),
        ("devices", ", ".join(devices)),
        ("runs", f"{directory}: {_free_bytes(directory) / 2**30:.1f} GiB free, {disk}"),
    ]


def _findings(directory: Path, memory_speed: float, disk_speed: float | None) -> list[Finding]:
    fits = memory_speed * _ROLLBACK_BUDGET_S
    findings = [
        Finding(
            True,
            f"a rollback from memory within {_ROLLBACK_BUDGET_S * 1e3:.0f} ms: up to "
            f"{fits / 2**30:.1f} GiB of training state at the measured bandwidth",
        )
    ]
    for name, (purpose, remedy) in _OPTIONAL.items():
        found = _version_of(name) is not None
        findings.append(
            Finding(found, purpose if found else f"{purpose}: {name} is missing; {remedy}")
        )
    if torch.cuda.is_available():
        findings.append(Finding(True, f"CUDA with {torch.cuda.device_count()} devices"))
    else:
        findings.append(Finding(False, "no CUDA device: training runs on the CPU"))
    if disk_speed is None:
        text = f"{directory} cannot be written: no run can be kept there; use --runs"
        findings.append(Finding(False, text, essential=True))
    else:
        free = _free_bytes(directory)
        enough = free > _LOW_DISK_BYTES
        note = "" if enough else f": only {free / 2**30:.1f} GiB are free"
        findings.append(Finding(enough, f"durable checkpoints in {directory}{note}"))
    return findings


def _free_bytes(directory: Path) -> int:
    existing = directory
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def _version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
