"""Keep files, functions, classes and parameter lists small.

Files may have 400 lines; below ``src``, functions 50 lines and 7 parameters, classes 250 lines.
Docstrings do not count towards functions, nor ``self`` towards parameters. A command of the command
line may have more parameters: they are its options.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("src", "tests", "benchmarks", "examples", "scripts")
FILE_LINES = 400
FUNCTION_LINES = 50
CLASS_LINES = 250
PARAMETERS = 7

Function = ast.FunctionDef | ast.AsyncFunctionDef


def main() -> int:
    """Print every offender; return 1 if there is one."""
    offenders = [
        f"{path.relative_to(ROOT)}{problem}"
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*.py"))
        for problem in problems(path.read_text(encoding="utf-8"), strict=folder == "src")
    ]
    print("\n".join(offenders) if offenders else "all sizes are within their limits")
    return 1 if offenders else 0


def problems(source: str, *, strict: bool) -> Iterator[str]:
    """Yield what is too large in one file.

    :param source: its text.
    :param strict: whether the limits below the file's own apply.
    """
    lines = source.count("\n")
    if lines > FILE_LINES:
        yield f": {lines} lines, at most {FILE_LINES}"
    if not strict:
        return
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, Function):
            yield from _function_problems(node)
        elif isinstance(node, ast.ClassDef):
            length = _length(node)
            if length > CLASS_LINES:
                yield f":{node.lineno} class {node.name}: {length} lines, at most {CLASS_LINES}"


def _function_problems(node: Function) -> Iterator[str]:
    length = body_lines(node)
    if length > FUNCTION_LINES:
        yield f":{node.lineno} {node.name}: {length} lines, at most {FUNCTION_LINES}"
    count = parameter_count(node)
    if count > PARAMETERS and not _is_command(node):
        yield f":{node.lineno} {node.name}: {count} parameters, at most {PARAMETERS}"


def body_lines(node: Function) -> int:
    """Return the lines of a function's body, without its docstring."""
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    return (node.end_lineno or node.lineno) - body[0].lineno + 1 if body else 0


def parameter_count(node: Function) -> int:
    """Return the number of parameters, without ``self`` or ``cls``."""
    arguments = node.args
    named = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return len(named) - (1 if named and named[0] in ("self", "cls") else 0)


def _is_command(node: Function) -> bool:
    return any(
        isinstance(decorator, ast.Call)
        and isinstance(decorator.func, ast.Attribute)
        and decorator.func.attr in ("command", "callback")
        for decorator in node.decorator_list
    )


def _length(node: ast.ClassDef) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


if __name__ == "__main__":
    sys.exit(main())
