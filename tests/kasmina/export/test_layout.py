import ast
import math
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from esper.kasmina.export.layout import (
    WIDTH,
    Group,
    Text,
    docstring,
    flat,
    lines_of,
    literal,
    prefixed,
)

words = st.text("abcde", min_size=1, max_size=30)
texts: Any = st.recursive(
    words,
    lambda inner: (
        st.builds(lambda name, items: Group(f"{name}(", items), words, st.lists(inner, max_size=5))
        | st.builds(lambda items: Group("[", items, "]"), st.lists(inner, max_size=5))
    ),
    max_leaves=25,
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple),
)


@given(texts, st.integers(0, 3))
def test_lines_mean_what_one_line_means(text: Text, depth: int) -> None:
    lines = lines_of(prefixed("value = ", text), depth)
    together = ast.dump(ast.parse("\n".join(lines).strip()))
    assert together == ast.dump(ast.parse(f"value = {flat(text)}"))
    for line in lines:
        # Only what cannot be taken apart is wider.
        assert len(line) <= WIDTH or "," not in line.strip().rstrip(",")


@given(values)
def test_a_literal_is_read_as_its_value(value: Any) -> None:
    tree = ast.parse(literal(value), mode="eval")
    found = eval(compile(tree, "literal", "eval"))  # noqa: S307 - what is tested
    # No number is equal to none, and signs of zero count.
    assert repr(found) == repr(value)


def test_a_docstring_of_one_line_and_of_several() -> None:
    assert docstring(["One."], 1) == ['    """One."""']
    assert docstring(["One.", "", "Two."], 0) == ['"""One.', "", "Two.", '"""']


def test_an_infinite_number_is_spelt_out() -> None:
    assert literal((1, -math.inf)) == '(1, float("-inf"))'
