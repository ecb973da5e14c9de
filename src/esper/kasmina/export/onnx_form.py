"""The file ``model.onnx``, and running it again."""

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from esper.kasmina.export.calls import first_line
from esper.kasmina.export.comparison import Answer
from esper.kasmina.export.program import Program, output_names
from esper.kasmina.export.sample import Inputs
from esper.kasmina.export.trees import map_leaves
from esper.leyline import GrowthError

ONNX = "model.onnx"
_NEEDED = ("onnx", "onnxscript")
_RUNTIME = "onnxruntime"


def check_installed() -> None:
    """Look for the packages that writing ONNX needs.

    :raises GrowthError: one is missing.
    """
    missing = [name for name in _NEEDED if not _is_installed(name)]
    if missing:
        raise GrowthError(
            f"the format onnx needs {' and '.join(missing)}; install with: "
            "pip install 'esper[onnx]', or leave the format out"
        )


def write_onnx(program: Program, inputs: Inputs, outputs: Any, file: Path) -> None:  # noqa: ANN401
    """Write a program as ONNX; weights that one file cannot hold go beside it.

    :raises GrowthError: an operation has no form in ONNX.
    """
    names = [name for name, _ in inputs.flat()]
    sample = inputs.sample
    try:
        with _quiet():
            converted = torch.onnx.export(
                program.exported,
                sample.args,
                kwargs=sample.kwargs,
                dynamo=True,
                verbose=False,
                input_names=names,
                output_names=output_names(outputs, set(names)),
            )
        if converted is None:
            raise GrowthError("torch.onnx.export returned no model")
        converted.save(file)
    except (OSError, GrowthError):
        raise
    # The converter has errors of many packages.
    except Exception as error:
        raise GrowthError(f"the model has no form in ONNX: {first_line(error)}") from error


def open_onnx(file: Path, outputs: Any) -> Answer | None:  # noqa: ANN401
    """Return what runs a file; None where onnxruntime is not installed.

    :param outputs: of the sample; their structure is given back.
    :raises GrowthError: onnxruntime refuses the file.
    """
    if not _is_installed(_RUNTIME):
        return None
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(
            str(file), options, providers=["CPUExecutionProvider"]
        )
    # Its errors share no class but this one.
    except Exception as error:
        raise GrowthError(f"onnxruntime refuses {file.name}: {first_line(error)}") from error

    def answer(inputs: Inputs) -> Any:  # noqa: ANN401
        given = dict(inputs.flat())
        feed = {node.name: given[node.name].numpy() for node in session.get_inputs()}
        results = iter(session.run(None, feed))
        return map_leaves(
            outputs,
            lambda leaf: torch.from_numpy(next(results)) if isinstance(leaf, Tensor) else leaf,
        )

    return answer


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:
        # Somebody has kept it from being imported.
        return False


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the converter from telling which packages it could use besides."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
