import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esper.leyline import StateError
from esper.tolaria.state.tree import join, split

plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
keys = st.text() | st.integers() | st.tuples(st.integers(), st.text())
nested = st.recursive(
    plain,
    lambda inner: st.lists(inner) | st.dictionaries(keys, inner) | st.lists(inner).map(tuple),
)


@given(nested)
def test_any_nesting_of_plain_values_survives_json(value: object) -> None:
    tensors: dict[str, torch.Tensor] = {}
    assert join(json.loads(json.dumps(split(value, "x", tensors))), tensors) == value


def test_tensors_are_taken_out_by_path_and_copied_back() -> None:
    original = {"a": [torch.ones(2), {"b": torch.tensor(3)}], 5: (torch.zeros(1), math.inf)}
    tensors: dict[str, torch.Tensor] = {}
    values = json.loads(json.dumps(split(original, "state", tensors)))
    assert set(tensors) == {"state/a/0", "state/a/1/b", "state/5/0"}
    rebuilt = join(values, tensors)
    assert torch.equal(rebuilt["a"][0], torch.ones(2))
    assert rebuilt[5][1] == math.inf
    rebuilt["a"][0].zero_()
    assert torch.equal(tensors["state/a/0"], torch.ones(2)), "nothing may be shared"


def test_what_cannot_be_saved_is_named() -> None:
    with pytest.raises(StateError, match=r"cannot save scheduler/f: a function"):
        split({"f": lambda: None}, "scheduler", {})


def test_a_missing_tensor_is_named() -> None:
    with pytest.raises(StateError, match="'state/a'"):
        join({"$tensor": "state/a"}, {})
