"""Check that the site has every page, that all links lead to files, and that the site builds if mkdocs is installed."""

from __future__ import annotations

import ast
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import yaml

import common
from tests.architecture.sources import ROOT, modules
from tests.machine import promised

SITE: dict[str, Any] = runpy.run_path(str(ROOT / ".ci" / "site.py"))
IMAGES = ROOT / "docs" / "images"
DIAGRAMS: dict[str, Any] = runpy.run_path(str(IMAGES / "diagrams.py"))["DRAWINGS"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("site")
    SITE["put_together"](path)
    return path


def named(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [name for one in (nav if isinstance(nav, list) else nav.values()) for name in named(one)]


def test_every_page_has_its_place(folder: Path) -> None:
    found = named(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*.md")}
    assert set(found) == there
    assert len(found) == len(set(found))


def test_links_lead_to_files(folder: Path) -> None:
    links = 0
    for page in folder.rglob("*.md"):
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in target and not target.startswith("mailto:"):
                links += 1
                assert (page.parent / target).is_file(), f"{page.relative_to(folder)} links to {target}"
    assert links > 50


def test_the_reference_names_what_is_there(folder: Path) -> None:
    known = set(modules())
    named_there = re.findall(r"^::: (\S+)$", "\n".join(p.read_text() for p in (folder / "api").iterdir()), re.MULTILINE)
    assert len(named_there) > 40
    embed = (folder / "api" / "embed.md").read_text(encoding="utf-8")
    labels = re.findall(r"toc_label: '(.+)'", embed)
    assert "AVID.embed_video" in labels
    assert len(labels) == len(set(labels))
    for name in named_there:
        assert not known.isdisjoint(".".join(name.split(".")[:parts]) for parts in range(3, 7)), name
    assert {"common.losses.nce", "common.memory.bank", "papers.avid_cma.use.AVID"} <= set(named_there)


@pytest.mark.parametrize("paper", SITE["PAPERS"])
def test_equations_have_our_code_and_a_golden_test(paper: str, folder: Path) -> None:
    page = (folder / "equations" / f"{paper}.md").read_text(encoding="utf-8")
    marked = (ROOT / "docs" / "papers" / f"{paper}.md").read_text(encoding="utf-8").count("<!-- ")
    assert 5 <= marked == page.count("## ") == page.count("**Golden test:**") <= 10
    snippets = re.findall(r"```python\n(.*?)\n```", page, re.DOTALL)
    assert len(snippets) >= marked
    for one in snippets:
        ast.parse(one)
    if paper == "avid_cma":
        shown = page.partition("## 6. NCE objective")[2].partition("\n## ")[0]
        for part in ("Lneg_b = sum_k", "NOT divided by K", "def nce_per_anchor(", "test_nce_equals_the_released_code"):
            assert part in shown


@pytest.mark.parametrize(
    ("now", "then", "told"),
    [
        ("nce:nce_per_anchor", "nce:nce_of_anchors", "common/losses/nce.py has no nce_of_anchors"),
        ("::test_nce_equals", "::test_nce_is", "tests/losses/test_nce.py has no test_nce_is"),
        (" tests/losses/test_nce.py::test_nce_equals_the_released_code", "", "needs a golden test"),
        (
            "tests/losses/test_nce.py::test_nce_equals_the_released_code",
            "tests/test_types.py::_classes",
            "no golden numbers",
        ),
        ("    Zbar  = mean", "## Zbar  = mean", "marks no equation"),
    ],
)
def test_a_marker_that_leads_nowhere_is_named(
    now: str, then: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("common", "papers", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    page = tmp_path / "docs" / "papers" / "avid_cma.md"
    page.parent.mkdir(parents=True)
    page.write_text((ROOT / "docs" / "papers" / page.name).read_text(encoding="utf-8").replace(now, then))
    monkeypatch.setitem(SITE["equation_page"].__globals__, "ROOT", tmp_path)
    with pytest.raises(ValueError, match=told):
        SITE["equation_page"]("avid_cma")


def test_it_builds_without_a_warning(tmp_path: Path) -> None:
    if not promised("docs"):
        for name in ("mkdocs", "mkdocstrings"):
            pytest.importorskip(name, reason="the extra docs is not installed (make .venv/.docs)")
    SITE["build"](tmp_path / "site")
    page = (tmp_path / "site" / "api" / "models.html").read_text(encoding="utf-8")
    assert "from_pretrained" in page
    assert "unit vectors" in page
    assert (tmp_path / "site" / "search" / "search_index.json").is_file()
    # The page must load nothing from other servers.
    home = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert not re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(?:https?:)?//', home)


def test_the_citation_names_this_version_and_the_five_papers() -> None:
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert found["version"] == common.__version__
    assert found["license"] == "Apache-2.0"
    assert len(found["references"]) == 5
    for paper, reference in zip(("avid_cma", "mct", "xmc_gan", "m3p", "vx2text"), found["references"]):
        text = " ".join((ROOT / "papers" / paper / "__init__.py").read_text(encoding="utf-8").split())
        assert reference["title"] in text
        assert ", ".join(f"{one['given-names']} {one['family-names']}" for one in reference["authors"]) in text
        assert reference["identifiers"][0]["value"].replace(":", " ") in text


@pytest.mark.parametrize("paper", DIAGRAMS)
def test_a_diagram_is_what_its_script_draws(paper: str) -> None:
    drawn = DIAGRAMS[paper]().svg()
    assert (IMAGES / f"{paper}.svg").read_text(encoding="utf-8") == drawn, "run python docs/images/diagrams.py"


def test_the_lines_of_a_figure_have_colors_of_their_own() -> None:
    legend = (IMAGES / "growth.svg").read_text(encoding="utf-8").split('text-anchor: start; fill: #1b1f24" x="610.7"')
    colors = [re.findall(r"stroke: (#\w{6}); stroke-width: 1.5", part)[-1] for part in legend[:-1]]
    assert len(colors) == len(set(colors)) == 10


def test_figures_use_what_every_viewer_draws() -> None:
    figures = [path for folder in ("docs", "papers") for path in (ROOT / folder).rglob("*.svg")]
    assert len(figures) > 6
    assert not [path.name for path in figures if "var(" in path.read_text(encoding="utf-8")]
