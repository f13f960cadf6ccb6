"""Every reference to a page leads somewhere: sections of `docs/papers`, and files that documents name."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAPERS = sorted(path.stem for path in (ROOT / "docs" / "papers").glob("*.md") if path.stem != "README")
SECTION = r"\d{1,2}(?:\.\d{1,2})?"
#: What stands in front of a section that is cited: a source, a comment of a configuration, another section.
CITED = re.compile(rf"(?:Source:[^\[\n]*|#[^\[\n]*|\] and |\] to |\], )\[({SECTION})\]")
PAGE = re.compile(rf"docs/papers/(\w+)\.md((?:(?:,? and |, | to | )?\[{SECTION}\])*)")


@functools.cache
def sections(paper: str) -> frozenset[str]:
    """Numbers of the sections of a paper's page: headings, and paragraphs that begin with a number."""
    text = (ROOT / "docs" / "papers" / f"{paper}.md").read_text(encoding="utf-8")
    return frozenset(re.findall(rf"^(?:#+ )?\(?({SECTION})[. )]", text, flags=re.MULTILINE))


def texts(*folders: str) -> list[Path]:
    found = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    others = {"results", "detectron2"}  # records, and files in the format of others
    return [path for path in found if path.suffix in (".py", ".yaml", ".md") and not others & set(path.parts)]


@pytest.mark.parametrize("paper", PAPERS)
def test_a_paper_cites_sections_that_its_page_has(paper: str) -> None:
    known = sections(paper)
    assert len(known) > 10
    cited = 0
    for path in texts(f"papers/{paper}", f"configs/{paper}", f"tests/{paper}"):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            for section in CITED.findall(line):
                cited += 1
                assert section in known, f"{path.relative_to(ROOT)}:{number} cites [{section}], which the page lacks"
    assert cited > 20


def test_pages_that_are_named_have_the_sections_that_are_cited() -> None:
    cited = 0
    for path in texts("assemble", "common", "papers", "configs", "tests", "docs"):
        for page, numbers in PAGE.findall(path.read_text(encoding="utf-8")):
            for section in re.findall(SECTION, numbers):
                cited += 1
                assert section in sections(page), f"{path.relative_to(ROOT)} cites {page}.md [{section}]"
    assert cited > 100


#: Phrases that took readers a second reading; docs, help and docstrings do without them.
OPAQUE = re.compile(
    r"stands? beside|\bgoes on\b|comes? out\b|whoever|what is there|that is none|of one's own", re.IGNORECASE
)


def test_prose_is_free_of_opaque_phrases() -> None:
    for path in [*texts("common", "papers", "configs", "docs"), *ROOT.glob("*.md"), ROOT / "Makefile"]:
        found = OPAQUE.search(path.read_text(encoding="utf-8"))
        assert not found, f"{path.relative_to(ROOT)}: {found and found.group()!r}"
