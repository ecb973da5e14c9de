"""Write ``docs/complexity.md``, or check that it is up to date and that nothing is above 10."""

import sys
from collections import defaultdict
from pathlib import Path

from radon.complexity import cc_visit

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "esper"
TARGET = ROOT / "docs" / "complexity.md"
LIMIT = 10
LISTED = 20

Block = tuple[int, str, str]


def main() -> int:
    """Write the report, or with ``--check`` compare it; return 1 on an offence."""
    blocks = measure()
    text = render(blocks)
    too_complex = [block for block in blocks if block[0] > LIMIT]
    for complexity, file, name in too_complex:
        print(f"{file}: {name} has complexity {complexity}, at most {LIMIT}")
    if "--check" not in sys.argv:
        TARGET.write_text(text, encoding="utf-8")
    elif not TARGET.is_file() or TARGET.read_text(encoding="utf-8") != text:
        print("docs/complexity.md is out of date; run: python scripts/complexity_report.py")
        return 1
    return 1 if too_complex else 0


def measure() -> list[Block]:
    """Return complexity, file and name of every function and method."""
    blocks: list[Block] = []
    for path in sorted(SOURCE.rglob("*.py")):
        name = path.relative_to(SOURCE).as_posix()
        visited = cc_visit(path.read_text(encoding="utf-8"))
        blocks += [(b.complexity, name, b.fullname) for b in visited if b.letter != "C"]
    return sorted(set(blocks), key=lambda block: (-block[0], block[1], block[2]))


def render(blocks: list[Block]) -> str:
    """Return the report."""
    packages: dict[str, list[int]] = defaultdict(list)
    for complexity, file, _ in blocks:
        packages[file.split("/")[0] if "/" in file else "(root)"].append(complexity)
    lines = [
        "# Complexity",
        "",
        "Cyclomatic complexity of every function, written by `scripts/complexity_report.py`.",
        f"The limit is {LIMIT}.",
        "",
        "| package | functions | mean | highest |",
        "|---|---:|---:|---:|",
    ]
    lines += [
        f"| {name} | {len(values)} | {sum(values) / len(values):.1f} | {max(values)} |"
        for name, values in sorted(packages.items())
    ]
    lines += [
        "",
        f"The {LISTED} most complex:",
        "",
        "| complexity | function | file |",
        "|---:|---|---|",
    ]
    lines += [f"| {cc} | `{name}` | `{file}` |" for cc, file, name in blocks[:LISTED]]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
