"""Write ``.env.example`` from the declared settings, or check that it is up to date."""

import sys
from pathlib import Path

from esper.core.settings import env_example

TARGET = Path(__file__).parent.parent / ".env.example"


def main() -> int:
    """Write the file; with ``--check``, only compare it."""
    text = env_example()
    if "--check" not in sys.argv:
        TARGET.write_text(text, encoding="utf-8")
        return 0
    if TARGET.is_file() and TARGET.read_text(encoding="utf-8") == text:
        return 0
    print(f"{TARGET.name} is out of date; run: python scripts/env_example.py")
    return 1


if __name__ == "__main__":
    sys.exit(main())
