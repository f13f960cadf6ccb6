"""Test properties of every world: which parameters change which files, and that each file is rendered once."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass
from functools import partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.data.worlds.audiovisual import AudioVisualWorld
from common.data.worlds.base import World, Write
from common.data.worlds.clip_generator import ClipGenerator
from common.data.worlds.emoji import EmojiWorld
from common.data.worlds.emoji_languages import EmojiLanguagesWorld
from common.data.worlds.emoji_scenes import EmojiScenesWorld
from common.data.worlds.narrated import SOURCE, NarratedWorld, Scene, render_frames
from common.data.worlds.shapes import ShapesWorld
from common.data.worlds.two_objects import TwoObjectsWorld
from tests.data.worlds import TINY, digest, media, small, tiny
from tests.machine import LONG

Rendered = Callable[[type[World]], Any]


@dataclass(frozen=True)
class Contract:
    """How the common tests treat a world.

    Args:
        kind: class of the world.
        again: data sets that are rendered a second time.
        more: larger numbers of clips or pictures; none if each picture's use depends on the total number.
        held: prefix of the media files in `again` that are the same for all seeds; None if names don't show it.
    """

    kind: type[World]
    again: tuple[str, ...]
    more: dict[str, Any]
    held: tuple[str, ...] | None

    def __str__(self) -> str:
        return self.kind.kind


CONTRACTS = [
    Contract(AudioVisualWorld, ("kinetics400", "esc50", "hmdb51"), {"pretrain": 56}, held=()),
    Contract(EmojiWorld, ("coco",), {"concepts": 80}, held=("val2017/",)),
    Contract(EmojiLanguagesWorld, (), {}, held=None),
    Contract(NarratedWorld, ("avsd",), {"dialogs": 14, "dialogs_validation": 4}, held=()),
    Contract(
        ShapesWorld,
        ("coco", "coco_karpathy", "imagenet"),
        {"train": 40, "karpathy_train": 30, "probe_test": 40},
        held=("val2017/", "val2014/", "val/"),
    ),
    Contract(EmojiScenesWorld, ("coco_2014",), {"train": 44}, held=("val2014/",)),
    Contract(TwoObjectsWorld, ("coco_2014",), {"train": 44}, held=("val2014/",)),
]


def worlds_where(holds: Callable[[Contract], Any]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("contract", [one for one in CONTRACTS if holds(one)], ids=str)


@pytest.mark.parametrize("kind", TINY)
def test_a_world_holds_what_it_held(kind: type[World], rendered: Rendered) -> None:
    rendered(kind)  # also compares the files with the golden values


@worlds_where(lambda contract: contract.held is not None)
def test_seeds_redraw_what_is_trained_on_and_nothing_else(
    contract: Contract, rendered: Rendered, tmp_path: Path
) -> None:
    world, other = rendered(contract.kind), tiny(contract.kind, tmp_path, seed=6)
    other.prepare(contract.again)
    for name in contract.again:
        mine, theirs = media(world.root_of(name)), media(other.root_of(name))
        held = {path for path in mine if path.startswith(contract.held or ())}
        assert {path: mine[path] for path in held} == {path: theirs[path] for path in held}
        assert not {mine[path] for path in mine.keys() - held} & set(theirs.values())


@worlds_where(lambda contract: contract.more)
def test_a_file_does_not_depend_on_how_many_there_are(contract: Contract, rendered: Rendered, tmp_path: Path) -> None:
    world, more = rendered(contract.kind), tiny(contract.kind, tmp_path, **contract.more)
    more.prepare(contract.again)
    grown = 0
    for name in contract.again:
        small, large = media(world.root_of(name)), media(more.root_of(name))
        assert small.items() <= large.items()
        grown += len(large) - len(small)
    assert grown > 0


@pytest.mark.parametrize("kind", TINY, ids=lambda kind: kind.kind)
def test_a_second_call_leaves_the_files_alone(
    kind: type[World], rendered: Rendered, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("rendered again")

    world = rendered(kind)
    monkeypatch.setattr(kind, "_render", never)
    world.prepare()
    # Other users who share the cache can read the folders.
    assert all(world.root_of(name).stat().st_mode & 0o055 == 0o055 for name in world.names)


@pytest.mark.parametrize("number", range(20))
def test_larger_frames_show_the_same(number: int) -> None:
    found = []
    for size in (24, 48):
        rng = np.random.default_rng(number)
        frames = render_frames(Scene.drawn(rng), SOURCE, size, 5, rng)
        found.append([small(frame) for frame in (*frames, *ClipGenerator(5, size).video(1, number, 1.0))])
    np.testing.assert_allclose(*found, rtol=0, atol=25)


# ---------------------------------------------------------------------------------------------------- one cache for all
class Dots(World):
    """Write two data sets of three files each. While `full` is set, writing fails because the disk is full."""

    kind, title, names, version = "dots", "world of dots", ("first", "second"), 1
    full = False

    def __init__(self, root: Path | None) -> None:
        super().__init__({}, None if root is None else str(root))

    def _fill_first(self, root: Path, write: Write, name: str = "first") -> None:
        assert root.match(f"{self.folder.name}/.rendering-*")  # later renamed, or removed by another process
        for number in range(3):
            write(root / "dots" / f"{number}.txt", lambda path=root / "dots" / f"{number}.txt": path.write_text(name))
            if self.full and number == 1:
                raise OSError("no space left on device")
        with (self.folder / "rendered.txt").open("a", encoding="utf-8") as log:
            log.write(f"{name}\n")

    _fill_second = partialmethod(_fill_first, name="second")


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    world = Dots(tmp_path)
    world.full = True
    with pytest.raises(OSError, match="no space"):
        world.prepare(["first"])
    assert not world.root_of("first").exists()
    assert not list(world.folder.glob(".rendering-*"))
    world.full = False
    world.prepare(["first"])
    assert len(digest(world.root_of("first"))) == 3
    assert not world.root_of("second").exists()
    half = world.folder / ".rendering-half"  # left by a process that was killed
    half.mkdir()
    (half / "part.txt").write_bytes(b"")
    (world.folder / ".rendering-stuck").touch()  # a file in place of a folder must not stop any process
    world.prepare(["second"])
    assert not half.exists()


def test_without_locks_no_process_removes_what_another_one_renders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.files.lock", lambda stream: False)

    class Slow(Dots):
        def _fill_first(self, root: Path, write: Write, name: str = "first") -> None:
            super()._fill_first(root, write)
            Dots(tmp_path).prepare()  # another process starts before this one renames the folder

    world = Slow(tmp_path)
    world.prepare(["first"])
    assert {name: len(digest(world.root_of(name))) for name in world.names} == {"first": 3, "second": 3}


def test_of_two_processes_at_once_one_renders(tmp_path: Path) -> None:
    world = Dots(tmp_path)
    processes = [multiprocessing.get_context("fork").Process(target=world.prepare) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(LONG)
        assert process.exitcode == 0
    assert (world.folder / "rendered.txt").read_text(encoding="utf-8").split() == ["first", "second"]
    assert {name: len(digest(world.root_of(name))) for name in world.names} == {"first": 3, "second": 3}
    assert not list(world.folder.glob(".rendering-*"))
