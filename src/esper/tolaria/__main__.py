"""``python -m esper.tolaria``: the engine alone, which is what ``esper train`` starts."""

import os
import sys


def main() -> None:
    """Hand over to ``esper train`` with the same arguments."""
    # The engine lies below the command line and must not import it; a new program may.
    os.execv(sys.executable, [sys.executable, "-m", "esper", "train", *sys.argv[1:]])


if __name__ == "__main__":
    main()
