"""``python -m patchfastrl``: the same as the command `patchfastrl`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
