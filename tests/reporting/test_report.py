"""Test the text of the report page: what it contains, what it leaves out, and that it needs no other file or server."""

from __future__ import annotations

import base64
import csv
import dataclasses
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from assemble.reporting import media, report
from assemble.reporting.curves import importance, read_points, thinned
from assemble.reporting.papers import existing_papers, runs_root
from assemble.reporting.records import RECORD_FILE, write
from assemble.reporting.report import page
from assemble.reporting.results import find_promoted
from assemble.reporting.tables import load
from tests.reporting.conftest import Capsys, Saved

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
)
VOID = {"meta", "img", "link", "br", "input"}


class Page(HTMLParser):
    """Parse a page into references and elements, and check that the tags are balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []
        self.ids = [attributes["id"] for _, attributes in self.elements if "id" in attributes]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.elements.append((tag, values))
        self.sources += [v for k, v in values.items() if k in ("src", "href", "srcset", "poster", "action") and v]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


def written(*papers: str, scale: str | None = None, runs: Path | None = None) -> str:
    return page(papers or [paper.name for paper in existing_papers()], scale, runs or runs_root())


def test_the_page_is_self_contained(project: Path, saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in (0, 1):
        names = ["media/picture.png", "media/clip.mp4", "media/rows.csv", "media/numbers.json", "media/lost.png"]
        folder = saved("esc@base", seed, 10.0 + seed, media=names)
        (folder / "media").mkdir()
        (folder / "media" / "picture.png").write_bytes(PIXEL)
        (folder / "media" / "clip.mp4").write_bytes(b"not a film")
        (folder / "media" / "numbers.json").write_text("{}")
        (folder / "media" / "rows.csv").write_text("clip,answer\n" + "".join(f"{i},<i>word</i>\n" for i in range(40)))
        rows = "".join(f"{i},train/loss,{1 / (i + 1)}\n" for i in range(1000))
        (folder / "metrics.csv").write_text("step,name,value\n" + rows + "1000,test/x,3\n1001,train/loss,nan\n")
    text = written()
    page = Page(text)
    assert all(source.startswith(("data:", "#")) for source in page.sources)
    assert not re.search(r"url\(|@import|https?://(?!www.w3.org)|fetch\(", text)
    assert {s[1:] for s in page.sources if s.startswith("#")} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert all(values.get("alt") for tag, values in page.elements if tag == "img")
    assert {values["popovertarget"] for _, values in page.elements if "popovertarget" in values} <= set(page.ids)
    assert "numbers.json (not a picture), lost.png (not in the run&#39;s folder)" in text
    monkeypatch.setattr(media, "MAX_PAGE_BYTES", 2 * len(PIXEL))  # room for one picture per paper
    assert written("mct", "mct").count("picture.png (the page is full)") == 2


def test_numbers_of_smoke_are_folded_away(project: Path, saved: Saved) -> None:
    saved("esc@base", 0, 10.0)
    saved("esc@base", 0, 99.0, scale="smoke")
    text = written()
    folded = text.index("their numbers mean nothing</summary>")
    assert text.index("10.0</button>") < folded < text.index("99.0</button>")
    alone = written(scale="smoke")
    assert "their numbers mean nothing</summary>" not in alone
    assert "99.0</button>" in alone


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("media/words.row.json", b"{"), ("media/words.row.json", b"7"), ("media/long.csv", b"a\n" + b"x" * 200_000),
        ("record.json", b"["),
    ],
)  # fmt: skip
def test_a_damaged_run_is_left_out_with_one_warning(
    project: Path, saved: Saved, file: str, content: bytes, capsys: Capsys
) -> None:
    limit = csv.field_size_limit(131_072)  # some data set readers raise this limit
    saved("esc@base", 1, 20.0)
    names = ["media/words.row.png", "media/words.row.json", "media/long.csv"]
    folder = saved("esc@base", 0, 40.0, media=names)
    (folder / "media").mkdir()
    (folder / "media" / "words.row.png").write_bytes(PIXEL)
    (folder / file).write_bytes(content)
    text = written()
    csv.field_size_limit(limit)
    assert "20.0</button>" in text
    assert "30.0" not in text  # the mean with the damaged run
    told = capsys.readouterr().err
    assert told.count("warning: ") == 1
    assert str(folder) in told


def test_media_fit_into_a_budget() -> None:
    budget = media.Budget(3 * 2**20)
    told = [budget.refuse(size) for size in (2**21, 2**21 + 1, 2**20, 1)]
    assert told == ["", "2.0 MiB, more than 2", "", "the page is full"]


def test_a_page_shows_nothing_from_outside_of_a_run(project: Path, saved: Saved) -> None:
    secret = project / "secret.csv"
    secret.write_text("user,password\nroot,hunter2\n")
    picture = project / "picture.png"
    picture.write_bytes(PIXEL)
    names = ["media/a.csv", "media/b.png", "media/c.row.png", "media/d.png", "media/e.csv"]
    names += ["../../../../../secret.csv", str(secret), "up/secret.csv"]
    folder = saved("esc@base", media=names)
    (folder / "media").mkdir()
    for name, target in zip(names, (secret, picture, picture), strict=False):
        (folder / name).symlink_to(target)
    (folder / "media" / "d.png").symlink_to("/dev/zero")
    os.mkfifo(folder / "media" / "e.csv")
    (folder / "up").symlink_to(project)
    assert (folder / names[-3]).resolve() == secret
    text = written()
    assert "hunter2" not in text
    assert "<img" not in text
    assert all(f"{Path(name).name} (not in the run&#39;s folder)" in text for name in names if "row" not in name)


def test_a_page_draws_few_curves_and_no_control_characters(
    saved: Saved, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(report, "MAX_CURVES", 3)
    folder = saved("esc@base")
    rows = [f"{step},{name},1.0" for name in ("x\x1b\u202ey/loss", *"abcde") for step in (0, 1)]
    (folder / "metrics.csv").write_text("\n".join(["step,name,value", *rows]))
    text = written()
    assert "omits 3 of the 6 curves of esc@base" in capsys.readouterr().err
    assert text.count(" by step; ") == 3
    assert "x\\x1b\\u202ey/loss" in text
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert not recwarn  # no warning about characters that the font lacks


def test_curves_of_the_file_that_runs_write(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,name,value\n0,train/loss,2.5\n0,train/mlm,7\n1,train/loss,1.5\n1,train/mlm,nan\n")
    assert thinned(read_points(path)) == {"train/loss": [(0.0, 2.5), (1.0, 1.5)]}
    path.write_text("step,name,value\n1,a,5\n0,a,9\n1,a,3\n")  # keep the order of values at the same step
    assert thinned(read_points(path)) == {"a": [(0.0, 9.0), (1.0, 5.0), (1.0, 3.0)]}
    path.write_text("step,name,value\n0,a,1e308\n1,a,2\n2,a,1\n")  # can't be plotted
    assert thinned(read_points(path)) == {"a": [(1.0, 2.0), (2.0, 1.0)]}
    assert read_points(tmp_path / "none.csv") == {}
    names = ["val/loss", "train/loss", "val/mlm_loss", "train/mlm_loss", "val/accuracy", "gradient_norm"]
    assert sorted(sorted(names), key=importance) == names
    points = [(float(step), 10.0 * step) for step in range(201)]
    assert thinned({"a": points[:200], "b": points, "c": points[:1]}) == {
        "a": points[:200], "b": [(step + 0.5, 10 * step + 5.0) for step in range(0, 200, 2)] + points[200:],
    }  # fmt: skip


def test_the_shipped_records_make_a_whole_page(tmp_path: Path) -> None:
    text = written(runs=tmp_path)
    assert "There are no runs on this machine" in text
    page = Page(text)
    assert {s[1:] for s in page.sources if s.startswith("#")} <= set(page.ids)
    for paper in existing_papers():
        source = load(paper.name)
        assert paper.name in page.ids
        assert f"card-{paper.name}" in page.ids
        for table in source.tables:
            assert any(i.startswith(f"{paper.short}-{table.id}-".replace("_", "-")) for i in page.ids if i), table.id
    glance = text[text.index("do your runs match?") : text.index("What papers on")]
    assert glance.count("no runs at mini") == len(existing_papers())
    assert "S and S + W lower the Frechet distance" in glance  # this claim fails
    assert "CMA&#39;s linear probe" not in glance  # this claim holds
    assert len(text) < 3_000_000


def test_the_first_screen_says_whether_your_runs_match(tmp_path: Path) -> None:
    for record in [r for r in find_promoted("avid_cma", "mini") if r.seed == 0]:
        again = dataclasses.replace(record, started="2030-01-01T00:00:00+00:00")
        write(tmp_path / "avid_cma" / "mini" / "seed0" / record.stage / RECORD_FILE, again)
    text = written("avid_cma", runs=tmp_path)
    glance = text[text.index("do your runs match?") : text.index("What papers on")]
    assert "matches the recorded runs: " in glance
