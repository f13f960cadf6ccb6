"""Bringing other layouts of data into a folder that `common.data.datasets.folder` reads.

Two are known: a data set of Hugging Face's `datasets` on disk (`save_to_disk`), and tar shards in WebDataset's
convention, where the files of a sample share a name. Media files are copied as they are, not decoded; the list is
written last, so a folder without one is not complete.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from common.data.datasets.base import AUDIO_SUFFIXES, IMAGE_SUFFIXES, VIDEO_SUFFIXES
from common.data.datasets.folder import LISTS, SPLIT_OF
from common.errors import StageError
from common.files import named, write_atomically

#: What stands for the package that reads Hugging Face's data sets.
EXTRA = "datasets"
#: Columns of a sample that a list takes over.
_TEXTS = ("caption", "text", "tags", "label", "split")
_KINDS = (("video", VIDEO_SUFFIXES), ("image", IMAGE_SUFFIXES), ("audio", AUDIO_SUFFIXES))


def import_data(source: Path, folder: Path) -> tuple[int, list[str]]:
    """Write a data set as a folder with a list.

    Args:
        source: A folder that `save_to_disk` wrote, a tar shard, or a folder of shards.
        folder: What to write; it must not hold a list.

    Returns:
        Number of samples, and what was passed over.

    Raises:
        StageError: The source is neither, is damaged, or needs a package that is not installed.
    """
    if any((folder / name).exists() for name in LISTS):
        raise StageError(f"{folder} holds a list already: choose another folder, or delete it")
    if not source.exists():
        raise StageError(f"{source} does not exist")
    shards = sorted(source.glob("*.tar")) if source.is_dir() else [source] if source.suffix == ".tar" else []
    if shards:
        samples = _samples_of_shards(shards)
    elif (source / "dataset_dict.json").is_file() or (source / "dataset_info.json").is_file():
        samples = _samples_of_datasets(source)
    else:
        raise StageError(
            f"{source} is neither a folder of tar shards nor one that save_to_disk of Hugging Face's datasets wrote"
        )
    lines, passed_over = [], []
    for name, sample in samples:
        row = _written(name, sample, folder)
        if row is None:
            passed_over.append(name)
        else:
            line = json.dumps(row, ensure_ascii=False)
            # A name that is not UTF-8 stands there in escapes.
            lines.append(json.dumps(row) if any("\ud800" <= c <= "\udfff" for c in line) else line)
    if not lines:
        raise StageError(f"{source}: none of {len(passed_over)} samples holds a video, an image or a sound")
    write_atomically(folder / "metadata.jsonl", "\n".join(lines) + "\n")
    return len(lines), passed_over


def _written(name: str, sample: Mapping[str, Any], folder: Path) -> dict[str, Any] | None:
    """Copy the files of a sample; gives its line of the list, or None where it holds no media.

    Args:
        name: Of the sample, with forward slashes.
        sample: Bytes by suffix, and texts by column.
        folder: Where to write.
    """
    files = {suffix: content for suffix, content in sample.items() if isinstance(content, bytes)}
    found = {kind: next((own for own in files if own in suffixes), None) for kind, suffixes in _KINDS}
    main = next((suffix for suffix in found.values() if suffix is not None), None)
    if main is None:
        return None
    clean = PurePosixPath("files", *(part for part in PurePosixPath(name).parts if part not in ("/", "..", ".")))
    row: dict[str, Any] = {"file_name": _copied(folder, f"{clean}{main}", files[main])}
    if found["video"] is not None and found["audio"] is not None:
        row["sound"] = _copied(folder, f"{clean}{found['audio']}", files[found["audio"]])
    # A list of clips or sounds has no column for texts, and one of another split would be refused.
    of_image = found["video"] is None and found["image"] is not None
    for column, value in sample.items():
        if column == "label":
            row[column] = str(value)
        elif column == "split":
            row |= {column: value} if str(value).lower() in SPLIT_OF else {}
        elif of_image and (column in _TEXTS or column.startswith("caption_")):
            row[column] = value
    return row


def _copied(folder: Path, name: str, content: bytes) -> str:
    path = folder / name
    if not path.is_file() or path.stat().st_size != len(content) or path.read_bytes() != content:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.part")
        part.write_bytes(content)
        os.replace(part, path)
    return name


# ---------------------------------------------------------------------------------------------------- WebDataset
def _samples_of_shards(shards: list[Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    for shard in shards:
        key, sample = "", dict[str, Any]()
        finished = set[str]()
        try:
            with named(shard), tarfile.open(shard) as archive:
                for member in archive:
                    folder, _, base = member.name.rpartition("/")
                    if not member.isfile() or base.startswith("."):  # hidden files, as of macOS, are of no sample
                        continue
                    own, _, suffix = base.partition(".")
                    own = f"{folder}/{own}" if folder else own
                    if own != key:
                        if key:
                            yield f"{shard.stem}/{key}", sample
                            sample = {}
                        finished.add(key)
                        key = own
                    if key in finished:
                        raise StageError(
                            f"{shard}: the files of sample {key!r} do not lie together: write the shard anew with its "
                            "files sorted by name"
                        )
                    stream = archive.extractfile(member)
                    assert stream is not None
                    _add(sample, suffix.lower(), stream.read(), f"{shard}: {member.name}")
                # tarfile takes a cut or damaged header for the end; a writer ends an archive with two blocks of zeros.
                end = bytes(2 * tarfile.BLOCKSIZE)
                assert archive.fileobj is not None
                archive.fileobj.seek(archive.offset)
                if archive.fileobj.read(len(end)) != end:
                    raise tarfile.ReadError("it ends too early")
        except (tarfile.TarError, EOFError, OSError) as error:
            raise StageError(f"{shard} is damaged: {error}; get it anew") from None
        if key:
            yield f"{shard.stem}/{key}", sample


def _add(sample: dict[str, Any], suffix: str, content: bytes, where: str) -> None:
    """Add a file of a sample: media as they are, texts as columns of a list."""
    if f".{suffix}" in VIDEO_SUFFIXES | IMAGE_SUFFIXES | AUDIO_SUFFIXES:
        sample[f".{suffix}"] = content
        return
    try:
        if suffix in ("txt", "caption", "text"):
            sample["caption"] = content.decode("utf-8-sig").strip()
        elif suffix in ("cls", "label"):
            sample["label"] = content.decode("utf-8-sig").strip()
        elif suffix == "json":
            facts = json.loads(content)
            if not isinstance(facts, dict):
                raise ValueError("no JSON object")
            sample |= {
                column: value
                for column, value in facts.items()
                if value is not None and (column in _TEXTS or column.startswith("caption_"))
            }
    except ValueError as error:
        raise StageError(f"{where}: {error}") from None


# ---------------------------------------------------------------------------------------------------- datasets
def _samples_of_datasets(source: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import datasets
    except ImportError:
        raise StageError(
            f"{source} is a data set of Hugging Face's datasets, which is not installed: "
            f"`make extra-{EXTRA}` in a checkout, else pip install 'representation-assemble[{EXTRA}]'"
        ) from None
    loaded = datasets.load_from_disk(str(source))
    parts = dict(loaded) if isinstance(loaded, dict) else {"": loaded}
    foreign = [name for name in parts if name and name.lower() not in SPLIT_OF]
    if foreign and len(foreign) < len(parts):
        raise StageError(
            f"{source}: the split {foreign[0]!r} is none of {', '.join(SPLIT_OF)}, as others are: rename it, or save "
            "the data set without it"
        )
    known = [
        value is not None and value >= 0
        for part in parts.values()
        for column in _classes(source, part)
        for value in part[column]
    ]
    if any(known) and not all(known):
        raise StageError(
            f"{source}: {known.count(False)} of {len(known)} rows have no class (-1), where others have one: save the "
            "data set without these rows or splits, or without the column"
        )
    for split, part in parts.items():
        media = {}
        for column, feature in part.features.items():
            kind = type(feature).__name__.lower()
            if kind in dict(_KINDS):
                media[column] = kind
                part = part.cast_column(column, type(feature)(decode=False))
        classes = _classes(source, part)
        for number, row in enumerate(part):
            sample: dict[str, Any] = {"split": split} if split.lower() in SPLIT_OF else {}
            for column, value in row.items():
                if value is None:
                    continue
                if column in media:
                    name, content = _file_of(value, media[column], source)
                    sample.setdefault(os.path.splitext(name)[1].lower(), content)
                elif column in classes:
                    sample |= {"label": classes[column].int2str(value)} if value >= 0 else {}
                elif column in _TEXTS or column.startswith("caption_"):
                    sample[column] = value
            yield f"{split or 'all'}/{number:07d}", sample


def _classes(source: Path, part: Any) -> dict[str, Any]:
    """The column of a split that holds classes, with its names; none or one."""
    found = {name: feature for name, feature in part.features.items() if type(feature).__name__ == "ClassLabel"}
    if len(found) > 1 and "label" not in found:
        raise StageError(f"{source}: the columns {', '.join(found)} all hold classes: rename the one to use to 'label'")
    return {"label": found["label"]} if "label" in found else found


def _file_of(value: Mapping[str, Any], kind: str, source: Path) -> tuple[str, bytes]:
    """Name, with a suffix that tells the format, and content of a file in a column."""
    path, content = value.get("path") or "", value.get("bytes")
    if content is None:
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise StageError(f"{source}: {path} cannot be read: {error.strerror}") from None
    if os.path.splitext(path)[1].lower() in dict(_KINDS)[kind]:
        return path, content
    for start, suffix in _SIGNATURES.items():
        if content.startswith(start) and os.path.splitext(suffix)[1] in dict(_KINDS)[kind]:
            return suffix, content
    return {"image": "x.png", "audio": "x.wav", "video": "x.mp4"}[kind], content


_SIGNATURES = {b"\xff\xd8": "x.jpg", b"\x89PNG": "x.png", b"RIFF": "x.wav", b"fLaC": "x.flac", b"OggS": "x.ogg"}
