"""Lock a stage's folder, and manage which run it holds.

`runs/<paper>/<scale>/seed<k>/<stage>/` (`seed<k>-<isa>` with another rounding) holds `identity.json` (which run it is),
`config.yaml` (resolved), `checkpoints/last.ckpt`, `metrics.csv`, `media/`, `wandb/` and, when finished, `record.json`.
Earlier runs of other configurations, code or parents are next to it, in `<stage>.previous-<time>`.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime

from assemble.reporting import code
from assemble.reporting.records import SET_ASIDE
from assemble.stages.launch import is_main_process
from assemble.stages.request import StageRequest, fingerprint, finished_record, holds, identity_of, trained_again
from common.errors import StageError
from common.files import cache_folder, digest, lock, make_folder, sweep, write_atomically

#: Seconds to wait for a stage's lock.
LOCK_PATIENCE = 30.0


@contextmanager
def claimed(request: StageRequest) -> Iterator[None]:
    """Lock the stage's folder, so that a second command can't run the same stage."""
    if not is_main_process():
        yield
        return
    path = request.directory.with_name(f".{request.stage}.lock")
    try:
        make_folder(path.parent)
        opened = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise StageError(
            f"{request.stage} cannot write into {path.parent}: {error.strerror}; give another folder with --runs"
        ) from None
    with opened as file:
        # Loader processes of a killed run hold the lock for a second, or for longer on a busy machine.
        waited, held = 0.0, None
        while held is None:
            try:
                held = lock(file, wait=False)
            except BlockingIOError:
                if waited >= LOCK_PATIENCE:
                    raise StageError(
                        f"{request.stage} ({request.draw}) is already running in another process, which locks {path}; "
                        "wait for it, or stop it"
                    ) from None
                time.sleep(1)
                waited += 1
                if waited == 2:
                    print(f"  {request.stage}: waits for another process, which locks {path}", flush=True)
        if not held:
            print(f"  {request.stage}: {path.parent} does not support locks: don't run this stage twice at once")
        yield


def prepare_folder(request: StageRequest, unless_done: bool = False) -> None:
    """Move a different run out of the stage's folder, and write `identity.json`."""
    if not is_main_process():
        _wait_for_main_process(request)
        return
    folder = request.directory
    if not identity_of(folder) and (folder / "identity.json").exists():
        raise StageError(
            f"{folder / 'identity.json'} cannot be read, so it is unknown which run {folder} holds: restore the file "
            "to resume, or move the folder away to start again"
        )
    if not holds(folder, request) and (moved := _make_room(request)):
        print(f"  {request.stage}: {moved}")
    if unless_done and finished_record(request) is not None:
        return
    make_folder(folder)
    for swept in (folder, folder / "checkpoints", cache_folder(), *cache_folder().glob("*/")):
        sweep(swept)
    _write_identity(request)


def _make_room(request: StageRequest) -> str:
    """Move a different run out of the stage's folder, restore an earlier run of this stage, and return what to print.

    The different run moves to `<stage>.previous-<time>`, and nothing overwrites it. Without a checkpoint, delete it.
    """
    folder, identity = request.directory, identity_of(request.directory)
    aside = folder.with_name(f"{folder.name}{SET_ASIDE}-{datetime.now():%Y%m%d-%H%M%S-%f}")
    reason, moved = "the configuration changed", f"the earlier run is now in {aside}"
    if identity.get("lineage_hash") == request.lineage:
        parent = trained_again(request, identity["digests"])
        reason = f"{parent} was trained again" if parent else "the code changed"
    saved = request.checkpoint().is_file() or (folder / "record.json").is_file()
    if not saved and (identity or not any(folder.glob("[!.]*"))):
        shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        folder.rename(aside)
    else:
        moved = ""
    for earlier in sorted(folder.parent.glob(f"{folder.name}{SET_ASIDE}*"), reverse=True):
        if holds(earlier, replace(request, rerun=True)):
            earlier.rename(folder)
            moved = moved.replace("earlier", "other")
            return "; ".join(filter(None, (f"{reason.replace('changed', 'was reverted')}: its run is restored", moved)))
    return f"{reason}: {moved}" if moved else ""


def _write_identity(request: StageRequest) -> None:
    sources = fingerprint(request.configuration)
    if request.checkpoint().is_file():
        earlier = identity_of(request.directory).get("code", {})
        if changed := code.differing(earlier, sources):
            changes = code.changed_text(changed)
            print(f"  {request.stage}: continues a run that other code began: {changes}", file=sys.stderr)
        sources = code.joined(earlier, sources)
    identity = {
        "lineage_hash": request.lineage,
        "code": sources,
        "digests": {name: _digest_of(name, request) for name in request.parents if request.start(name) is not None},
        "stack": request.configuration.describe(),
        "arguments": list(request.arguments),
    }
    write_atomically(request.directory / "identity.json", json.dumps(identity, indent=1, sort_keys=True) + "\n")


def _digest_of(field: str, child: StageRequest) -> str:
    """Return the digest of the parent's checkpoint for a field. Refuse a digest that the parent's record lacks."""
    parent, path = child.parents[field], child.start(field)
    assert path is not None
    record = finished_record(parent)
    content = digest(path, "sha256")
    if record is not None and not record.saved(content):
        raise StageError(
            f"{child.stage} starts from {path}, which was replaced after {parent.stage} finished: restore the file, or "
            f"delete {parent.directory} to train {parent.stage} again"
        )
    return content


def _wait_for_main_process(request: StageRequest) -> None:
    """Wait until rank 0 has prepared the folder, since `srun` starts all ranks at once."""
    deadline = time.monotonic() + 1800  # rank 0 may be checking a user's files
    while not holds(request.directory, request):
        if time.monotonic() > deadline:
            raise StageError(f"{request.stage}: rank 0 did not prepare {request.directory} within half an hour")
        time.sleep(0.1)
