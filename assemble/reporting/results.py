"""Read and write a paper's committed results: a file of records per scale and draw, shared parts, and curves.

`results/<scale>/<draw>.json` has every stage of a draw, and `released.json` all draws of the stages that start from the
authors' weights. Sections of configurations and other parts that records share are replaced by keys of
`results/shared.json` (hashes of the content). `results/curves.csv.gz` has a row per curve.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

from assemble.reporting.curves import Curves, read_table, table_of
from assemble.reporting.papers import SCALES, Paper, paper_named
from assemble.reporting.records import GIVEN, Record, RecordError, in_order
from assemble.reporting.schema import parse_json
from common.files import parsing, read_bytes, sweep, write_atomically

#: Fields that all records of a file share.
HEAD = ("paper", "scale", "seed", "schema")
#: Fields stored in `shared.json`, like sections of the configuration, and the hardware without its peak memory.
SHARED = ("code", "data", "deviations", "git", "ours", "versions")
PEAK = "peak_memory_gib"
SHARED_FILE, CURVES_FILE = "shared.json", "curves.csv.gz"

#: Identifies a run of a paper: scale, name of the draw, stage.
Place = tuple[str, str, str]
Shared = dict[str, dict[str, Any]]


def draw_file(paper: Paper, record: Record) -> Path:
    return paper.results / record.scale / ("released.json" if record.given else f"{record.draw.folder}.json")


def place_of(record: Record) -> Place:
    return record.scale, f"{record.draw.folder}{GIVEN if record.given else ''}", record.stage


def find_promoted(paper: str, scale: str | None = None) -> list[Record]:
    """List every promoted record of a paper, ordered by scale, draw and stage."""
    entry = paper_named(paper)
    shared = _read_shared(entry)
    folders = [scale] if scale else SCALES
    # The pattern skips temporary files of killed writers, whose names begin with a dot.
    patterns = [f"{folder}/{name}.json" for folder in folders for name in ("seed*", "released")]
    paths = [path for pattern in patterns for path in sorted(entry.results.glob(pattern))]
    return in_order(record for path in paths for record in _records(entry, path, shared))


def promoted_curves(paper: Paper) -> dict[Place, Curves]:
    return read_table(paper.results / CURVES_FILE)


def write_results(paper: Paper, records: Iterable[Record], curves: Mapping[Place, Curves]) -> None:
    """Write all results of a paper. If writing is interrupted, the results stay readable."""
    shared: Shared = {}
    draws: dict[Path, dict[str, Any]] = {}
    kept: dict[Place, Curves] = {}
    for record in in_order(records):
        values = asdict(record)
        draw = draws.setdefault(draw_file(paper, record), {})
        if record.given:
            draw = draw.setdefault(record.draw.folder, {})
        draw |= {name: values[name] for name in HEAD}
        draw.setdefault("stages", {})[record.stage] = _packed(values, shared)
        if place_of(record) in curves:
            kept[place_of(record)] = curves[place_of(record)]
    before = _read_shared(paper)
    both = {name: {**before.get(name, {}), **shared.get(name, {})} for name in {*before, *shared}}
    for folder in {paper.results, *(path.parent for path in draws)}:
        sweep(folder)
    _update(paper.results / SHARED_FILE, _json(both))
    _update(paper.results / CURVES_FILE, table_of(kept))
    for path, draw in draws.items():
        _update(path, _json(draw))
    _update(paper.results / SHARED_FILE, _json(shared))


def _update(path: Path, content: bytes) -> None:
    if not path.is_file() or path.read_bytes() != content:
        write_atomically(path, content)


def _json(content: Any) -> bytes:
    return (json.dumps(content, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _read_shared(paper: Paper) -> Shared:
    path = paper.results / SHARED_FILE
    with parsing(path, RecordError):
        return {name: dict(held) for name, held in parse_json(read_bytes(path)).items()} if path.exists() else {}


def _packed(values: dict[str, Any], shared: Shared) -> dict[str, Any]:
    """Replace the parts that a record may share with others by keys of `shared`."""

    def refer(field: str, content: Any) -> str:
        canonical = json.dumps(content, sort_keys=True)
        key = hashlib.sha256(canonical.encode()).hexdigest()[:12]
        shared.setdefault(field, {})[key] = content
        return key

    optional = {field.name for field in fields(Record) if field.default is None or field.default_factory is not MISSING}
    packed = {
        name: value
        for name, value in values.items()
        if name not in (*HEAD, "stage") and (value or name not in optional)
    }
    for name in SHARED:
        if name in packed:
            packed[name] = refer(name, packed[name])
    if "hardware" in packed:
        machine = {name: value for name, value in packed["hardware"].items() if name != PEAK}
        peak = {PEAK: packed["hardware"][PEAK]} if PEAK in packed["hardware"] else {}
        packed["hardware"] = {"machine": refer("hardware", machine), **peak}
    packed["config"] = {
        name: value if isinstance(value, int | float | None) else refer("config", value)
        for name, value in packed["config"].items()
    }
    return packed


def _records(paper: Paper, path: Path, shared: Shared) -> list[Record]:
    with parsing(path, RecordError):
        content = parse_json(read_bytes(path))
        draws = {path.stem: content} if path.stem != "released" else content
        records = [
            Record.of({**{name: draw[name] for name in HEAD}, "stage": stage, **_unpacked(packed, shared)})
            for draw in draws.values()
            for stage, packed in draw["stages"].items()
        ]
        for record in records:
            if record.paper != paper.name or draw_file(paper, record) != path:
                raise ValueError(f"the record of {record.stage} is of another scale or draw; move or delete it")
    return records


def _unpacked(packed: dict[str, Any], shared: Shared) -> dict[str, Any]:
    values = dict(packed)
    for name in SHARED:
        if name in values:
            values[name] = shared[name][values[name]]
    if "hardware" in values:
        machine = values["hardware"].pop("machine")
        values["hardware"] = {**shared["hardware"][machine], **values["hardware"]}
    values["config"] = {
        name: shared["config"][value] if isinstance(value, str) else value for name, value in values["config"].items()
    }
    return values
