"""Run the command line as `python -m assemble`."""

import sys

from assemble.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
