"""Rewrite records whose configuration the code now states differently; what was measured stays."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from common.files import write_atomically
from common.reporting.records import config_hash, lineage_hash
from common.stages.configuration import resolve

Migrate = Callable[[str, dict[str, Any]], dict[str, Any]]


def migrated(records: dict[Path, dict[str, Any]], name: str, migrate: Migrate) -> dict[Path, dict[str, Any]]:
    """The records of one folder with the configurations, hashes and parents of the new code.

    Args:
        records: path of the file to its content.
        name: name of the migration; records that went through it are left out, and those that it does not change.
        migrate: (package of the paper, configuration) to the new configuration.

    Raises:
        ValueError: if a record's parents are not in the folder.
    """
    # Of a migration that was stopped, some parents have their new hashes already.
    new_lineage: dict[tuple[Any, ...], str] = {
        _key(record, record["stage"], old): new for record in records.values() for old, new in _changes(record, name)
    }
    done: dict[Path, dict[str, Any]] = {}
    left = {path: record for path, record in records.items() if not _went_through(record, name)}
    while left:
        ready = {path: record for path, record in left.items() if _known(record, new_lineage)}
        if not ready:
            raise ValueError(f"{next(iter(left))}: its parents are not among the records of its folder")
        for path, record in ready.items():
            new = _new(record, new_lineage, name, migrate)
            new_lineage[_key(record, record["stage"], record["lineage_hash"])] = new["lineage_hash"]
            if new["lineage_hash"] != record["lineage_hash"]:
                done[path] = new
            del left[path]
    return done


def rewrite(folder: Path, name: str, migrate: Migrate) -> int:
    """Rewrite the records below a folder, which must hold the parents of its records; returns how many."""
    found = {path: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob("*.json"))}
    records = {path: content for path, content in found.items() if _is_record(content)}
    new = migrated(records, name, migrate)
    for path, record in new.items():
        write_atomically(path, json.dumps(record, sort_keys=True, indent=2, ensure_ascii=False) + "\n")
    return len(new)


def _went_through(record: dict[str, Any], name: str) -> bool:
    return any(entry["migration"] == name for entry in record.get("former") or [])


def _changes(record: dict[str, Any], name: str) -> Iterator[tuple[str, str]]:
    """The lineage of a record before and after it went through a migration."""
    former = record.get("former") or []
    after = [*(entry["lineage_hash"] for entry in former[1:]), record["lineage_hash"]]
    return ((entry["lineage_hash"], new) for entry, new in zip(former, after) if entry["migration"] == name)


def _key(record: dict[str, Any], stage: str, lineage: str) -> tuple[Any, ...]:
    return record["paper"], stage, record["seed"], lineage


def _known(record: dict[str, Any], new: dict[tuple[Any, ...], str]) -> bool:
    return all(_key(record, p["stage"], p["lineage_hash"]) in new for p in record["parents"].values())


def _new(
    record: dict[str, Any], new_lineage: dict[tuple[Any, ...], str], name: str, migrate: Migrate
) -> dict[str, Any]:
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
    kept = [dict(stated[close[d["reason"]][0]]) if close[d["reason"]] else d for d in record["deviations"]]
    # What the scale declares by now of fields that the record has gained.
    kept += [dict(d) for d in recipe.deviations if d not in kept]
    lineages = {field: parent["lineage_hash"] + suffix for field, parent in parents.items()}
    former = {"config_hash": record["config_hash"], "lineage_hash": record["lineage_hash"], "migration": name}
    return {
        **record,
        "config": config,
        "config_hash": own_hash,
        "deviations": kept,
        "parents": parents,
        "former": [*(record.get("former") or []), former],
        "lineage_hash": lineage_hash(own_hash, lineages),
    }


def _is_record(content: Any) -> bool:
    return isinstance(content, dict) and {"paper", "stage", "recipe", "config_hash", "lineage_hash"} <= content.keys()
