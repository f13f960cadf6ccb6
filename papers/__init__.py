"""The papers, with one package per paper."""

from pathlib import Path

import common

# A script's own folder comes first in Python's path: a `common` there would take the place of ours.
_place = Path(__file__).resolve().parents[1] / "common"
_found = Path(common.__file__ or common.__path__[0]).resolve()
if _found != _place / "__init__.py":
    raise ImportError(
        f"`import common` finds {_found}, and this suite needs its own {_place}: rename that file or folder, or start "
        "Python from another one"
    )
