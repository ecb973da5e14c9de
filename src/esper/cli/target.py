"""From ``module:function`` to a training job."""

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from esper.leyline import EsperError, JobError
from esper.tolaria.job import TrainingJob


def build_job(target: str) -> TrainingJob:
    """Import and call the function that builds a job. The working directory is searched first.

    :param target: ``module:function``.
    :raises JobError: naming what is wrong with the target or with what it built.
    """
    module_name, separator, attribute = target.partition(":")
    if not (module_name and separator and attribute):
        raise JobError(f"the target is {target!r}; write it as module:function, e.g. my_job:build")
    build = _attribute(_module(module_name, target), attribute, target)
    try:
        job = build()
    except EsperError:
        raise
    except Exception as error:
        raise JobError(f"{target} raised {type(error).__name__}: {error}") from error
    if not isinstance(job, TrainingJob):
        raise JobError(
            f"{target} returned a {type(job).__qualname__}; return an esper.tolaria.TrainingJob"
        )
    return job


def _module(name: str, target: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise JobError(
                f"the target {target!r} names module {name!r}, which is neither installed nor in "
                f"{here}; check its name, or change to its directory"
            ) from error
        raise JobError(f"importing {name} needs module {error.name!r}; install it") from error
    except Exception as error:
        raise JobError(f"importing {name} raised {type(error).__name__}: {error}") from error


def _attribute(module: ModuleType, name: str, target: str) -> Callable[[], Any]:
    if not hasattr(module, name):
        public = [key for key in vars(module) if not key.startswith("_")]
        nearest = difflib.get_close_matches(name, public, n=1)
        hint = f"did you mean {module.__name__}:{nearest[0]}?" if nearest else "check its name"
        raise JobError(f"module {module.__name__} has no attribute {name!r}; {hint}")
    found = getattr(module, name)
    if not callable(found):
        raise JobError(
            f"{target} is a {type(found).__qualname__}; name a function that returns a TrainingJob"
        )
    build: Callable[[], Any] = found
    return build
