"""`python -m sparsekit` is `sparsekit`."""

import sys

from sparsekit.cli import main

if __name__ == "__main__":
    sys.exit(main())
