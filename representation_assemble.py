"""The console script `assemble`: first checks that no other package hides one of this suite with the same name."""

import sys
from importlib.util import find_spec
from pathlib import Path


def main() -> int:
    for name in ("assemble", "common", "papers"):
        package = Path(__file__).resolve().parent / name
        spec = find_spec(name)
        places = [spec.origin, *(spec.submodule_search_locations or ())] if spec else []
        found = next((Path(place).resolve() for place in places if place), None)
        if found != package / "__init__.py":
            print(
                f"assemble: `import {name}` finds {found}, and this suite needs its own {package}: rename that file or "
                "folder, or leave its parent out of PYTHONPATH",
                file=sys.stderr,
            )
            return 2
    from assemble.commands.main import main as command

    return command()
