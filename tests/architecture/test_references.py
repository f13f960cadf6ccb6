"""Check every reference: to sections of `docs/papers`, and in GitHub's files to make targets and commands."""

from __future__ import annotations

import functools
import re
from contextlib import redirect_stdout
from fnmatch import fnmatch
from io import StringIO
from pathlib import Path

import pytest
import yaml

from assemble.commands.main import main

ROOT = Path(__file__).resolve().parents[2]
PAPERS = sorted(path.stem for path in (ROOT / "docs" / "papers").glob("*.md") if path.stem != "README")
SECTION = r"\d{1,2}(?:\.\d{1,2})?"
#: Text that comes before a cited section: a source, a comment in a configuration, or another section.
CITED = re.compile(rf"(?:Source:[^\[\n]*|#[^\[\n]*|\] and |\] to |\], )\[({SECTION})\]")
PAGE = re.compile(rf"docs/papers/(\w+)\.md((?:(?:,? and |, | to | )?\[{SECTION}\])*)")


@functools.cache
def sections(paper: str) -> frozenset[str]:
    """Return the section numbers on a paper's page, from headings and from paragraphs that begin with a number."""
    text = (ROOT / "docs" / "papers" / f"{paper}.md").read_text(encoding="utf-8")
    return frozenset(re.findall(rf"^(?:#+ )?\(?({SECTION})[. )]", text, flags=re.MULTILINE))


def texts(*folders: str) -> list[Path]:
    found = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    others = {"results", "detectron2"}  # recorded results, and another project's files
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


#: Phrases that readers had to read twice. Docs, help and docstrings must not use these phrases.
OPAQUE = re.compile(
    r"stands? beside|\bgoes on\b|comes? out\b|whoever|what is there|that is none|of one's own", re.IGNORECASE
)


def test_prose_is_free_of_opaque_phrases() -> None:
    for path in [*texts("common", "papers", "configs", "docs"), *ROOT.glob("*.md"), ROOT / "Makefile"]:
        found = OPAQUE.search(path.read_text(encoding="utf-8"))
        assert not found, f"{path.relative_to(ROOT)}: {found and found.group()!r}"


#: The kinds of questions in a GitHub form, and what each kind needs besides `type` and `attributes`.
QUESTIONS = {"markdown": {"value"}, "textarea": {"label"}, "input": {"label"}, "checkboxes": {"label", "options"}}


def test_files_for_github_name_targets_and_commands_that_exist() -> None:
    files = [*(ROOT / ".github").rglob("*.yml"), ROOT / "action.yml"]
    targets = re.findall(r"^([\w%-]+):.*?## ", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    named = 0
    for path in files:
        text = path.read_text(encoding="utf-8")
        assert yaml.safe_load(text), path
        for line in re.findall(r"run: (?:\.venv/bin/)?((?:make|assemble) .*)|`\.venv/bin/(assemble .*?)`", text):
            named += 1
            program, *words = "".join(line).split()
            if program == "make":
                names = [word for word in words if "=" not in word]
                known = [any(fnmatch(name, target.replace("%", "*")) for target in targets) for name in names]
                assert all(known), f"{path.name}: make {' '.join(names)}"
            else:
                options = [word for word in words[1:] if word.startswith("--")]
                with redirect_stdout(StringIO()) as printed, pytest.raises(SystemExit):
                    main([words[0], "--help"])
                assert all(option in printed.getvalue() for option in options), f"{path.name}: assemble {words}"
    assert named > 12


def test_forms_for_issues_have_what_github_asks_for() -> None:
    forms = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    assert len(forms) >= 2
    for path in forms:
        form = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert {"name", "description", "body"} <= form.keys() <= {"name", "description", "labels", "body"}
        ids = [question["id"] for question in form["body"] if question["type"] != "markdown"]
        assert len(ids) == len(set(ids)) > 0
        for question in form["body"]:
            assert QUESTIONS[question["type"]] <= question["attributes"].keys(), f"{path.name}: {question}"
