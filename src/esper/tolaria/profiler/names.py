"""Names of traces: unique over runs, hosts, processes and time."""

import os
import re
import socket
from datetime import UTC, datetime
from time import time_ns

import torch.distributed

# What TensorBoard's plugin and torch's own tools look for.
SUFFIX = ".pt.trace.json"


def trace_name(run: str, sequence: int) -> str:
    """Return a file name of run, time in UTC to the nanosecond, host, rank, process and number."""
    seconds, nanoseconds = divmod(time_ns(), 10**9)
    stamp = datetime.fromtimestamp(seconds, UTC).strftime("%Y%m%dT%H%M%S")
    place = f"{_plain(socket.gethostname())}-r{rank()}-p{os.getpid()}"
    return f"{_plain(run)}-{stamp}.{nanoseconds:09d}Z-{place}-{sequence}{SUFFIX}"


def rank() -> int:
    """Return the rank of this process: torch's own, else that of the launcher, else 0."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return int(torch.distributed.get_rank())
    told = os.environ.get("RANK", "")
    return int(told) if told.isdecimal() else 0


def _plain(text: str) -> str:
    """Return what is safe in a file name, at most 64 characters of it; never nothing."""
    return re.sub(r"[^A-Za-z0-9_.]+", "-", text).strip("-.")[:64] or "run"
