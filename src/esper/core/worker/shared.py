"""The worker that a process has when nobody gives it another."""

import atexit
import os
import sys
import threading

from esper.core.config import WorkerConfig
from esper.core.worker.worker import AsyncWorker
from esper.leyline import ConfigError

# At exit nobody reads results any more: coroutines get this long to clean up.
_EXIT_TIMEOUT_S = 0.2

_lock = threading.Lock()
_shared: tuple[WorkerConfig, AsyncWorker] | None = None


def make_worker(config: WorkerConfig) -> AsyncWorker:
    """Return a new worker with the settings of a configuration."""
    return AsyncWorker(
        config.max_concurrency,
        config.shutdown_timeout_s,
        grace_s=config.grace_ms / 1e3,
        max_loop_lag_s=config.max_loop_lag_ms / 1e3,
    )


def shared_worker(config: WorkerConfig | None = None) -> AsyncWorker:
    """Return the worker of this process; the first to ask has it made.

    :param config: its settings; the defaults when absent and it has to be made.
    :raises ConfigError: it was made with other settings.
    """
    global _shared
    with _lock:
        if _shared is None or _shared[1].closed:
            wanted = config or WorkerConfig()
            _shared = wanted, make_worker(wanted)
            atexit.register(_shared[1].shutdown, _EXIT_TIMEOUT_S)
        made, worker = _shared
        if config is not None and config != made:
            raise ConfigError(
                f"the worker of this process was made with {made!r}, not with {config!r}; shut it "
                "down first, or hand in a worker of your own"
            )
        return worker


def _renew_lock() -> None:
    global _lock
    _lock = threading.Lock()


if sys.platform != "win32":
    # In a forked process the thread that held it does not exist.
    os.register_at_fork(after_in_child=_renew_lock)
