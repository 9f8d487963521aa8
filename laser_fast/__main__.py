"""`python -m laser_fast ...` is the command `laser-fast ...`."""

import sys

from laser_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
