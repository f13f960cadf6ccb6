"""Find the code behind a record: the source files that a stage's classes import. This doesn't run any import.

A record stores two hashes per file, `code:text`. The first is of the syntax tree without docstrings. The second is of
the text, which is faster to compare. Comments, blank lines and formatting change only the second hash.
"""

from __future__ import annotations

import ast
import functools
import gc
import hashlib
import importlib.util
import itertools
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.files import stamp_of

if TYPE_CHECKING:
    from assemble.reporting.draws import Draw
    from assemble.reporting.records import Record

#: Parts of `common` that compute numbers. The other parts read files, export models and draw pictures.
COUNTED = ("data", "encoders", "losses", "memory", "metrics", "protocols", "training")


def fingerprint(modules: Iterable[str]) -> dict[str, str]:
    """Return the hashes of the files of these modules and of all modules that they import."""
    waiting, seen, files = set(modules), set[str](), dict[str, str]()
    while waiting:
        seen.add(module := waiting.pop())
        if _counts(module) and (source := _loaded(module)):
            files[source[0]] = source[1]
            waiting |= source[2] - seen
    return dict(sorted(files.items()))


def differing(left: Mapping[str, str], right: Mapping[str, str]) -> list[str]:
    """List the files whose code differs between two fingerprints. The list is empty if a fingerprint is unknown."""
    if not left or not right:
        return []
    return [name for name in sorted({*left, *right}) if _code(left.get(name)) != _code(right.get(name))]


def _code(hashes: str | None) -> str | None:
    return hashes and hashes.partition(":")[0]


def nearest(files: Mapping[str, str], others: Iterable[Mapping[str, str]]) -> list[str]:
    """List the files in which a fingerprint differs from the most similar one in `others`."""
    return min([differing(files, candidate) for candidate in others], key=len, default=[])


def changed(files: Mapping[str, str]) -> list[str]:
    """List the files of a fingerprint whose code has changed. Another project's missing file counts as unchanged."""
    return differing(files, {name: _now(name, hashes) for name, hashes in files.items()})


def joined(earlier: Mapping[str, str], now: Mapping[str, str]) -> dict[str, str]:
    """Join the fingerprints of the code that began a training and of the code that continues it.

    A file that changed gets both hashes, so the result equals neither fingerprint. If a fingerprint is unknown, so is
    the result.
    """
    if not earlier:
        return {}
    both = {name: f"{earlier.get(name, '')}+{now.get(name, '')}" for name in differing(earlier, now)}
    return {**now, **{name: hashes.replace(":", "/") for name, hashes in both.items()}}


def changed_text(files: Sequence[str]) -> str:
    """Return `papers/avid_cma/loss.py changed`, with up to three names."""
    more = f" and {len(files) - 3} more" if len(files) > 3 else ""
    return f"{', '.join(files[:3])}{more} changed"


def sentence(changes: Iterable[Collection[str]]) -> str:
    """Return `3 stages were trained by other code: papers/avid_cma/loss.py changed` from each stage's changed files."""
    stale = [files for files in changes if files]
    names = sorted({name for files in stale for name in files})
    were = "stage was" if len(stale) == 1 else "stages were"
    return f"{len(stale)} {were} trained by other code: {changed_text(names)}" if stale else ""


def other_code(records: Iterable[Record]) -> str:
    """Return the `sentence` for records. A stage counts if other code trained it or a stage that it starts from."""
    changes: dict[tuple[str, Draw, str], set[str]] = {}
    for record in sorted(records, key=lambda record: record.started):
        parents = [changes.get((record.scale, record.draw, parent["stage"]), ()) for parent in record.parents.values()]
        changes[record.scale, record.draw, record.stage] = {*changed(record.code), *itertools.chain(*parents)}
    return sentence(changes.values())


def against(mine: Iterable[Record], recorded: Collection[Record]) -> str:
    """Say in one line how the code of `mine` differs from the code of the recorded runs of the same stages."""
    files, unknown = set[str](), False
    for record in mine:
        hashes = [peer.code for peer in recorded if peer.stage == record.stage and peer.code]
        unknown |= not (record.code and hashes)
        files.update(nearest(record.code, hashes))
    if files:
        return f"code: {changed_text(sorted(files))} since the recorded runs"
    return "code: unknown, since older records don't state it" if unknown else "code: the same as in the recorded runs"


@functools.cache
def source_file(module: str) -> Path | None:
    """Return the file of a module. Unlike `find_spec`, this doesn't import the parent package."""
    top, *parts = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):  # A module without a spec, such as `__main__`.
        return None
    if spec is None or not spec.submodule_search_locations:
        return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") and not parts else None
    path = Path(spec.submodule_search_locations[0], *parts)
    return next((file for file in (path / "__init__.py", path.with_suffix(".py")) if file.is_file()), None)


def parse(source: str | bytes) -> ast.Module:
    # Python 3.11 miscounts its depth when the garbage collector runs finalizers while it builds a tree.
    enabled = gc.isenabled()
    gc.disable()
    try:
        return ast.parse(source)
    finally:
        if enabled:
            gc.enable()


def _counts(module: str) -> bool:
    """Check whether a fingerprint includes a module: papers, the library and users' modules, not installed packages."""
    top, _, rest = module.partition(".")
    if top == "papers":
        return not module.endswith(".monitoring")
    if top == "common":
        return rest.partition(".")[0] in COUNTED
    file = None if top in (*sys.stdlib_module_names, "assemble") else source_file(module)
    return file is not None and {"site-packages", "dist-packages"}.isdisjoint(file.parts)


@functools.cache
def _loaded(module: str) -> tuple[str, str, frozenset[str]] | None:
    """Return the name, hashes and imports of a module's file, without edits made after this process imported it."""
    file = source_file(module)
    if file is None:
        return None
    ours = module.partition(".")[0] in ("common", "papers")
    path = module.replace(".", "/") + ("/__init__.py" if file.stem == "__init__" else ".py")
    package = module if file.stem == "__init__" else module.rpartition(".")[0]
    source = file.read_bytes()
    hashes = f"{_code_hash(source)}:{_hash(source)}"
    return path if ours else module, hashes, frozenset(_imports(parse(source), package))


def _imports(tree: ast.Module, package: str) -> Iterator[str]:
    """List the modules that a file imports, also inside functions or by name, but not under `TYPE_CHECKING`."""
    waiting: list[ast.AST] = [tree]
    tops = ("common.", "papers.", f"{package.partition('.')[0]}.")
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: 1 - node.level or None] if node.level else []
            base = ".".join([*parents, *filter(None, [node.module])])
            for alias in node.names:  # `from package import module` and `from module import name` look the same.
                whole = f"{base}.{alias.name}"
                yield whole if source_file(whole) else base
        elif isinstance(node, ast.Constant):  # `import_module("mine.helper")`, or a class path in a registry
            text = str(node.value)
            names = (text, text.rpartition(".")[0]) if text.startswith(tops) else ()
            yield from (name for name in names if (file := source_file(name)) and file.stem != "__init__")
        else:
            waiting += ast.iter_child_nodes(node)


def _now(name: str, recorded: str) -> str:
    """Return the current hashes of a file. If its text is unchanged, return the recorded hashes."""
    file = source_file(name.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
    if file is None:
        return "" if name.endswith(".py") else recorded
    return _hashes_now(file, tuple(stamp_of(file)), recorded)


@functools.lru_cache(maxsize=4096)
def _hashes_now(file: Path, stamp: tuple[int, ...], recorded: str) -> str:
    source = file.read_bytes()
    try:
        return recorded if recorded.endswith(f":{_hash(source)}") else _code_hash(source)
    except (SyntaxError, ValueError):  # The file is being edited.
        return ""


def _code_hash(source: bytes) -> str:
    parts: list[str] = []
    _write_tree(parse(source), parts)
    return _hash(" ".join(parts).encode())


def _write_tree(node: Any, parts: list[str]) -> None:
    """Write a syntax tree as text without docstrings. Unlike `ast.dump`, give the same text in all Python versions."""
    if isinstance(node, ast.AST):
        parts.append(f"({type(node).__name__}")
        for name, value in ast.iter_fields(node):
            if value is not None and value != [] and name not in ("ctx", "kind"):
                parts.append(name)
                _write_tree(value, parts)
        parts.append(")")
    elif isinstance(node, list):
        for item in node:
            if not (isinstance(item, ast.Expr) and isinstance(getattr(item.value, "value", None), str)):
                _write_tree(item, parts)
    else:
        parts.append(repr(node))


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:8]
