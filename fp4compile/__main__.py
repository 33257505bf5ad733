"""`python -m fp4compile`."""

import sys

from fp4compile.cli import main

sys.exit(main())
