"""Pieces of the page that several parts of it use."""

from collections.abc import Iterable, Sequence

# What stands in for a value that was not measured.
ABSENT = "\u2013"


def table(
    head: Iterable[str],
    rows: Sequence[Sequence[str]],
    name: str,
    classes: Sequence[str] = (),
) -> str:
    """Return a table.

    :param head: of the columns, as HTML.
    :param rows: cells, as HTML.
    :param name: its class.
    :param classes: one for each row; none at all by default.
    """
    cells = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        f'<tr class="{classes[index] if classes else ""}">'
        + "".join(f"<td>{cell}</td>" for cell in row)
        + "</tr>"
        for index, row in enumerate(rows)
    )
    return f'<table class="{name}"><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>'


def number(value: float | None) -> str:
    """Return a number with four digits."""
    return ABSENT if value is None else f"{value:.4g}"
