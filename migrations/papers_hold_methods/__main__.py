"""Rewrite records of before the move: `python -m migrations.papers_hold_methods [FOLDER ...]`.

Without folders, the published records of all papers. A record that was rewritten already is left as it is.
"""

from __future__ import annotations

import json
import sys
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from common.files import write_atomically
from common.reporting.papers import existing_papers
from common.reporting.records import config_hash, lineage_hash
from common.stages.configuration import resolve
from migrations.papers_hold_methods import NAME, migrate


def migrated(records: dict[Path, dict[str, Any]]) -> dict[Path, dict[str, Any]]:
    """The records of one folder with the configurations, hashes and parents of the new code.

    Args:
        records: path of the file to its content.
    """
    new_lineage: dict[tuple[str, str, int, str], str] = {}
    done: dict[Path, dict[str, Any]] = {}
    left = {path: record for path, record in records.items() if not record.get("former")}
    while left:
        ready = {path: record for path, record in left.items() if _known(record, left, new_lineage)}
        if not ready:
            raise ValueError(f"{next(iter(left))}: its parents are not among the records of its folder")
        for path, record in ready.items():
            new = _new(record, new_lineage)
            new_lineage[_key(record, record["stage"], record["lineage_hash"])] = new["lineage_hash"]
            done[path] = new
            del left[path]
    return done


def _key(record: dict[str, Any], stage: str, lineage: str) -> tuple[str, str, int, str]:
    return record["paper"], stage, record["seed"], lineage


def _known(record: dict[str, Any], left: dict[Path, dict[str, Any]], new: dict[Any, str]) -> bool:
    return all(_key(record, p["stage"], p["lineage_hash"]) in new for p in record["parents"].values())


def _new(record: dict[str, Any], new_lineage: dict[Any, str]) -> dict[str, Any]:
    config = migrate(record["paper"], record["config"])
    parents = {
        field: {**parent, "lineage_hash": new_lineage[_key(record, parent["stage"], parent["lineage_hash"])]}
        for field, parent in record["parents"].items()
    }
    own_hash = config_hash(config)
    recipe = resolve(record["paper"], record["recipe"], scale=record["scale"])
    # Not the last checkpoint of its parents, for some recipes: then the name of that checkpoint counts, too.
    suffix = "" if recipe.start_from == "last" else f"/{recipe.start_from}"
    # A deviation is known by its reason, up to its spelling; the field that it speaks of may have moved.
    stated = {d["reason"]: d for d in recipe.deviations}
    close = {d["reason"]: get_close_matches(d["reason"], stated, n=1, cutoff=0.9) for d in record["deviations"]}
    lineages = {field: parent["lineage_hash"] + suffix for field, parent in parents.items()}
    return {
        **record,
        "config": config,
        "config_hash": own_hash,
        "deviations": [dict(stated[close[d["reason"]][0]]) if close[d["reason"]] else d for d in record["deviations"]],
        "parents": parents,
        "former": [
            {"config_hash": record["config_hash"], "lineage_hash": record["lineage_hash"], "migration": NAME},
        ],
        "lineage_hash": lineage_hash(own_hash, lineages),
    }


def main(folders: list[Path]) -> int:
    """Rewrite the records below some folders; each folder must hold the parents of its records."""
    rewritten = 0
    for folder in folders or [paper.results for paper in existing_papers()]:
        found = {path: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob("*.json"))}
        records = {path: content for path, content in found.items() if _is_record(content)}
        for path, record in migrated(records).items():
            write_atomically(path, json.dumps(record, sort_keys=True, indent=2, ensure_ascii=False) + "\n")
            rewritten += 1
    print(f"{rewritten} records rewritten")
    return 0


def _is_record(content: Any) -> bool:
    return isinstance(content, dict) and {"paper", "stage", "recipe", "config_hash", "lineage_hash"} <= content.keys()


if __name__ == "__main__":
    sys.exit(main([Path(folder) for folder in sys.argv[1:]]))
