"""`python -m assemble`: the command line."""

import sys

from assemble.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
