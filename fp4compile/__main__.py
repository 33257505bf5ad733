"""`python -m fp4compile`."""

import sys

from fp4compile.cli import main

if __name__ == "__main__":  # a process that bench starts imports this module under another name
    sys.exit(main())
