"""Rewrite records of before a change: `python -m migrations NAME [FOLDER ...]`, for a module `migrations/NAME.py`.

Without folders, the published records of all papers. A record that went through the migration is left as it is.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from common.reporting.papers import existing_papers
from migrations.rewrite import rewrite


def main(name: str, folders: list[Path]) -> int:
    migration = importlib.import_module(f"migrations.{name}")
    folders = folders or [paper.results for paper in existing_papers()]
    print(f"{sum(rewrite(folder, name, migration.migrate) for folder in folders)} records rewritten")
    return 0


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1], [Path(folder) for folder in sys.argv[2:]]))
