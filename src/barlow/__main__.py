"""`python -m barlow` runs the command `barlow`."""

import sys

from barlow.cli import main

if __name__ == "__main__":
    sys.exit(main())
