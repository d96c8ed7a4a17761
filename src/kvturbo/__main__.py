"""`python -m kvturbo` is the `kvturbo` command."""

import sys

from kvturbo.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
