"""Python source in lines of a sane width."""

import json
import math
from dataclasses import dataclass, field, replace
from typing import Any

WIDTH = 88
_INDENT = "    "


@dataclass(frozen=True)
class Group:
    """Text in brackets, which may be spread over several lines.

    :param opening: all up to the opening bracket, and it.
    :param items: what is between, separated by commas.
    :param closing: the closing bracket, and all after it.
    """

    opening: str
    items: "list[Text]" = field(default_factory=list)
    closing: str = ")"

    @property
    def is_call(self) -> bool:
        """Whether a name is before the bracket, not an operator or nothing."""
        before = self.opening[:-1]
        return bool(before) and (before[-1].isalnum() or before[-1] in "_)]")


Text = str | Group


def literal(value: Any) -> str:  # noqa: ANN401 - any plain value
    """Return a plain value as Python code."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False) if value.isprintable() else repr(value)
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    if type(value) is tuple:
        return f"({', '.join(map(literal, value))}{',' if len(value) == 1 else ''})"
    if type(value) is list:
        return f"[{', '.join(map(literal, value))}]"
    return repr(value)


def prefixed(prefix: str, text: Text) -> Text:
    """Return a text with something before it."""
    if isinstance(text, Group):
        return replace(text, opening=prefix + text.opening)
    return prefix + text


def suffixed(text: Text, suffix: str) -> Text:
    """Return a text with something after it."""
    if isinstance(text, Group):
        return replace(text, closing=text.closing + suffix)
    return text + suffix


def flat(text: Text) -> str:
    """Return a text as one line."""
    if isinstance(text, str):
        return text
    return text.opening + ", ".join(map(flat, text.items)) + text.closing


def lines_of(text: Text, depth: int = 0, suffix: str = "") -> list[str]:
    """Return the lines of a text, each at most :data:`WIDTH` wide where that can be.

    :param depth: how far it is indented.
    :param suffix: follows the last line.
    """
    indent = _INDENT * depth
    line = f"{indent}{flat(text)}{suffix}"
    if isinstance(text, str) or len(line) <= WIDTH or not text.items:
        return [line]
    first, last = f"{indent}{text.opening}", f"{indent}{text.closing}{suffix}"
    body = f"{indent}{_INDENT}{', '.join(map(flat, text.items))}"
    # Arguments may share a line of their own; the items of a literal have one each.
    if text.is_call and len(body) <= WIDTH:
        return [first, body, last]
    comma = "" if text.is_call and len(text.items) == 1 else ","
    inner = [line for item in text.items for line in lines_of(item, depth + 1, comma)]
    return [first, *inner, last]


def docstring(text: list[str], depth: int) -> list[str]:
    """Return the lines of a docstring.

    :param text: its own lines.
    :param depth: how far it is indented.
    """
    indent = _INDENT * depth
    if len(text) == 1:
        return [f'{indent}"""{text[0]}"""']
    rest = [f"{indent}{line}" if line else "" for line in text[1:]]
    return [f'{indent}"""{text[0]}', *rest, f'{indent}"""']
