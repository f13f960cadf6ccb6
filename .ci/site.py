"""Build the site: `python .ci/site.py [OUTPUT]`. Needs the extra `docs` and no network.

The pages lie all over the repository and link to each other and to source files. They are put together in a folder in
the same places, with what they link to and a reference made from the docstrings; any link that leads nowhere stops the
build.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("*.md", "docs/**/*.md", "papers/*/README.md", "tests/golden/*/README.md")
LINK = re.compile(r"\]\(([^)#\s]+)(#[^)]*)?\)")
#: Pages of the reference: title, a sentence, and what is on them; a package stands for its modules.
REFERENCE = {
    "models": (
        "Trained models",
        "What `from_export` and `from_pretrained` give.",
        [
            "common.stages.export.TrainedModel",
            "papers.avid_cma.use.AVID",
            "papers.mct.use.MCT",
            "papers.xmc_gan.use.XMCGAN",
            "papers.m3p.use.M3P",
            "papers.vx2text.use.VX2Text",
        ],
    ),
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


def put_together(folder: Path) -> None:
    """Copy the pages and the files that they link to, and write the reference.

    A link to a folder becomes one to its README, or its name alone, where it has none.
    """
    for page in pages():
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

        target.write_text(LINK.sub(checked, (ROOT / page).read_text(encoding="utf-8")), encoding="utf-8")
    (folder / "api").mkdir()
    for name, (title, text, parts) in REFERENCE.items():
        lines = [f"# {title}", "", text, ""]
        lines += [f"::: {module}\n" for part in parts for module in modules(part)]
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
