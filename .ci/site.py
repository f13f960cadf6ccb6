"""Build the site: `python .ci/site.py [OUTPUT]`. Needs the extra `docs` and no network.

The pages lie all over the repository and link to each other and to source files. They are put together in a folder in
the same places, with what they link to, a reference made from the docstrings, and a page of each paper's equations with
our code; any link that leads nowhere stops the build.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("*.md", "docs/**/*.md", "papers/*/README.md", "tests/golden/README.md")
PAPERS = sorted(path.stem for path in ROOT.glob("docs/papers/[a-z]*.md"))
LINK = re.compile(r"\]\(([^)#\s]+)(#[^)]*)?\)")
#: After an equation in docs/papers: our code for it and the golden test of that code, as in
#: `<!-- common.losses.nce:nce tests/losses/test_nce.py::test_nce -->`.
MARKER = re.compile(r" ?<!-- (\w+(?:\.\w+)+:[^>]*) -->")
#: Where an equation begins that isn't a block of its own: a bold name, a numbered paragraph, an item of a list.
BEGINS = re.compile(r"(?P<bold>\*\*[A-Z])|(?P<number>\d+\.\d+) | *(?:-|\d+\.) ")
#: Sentences on how released code, paper and ours differ.
DIFFERS = re.compile(
    r"\b(?:ours?|official|releases?|quirk|bug|code(?![:-])|poster (?:prints|writes|shows))\b", re.IGNORECASE
)
AVID, MCT, XMC_GAN, M3P, VX2TEXT, MODEL = MODELS = (
    "papers.avid_cma.use.AVID", "papers.mct.use.MCT", "papers.xmc_gan.use.XMCGAN", "papers.m3p.use.M3P",
    "papers.vx2text.use.VX2Text", "common.models.trained.TrainedModel",
)  # fmt: skip
#: Pages of the reference by task: title, a sentence, and what is on them; a package stands for its modules.
REFERENCE = {
    "load": (
        "Load a trained model",
        "Every model loads from an export, a folder or a repository on the Hub.",
        [f"{MODEL}.from_export", f"{MODEL}.from_pretrained"],
    ),
    "embed": (
        "Embed clips, images and texts",
        "Files or tensors in, one vector per item out.",
        [
            *(f"{model}.embed_{kind}" for model in (AVID, VX2TEXT) for kind in ("video", "audio")),
            *(f"{model}.embed_{kind}" for model in (MCT, M3P, XMC_GAN) for kind in ("image", "text")),
            f"{MCT}.features",
        ],
    ),
    "search": ("Search", "Score queries against a gallery.", [f"{MODEL}.gallery", f"{MODEL}.compare", f"{M3P}.match"]),
    "generate": (
        "Generate, answer and caption",
        "Images from a text, and text from a clip.",
        [f"{XMC_GAN}.generate", f"{VX2TEXT}.answer", f"{VX2TEXT}.caption", f"{VX2TEXT}.words"],
    ),
    "models": ("All of a trained model", "Every method of the five models and their base class.", list(MODELS)),
    "losses": ("Losses", "Losses as functions and modules; they need PyTorch alone.", ["common.losses"]),
    "encoders": ("Encoders", "Networks, and what reads their weights.", ["common.encoders"]),
    "memory": ("Memories", "Banks, queues and momentum encoders.", ["common.memory"]),
    "metrics": ("Metrics", "What is measured, over any number of processes.", ["common.metrics"]),
    "protocols": ("Protocols", "What is done to a trained encoder.", ["common.protocols"]),
    "data": ("Data", "Data sets in their published layouts.", ["common.data.datasets"]),
}


def pages() -> list[Path]:
    """All pages, relative to the repository."""
    return sorted({path.relative_to(ROOT) for pattern in PAGES for path in ROOT.glob(pattern)})


def modules(name: str) -> list[str]:
    """The modules of a package, or the class itself."""
    folder = ROOT / name.replace(".", "/")
    if not folder.is_dir():
        return [name]
    inside = sorted(path.relative_to(ROOT).with_suffix("") for path in folder.rglob("*.py") if path.stem[0] != "_")
    return [".".join(path.parts) for path in inside]


def definition(file: Path, name: str) -> ast.FunctionDef | ast.ClassDef:
    """The function, class or method that a file defines, or an error that names both."""
    node: ast.AST = ast.parse(file.read_text(encoding="utf-8"))
    for part in name.split("."):
        inside = [one for one in ast.iter_child_nodes(node) if getattr(one, "name", "") == part]
        if not inside:
            raise ValueError(f"{file.relative_to(ROOT)} has no {name}")
        node = inside[0]
    return node


def source(file: Path, node: ast.FunctionDef | ast.ClassDef) -> str:
    """Lines of a definition without docstrings."""
    lines = file.read_text(encoding="utf-8").splitlines()
    described = [
        one.body[0]
        for one in ast.walk(node)
        if isinstance(one, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(one) is not None
    ]
    hidden = {number for one in described for number in range(one.lineno, one.end_lineno + 1)}
    first = min(one.lineno for one in (node, *node.decorator_list))
    return textwrap.dedent("\n".join(lines[n - 1] for n in range(first, node.end_lineno + 1) if n not in hidden))


def equations(paper: str) -> Iterator[tuple[str, str, list[str], list[str]]]:
    """Heading, text, differences and marker of each marked equation of a paper's page."""
    lines = (ROOT / "docs" / "papers" / f"{paper}.md").read_text(encoding="utf-8").splitlines()
    heading = ""
    for number, line in enumerate(lines):
        heading = line.lstrip("# ").partition(" (")[0] if line.startswith("#") else heading
        if not (found := MARKER.search(line)):
            continue
        last = number if line[: found.start()] else number - 2
        first = last
        while not BEGINS.match(lines[first]) and lines[first - 1]:
            first -= 1
        text = MARKER.split("\n".join(lines[first : number + 1]))[0].rstrip()
        if not text or text.startswith("#"):
            raise ValueError(f"docs/papers/{paper}.md:{number + 1} marks no equation")
        kind = BEGINS.match(lines[first])
        end = number + 1
        while end < len(lines) and not lines[end].startswith("#") and not MARKER.search(lines[end]):
            if kind and kind.lastgroup and (after := BEGINS.match(lines[end])) and after.lastgroup == kind.lastgroup:
                break
            end += 1
        about = "\n".join(MARKER.sub("", one) for one in lines[first:end] if not one.startswith("|"))
        sentences = re.split(r"(?<=[.)])\s(?=[A-Z])|\n\n|\n *(?=- |\d+\. |\*\*[A-Z])", about)
        if kind and kind["number"]:
            cites = re.compile(rf"(?<![\d.,]){re.escape(kind['number'])}(?!\d)")
            sentences += [one for one in [*lines[:first], *lines[end:]] if cites.search(one)]
        yield heading, text, [" ".join(one.split()) for one in sentences if DIFFERS.search(one)], found[1].split()


def equation_page(paper: str) -> str:
    """A paper's equations: what differs in the released code, our lines, and the golden test that covers them."""
    said = f"docs/papers/{paper}.md"
    title = (ROOT / said).read_text(encoding="utf-8").partition(":")[0]
    parts = [f"{title}: equations and code", f"Made from [what the paper says](../{said}) and the source."]
    for heading, text, differences, names in equations(paper):
        ours = ", ".join(f"`{name.partition(':')[2]}`" for name in names[:-1])
        parts += [f"## {heading}: {ours}", text, "**What differs**"]
        parts += ["\n".join(f"- {one.removeprefix('- ')}" for one in differences or ["Nothing is noted."])]
        for name in names:
            place, _, part = name.replace("::", ":").partition(":")
            path = place if place.endswith(".py") else place.replace(".", "/") + ".py"
            node = definition(ROOT / path, part)
            link = f"`{part}`, [{path}](../{path}), line {node.lineno}"
            if not path.startswith("tests/"):
                parts += [f"**Our code:** {link}", f"```python\n{source(ROOT / path, node)}\n```"]
            elif "golden" in (ROOT / path).read_text(encoding="utf-8").lower():
                parts += [f"**Golden test:** {link}"]
            else:
                raise ValueError(f"{said}: {path} reads no golden numbers")
        if "tests/" not in names[-1]:
            raise ValueError(f"{said}: {names[-1]} needs a golden test after it")
    return "\n\n".join(parts) + "\n"


def put_together(folder: Path) -> None:
    """Copy the pages and the files that they link to, and write the reference.

    A link to a folder becomes one to its README, or its name alone, where it has none.
    """
    texts = {page: (ROOT / page).read_text(encoding="utf-8") for page in pages()}
    texts |= {Path("equations", f"{paper}.md"): equation_page(paper) for paper in PAPERS}
    for page, text in texts.items():
        target = folder / page
        target.parent.mkdir(parents=True, exist_ok=True)

        def checked(found: re.Match[str], page: Path = page) -> str:
            link, anchor = found[1], found[2] or ""
            if "://" in link or link.startswith("mailto:"):
                return found[0]
            place = (ROOT / page.parent / link).resolve()
            if place.is_dir() and (place / "README.md").is_file():
                return f"]({link.rstrip('/')}/README.md{anchor})"
            if place.is_file() and place.suffix != ".md" and place.is_relative_to(ROOT):
                copy = folder / place.relative_to(ROOT)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(place, copy)
            return found[0]

        target.write_text(LINK.sub(checked, text), encoding="utf-8")
    style = ".md-grid { max-width: 90rem; }\n.md-typeset pre > code { white-space: pre-wrap; }\n"
    (folder / "wide.css").write_text(style, encoding="utf-8")
    (folder / "api").mkdir()
    for name, (title, text, parts) in REFERENCE.items():
        lines = [f"# {title}", "", text, ""]
        # A method's entry in the contents names its class too, since several classes have `embed_video`.
        lines += [
            f"::: {module}\n    options: {{toc_label: '{'.'.join(module.split('.')[3:])}'}}\n"
            if module.count(".") == 4
            else f"::: {module}\n"
            for part in parts
            for module in modules(part)
        ]
        (folder / "api" / f"{name}.md").write_text("\n".join(lines), encoding="utf-8")


def build(output: Path) -> None:
    """Build the site.

    Raises:
        subprocess.CalledProcessError: mkdocs had something to warn of, which it has printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        pages, config = Path(folder) / "pages", Path(folder) / "mkdocs.yml"
        pages.mkdir()
        put_together(pages)
        config.write_text((ROOT / "mkdocs.yml").read_text(encoding="utf-8") + "docs_dir: pages\n", encoding="utf-8")
        command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", str(config)]
        # Docstrings are read from the path, and nothing is imported.
        surroundings = {**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
        subprocess.run([*command, "--site-dir", str(output)], env=surroundings, check=True)


if __name__ == "__main__":
    build(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "site").resolve())
