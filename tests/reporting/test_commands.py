"""The commands, promotion and the report page."""

from __future__ import annotations

import argparse
import base64
import json
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from common.reporting import records, report
from common.reporting.commands import add_parsers
from common.reporting.promote import promote
from common.reporting.records import Record

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
)


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    add_parsers(parser.add_subparsers(required=True))
    args = parser.parse_args(arguments)
    status: int = args.func(args)
    return status


def test_tables(
    project: Path,
    save: Callable[[Record], Path],
    make_record: Callable[..., Record],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("tables", "--check") == 1
    assert "out of date" in capsys.readouterr().out
    save(make_record("esc@base", 0, 12.5))
    assert run("tables", "--runs", str(project / "runs")) == 0
    assert "12.5 (n=1)" in capsys.readouterr().out
    assert run("tables", "--check") == 1  # printing fresh records wrote nothing
    assert run("tables") == 0
    out = capsys.readouterr().out
    assert "12.5" not in out
    assert "wrote" in out
    assert run("tables", "--check") == 0


def test_errors_are_one_line(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("tables", "mtc") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: unknown paper 'mtc': did you mean 'mct'?")
    assert error.count("\n") == 1
    assert run("tables", "m3p") == 2
    assert "m3p has no tables yet" in capsys.readouterr().err
    assert run("claims", "mct", "--runs", str(project / "nowhere")) == 2
    assert run("tables", "mct", "--table", "tranfer", "--no-write") == 2
    assert "did you mean 'transfer'" in capsys.readouterr().err


def test_promote(
    project: Path,
    save: Callable[[Record], Path],
    make_record: Callable[..., Record],
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = {"rate": 1, "out": str(project / "runs"), "home": str(Path.home() / "x")}
    save(make_record("esc@base", 0, config=config))
    save(make_record("esc@base", 0, scale="smoke"))
    assert run("promote", "mct") == 0
    assert capsys.readouterr().out == "promoted: mct/mini/seed0/esc@base\n"
    promoted = project / "papers" / "mct" / "results" / "mini" / "seed0" / "esc@base.json"
    # Nothing of this machine's folders is committed.
    assert json.loads(promoted.read_text())["config"] == {"rate": 1, "out": "./runs", "home": "~/x"}
    assert [r.stage for r in records.find_promoted("mct")] == ["esc@base"]
    assert [p.action for p in promote("mct")] == ["unchanged"]

    save(make_record("esc@base", 0, 51.0, started="2026-03-01T00:00:00Z"))
    assert [p.action for p in promote("mct")] == ["updated"]
    save(make_record("esc@base", 0, 52.0, started="2026-02-01T00:00:00Z"))
    assert [p.action for p in promote("mct")] == ["kept"]
    assert records.read(promoted).metrics == {"test/top1": 51.0}


@pytest.mark.parametrize(
    ("git", "word"),
    [({"revision": "a", "dirty": True}, "uncommitted changes"), ({"revision": None, "dirty": None}, "unknown")],
)
def test_promote_refuses_what_cannot_be_reproduced(
    project: Path, save: Callable[[Record], Path], make_record: Callable[..., Record],
    capsys: pytest.CaptureFixture[str], git: dict, word: str,
) -> None:  # fmt: skip
    save(make_record("esc@base", 0, git=git))
    assert run("promote", "mct") == 1
    assert re.search(rf"refused: mct/mini/seed0/esc@base: .*{word}", capsys.readouterr().out)
    assert not (project / "papers" / "mct" / "results").exists()
    with pytest.raises(SystemExit):
        run("promote", "mct", "--allow-dirty")


class Links(HTMLParser):
    """Collects what a page refers to and whether its tags are balanced."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.open: list[str] = []
        self.titles: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        assert tag != "script"
        self.sources += [v for k, v in values.items() if k in ("src", "href") and v]
        self.titles += [values["title"]] if values.get("title") else []  # type: ignore[list-item]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_report_is_self_contained(
    project: Path, save: Callable[[Record], Path], make_record: Callable[..., Record]
) -> None:
    deviation = {"field": "model.x", "reason": "a <small> bank"}
    for seed in (0, 1):
        names = ["media/picture.png", "media/lost.png"]
        folder = save(make_record("esc@base", seed, 10.0 + seed, media=names, deviations=[deviation]))
        (folder / "media").mkdir()
        (folder / "media" / "picture.png").write_bytes(PIXEL)
        rows = "".join(f"{i},0,{1 / (i + 1)},\n" for i in range(1000))
        (folder / "metrics.csv").write_text("step,epoch,train/loss,test/x\n" + rows + "1000,1,,3\n1001,1,nan,\n")
    assert run("report", "mct") == 0
    text = (project / "runs" / "report.html").read_text()
    page = Links()
    page.feed(text)
    assert page.open == []
    assert all(source.startswith(("data:image/png;base64,", "#")) for source in page.sources)
    assert sum(source.startswith("data:") for source in page.sources) == 2
    assert text.count("<polyline") == 2
    assert "train/loss" in text
    assert "10.5 ± 0.7 (n=2)" in text
    assert any("seed 0: 10; seed" in title or "seed 0: 10, seed 1: 11" in title for title in page.titles)
    assert "a &lt;small&gt; bank" in text
    assert "2 more files" in text
    assert 'name="viewport"' in text


def test_report_without_any_run(project: Path) -> None:
    assert run("report", "--output", str(project / "page.html")) == 0
    assert "Not measured yet" in (project / "page.html").read_text()


def test_curves_of_the_file_that_runs_write(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,name,value\n0,train/loss,2.5\n0,train/mlm,7\n1,train/loss,1.5\n1,train/mlm,nan\n")
    assert report.read_curves(path) == {"train/loss": [(0.0, 2.5), (1.0, 1.5)]}


def test_a_table_is_drawn_where_it_asks_for_it(
    project: Path, save: Callable[[Record], Path], make_record: Callable[..., Record]
) -> None:
    for seed in (0, 1):
        save(make_record("esc@base", seed, 10.0 + seed))
    path = project / "papers" / "mct" / "tables.yaml"
    pages = []
    for old, new in (("", ""), ("    title: Transfer", "    chart: true\n    title: Transfer")):
        path.write_text(path.read_text().replace(old, new))
        assert run("report", "--output", str(project / "page.html")) == 0
        pages.append((project / "page.html").read_text())
    assert "chart: true" in path.read_text()
    assert "<rect" not in pages[0]
    assert pages[1].count("<rect") >= 2  # a bar and its place in the legend
    assert pages[1].count("<line") >= 1
    assert "10.5 ± 0.7 (n=2)</title>" in pages[1]
    page = Links()
    page.feed(pages[1])
    assert page.open == []


def test_curves_are_thinned_by_means(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("epoch,step,a\n" + "".join(f"0,{i},{i % 2}\n" for i in range(10_000)))
    points = report.read_curves(path)["a"]
    assert len(points) <= report.MAX_POINTS
    assert all(value == pytest.approx(0.5, abs=0.02) for _, value in points)
    assert report.read_curves(tmp_path / "none.csv") == {}


def test_no_torch_and_quick() -> None:
    code = (
        "import sys, argparse, common.reporting.commands as c, common.reporting.render as r, common.reporting.report;"
        "p = argparse.ArgumentParser(); c.add_parsers(p.add_subparsers());"
        "a = p.parse_args(['tables', 'avid', '--scale', 'paper', '--no-write']); s = a.func(a);"
        "bad = [m for m in ('torch', 'lightning', 'numpy', 'matplotlib') if m in sys.modules];"
        "sys.exit(s or (str(bad) if bad else 0))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "AVID-CMA" in done.stdout


def test_importing_the_commands_is_lazy() -> None:
    code = "import sys, common.reporting.commands; sys.exit(str([m for m in ('yaml', 'rich') if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr.strip() == "[]"
