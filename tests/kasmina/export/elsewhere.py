"""Loads what was exported in a process that cannot import Esper.

With ``shared``: print which tensors are one and the same. Else with a file of inputs and outputs,
and ``exact`` when they have to be equal to the bit: print each form that gives the outputs.
"""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any


class NoEsper:
    """Makes as if Esper were not installed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] == "esper":
            raise ModuleNotFoundError(f"{name} is kept away", name=name)


sys.meta_path.insert(0, NoEsper())  # type: ignore[arg-type]
try:
    import esper  # noqa: F401
except ModuleNotFoundError as error:
    kept_away = "kept away" in str(error)
else:
    kept_away = False
assert kept_away

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

torch.set_num_threads(1)


def load(folder: Path) -> torch.nn.Module:
    spec = importlib.util.spec_from_file_location("model", folder / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load()


def tell(text: str) -> None:
    sys.stdout.write(f"{text}\n")


def tell_shared(folder: Path) -> None:
    named = dict(load(folder).named_parameters(remove_duplicate=False))
    first = named["first.0.weight"]
    tell("\n".join(name for name, parameter in named.items() if parameter is first))


def check(given: Any, expected: Any, *, exact: bool) -> None:
    found, wanted = tree_leaves(given), tree_leaves(expected)
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        tolerance = {"rtol": 0.0, "atol": 0.0} if exact else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(one, other, **tolerance)


def call(model: Any, sample: Any) -> Any:
    if isinstance(sample, dict):
        return model(**sample)
    return model(*sample) if isinstance(sample, tuple) else model(sample)


def run_onnx(file: Path, sample: Any) -> list[torch.Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    values = sample if isinstance(sample, dict) else dict(zip(names, tree_leaves(sample)))  # noqa: B905
    return [
        torch.from_numpy(np.asarray(result))
        for result in session.run(None, {name: values[name].numpy() for name in names})
    ]


def compare(folder: Path, file: Path, *, exact: bool) -> None:
    sample, expected = torch.load(file, weights_only=True)
    given = sample
    if isinstance(sample, dict):
        given = {key: value for key, value in sample.items() if isinstance(value, torch.Tensor)}
    with torch.no_grad():
        model = load(folder)
        outputs = call(model, given)
        check(outputs, expected, exact=True)
        assert torch.utils._pytree.tree_structure(outputs) == torch.utils._pytree.tree_structure(
            expected
        )
        tell("safetensors")
        program = torch.export.load(folder / "model.pt2").module()
        check(call(program, sample), expected, exact=exact)
        tell("torch")
    if (folder / "model.onnx").exists():
        check(run_onnx(folder / "model.onnx", given), expected, exact=False)
        tell("onnx")
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    Path(f"{file}.keys").write_text(json.dumps(shapes))
    assert not [name for name in sys.modules if name.partition(".")[0] == "esper"]


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    if sys.argv[2] == "shared":
        tell_shared(directory)
    else:
        compare(directory, Path(sys.argv[2]), exact=sys.argv[3] == "exact")
