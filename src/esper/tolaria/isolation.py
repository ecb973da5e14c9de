"""Where a companion runs: as it declares, else where its deadline holds."""

import importlib.util
from typing import Any

from esper.core.worker import Isolation, choose_isolation
from esper.core.worker.transport import encode
from esper.leyline import ConfigError


def isolation_of(
    companion: Any,  # noqa: ANN401
    method: str = "__call__",
    wanted: str = "auto",
) -> tuple[Isolation, str]:
    """Return where a companion's method is to run, and a warning when it could not be stopped.

    A coroutine is cancelled, and anything that can be sent to a process is killed there. What
    neither awaits nor can be sent runs on a thread.

    :param companion: an object, or a function to be called itself.
    :param wanted: an isolation, or ``auto``.
    :raises ConfigError: the method does not suit the isolation that is asked for.
    """
    function = companion if method == "__call__" else getattr(companion, method)
    name = getattr(companion, "__qualname__", type(companion).__qualname__)
    declared = getattr(companion, "isolation", None)
    if wanted == "auto" and declared is not None:
        wanted = str(declared)
    if wanted != "auto":
        try:
            return choose_isolation(function, Isolation(wanted)), ""
        except (TypeError, ValueError) as error:
            raise ConfigError(f"isolation of {name}: {error}") from error
    if choose_isolation(function) is Isolation.ASYNC:
        return Isolation.ASYNC, ""
    obstacle = _obstacle_to_sending(companion)
    if not obstacle:
        return Isolation.PROCESS, ""
    warning = (
        f"{name} {obstacle}: it runs on a thread, which cannot be stopped; "
        "declare isolation = 'thread' if it is sure to return"
    )
    return Isolation.THREAD, warning


def _obstacle_to_sending(companion: Any) -> str:  # noqa: ANN401
    module = getattr(companion, "__module__", None) or "no module"
    try:
        found = module != "__main__" and importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        found = False
    if not found:
        return f"is defined in {module}, which a process cannot import"
    try:
        encode(companion)
    except TypeError as error:
        return str(error)
    return ""
