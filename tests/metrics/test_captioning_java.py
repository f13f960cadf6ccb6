"""Run METEOR with a replacement for Java, and with the real Java if installed."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from common.metrics.captioning import CaptionSet, JavaUnavailable, score_captions
from common.metrics.captioning.meteor import METEOR_JAR, meteor
from tests.machine import LONG, promised

GOLDEN_FOLDER = Path(__file__).parents[1] / "golden" / "vx2text"
GOLDEN = json.loads((GOLDEN_FOLDER / "caption_metrics.json").read_text())
SEPARATORS = "\n\r\x0b\x0c\x1c\x85\u2028\u2029"

# Answers like METEOR, and logs its input: each SCORE gets a line of statistics, each EVAL one score per segment and the
# total. The lines are long, so a caller that writes everything before reading would block.
METEOR = """
import sys
asked = open(sys.argv[0] + ".asked", "a", encoding="utf-8")
for line in iter(sys.stdin.buffer.readline, b""):
    line = line.decode().rstrip("\\n")
    asked.write(line + "\\n")
    asked.flush()
    fields = line.split(" ||| ")
    if fields[0] == "SCORE":
        print(len(fields) - 2, len(fields[-1]), "x" * 300)
    else:
        for one in fields[1:]:
            print(0.25 * float(one.split()[0]))
        print(0.5)
    sys.stdout.flush()
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Replace Java by a program, and the package's jars by empty files. Return a function that installs the program."""

    def install(source: str) -> Path:
        program = tmp_path / "java"
        program.write_text(f"#!{sys.executable}\n{source}")
        program.chmod(0o755)
        path = tmp_path / "pycocoevalcap" / METEOR_JAR
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
        monkeypatch.syspath_prepend(str(tmp_path))
        return program

    return install


def test_meteor_asks_and_reads(stand_in) -> None:  # type: ignore[no-untyped-def]
    program = stand_in(METEOR)
    captions = CaptionSet(
        ["a dog", f"caf\u00e9 ||| x{SEPARATORS}y", ""], [["a dog"], ["one", f"two{SEPARATORS}||| three"], [""]]
    )
    total, items = meteor(captions)
    assert total == 0.5
    assert items.tolist() == [0.25, 0.5, 0.25]
    asked = Path(f"{program}.asked").read_text(encoding="utf-8").split("\n")
    assert asked[:3] == [
        "SCORE ||| a dog ||| a dog",
        "SCORE ||| one ||| two three ||| caf\u00e9 x y",
        "SCORE |||  ||| ",
    ]
    assert asked[3].startswith("EVAL ||| 1 5 ")
    assert asked[4:] == [""]


def test_meteor_reads_while_it_writes(stand_in) -> None:  # type: ignore[no-untyped-def]
    stand_in(METEOR)
    _, items = meteor(CaptionSet(["a dog runs " * 20] * 3000, [["a dog"]] * 3000), timeout=LONG)
    assert items.tolist() == [0.25] * 3000


@pytest.mark.parametrize(
    "source",
    [
        "import sys; sys.exit('Error: no memory')",
        "import sys; [print('none\\nsense', flush=True) for _ in sys.stdin]",
        "import time; time.sleep(60)",
    ],
)
def test_meteor_that_fails_is_not_measured(stand_in, source: str) -> None:  # type: ignore[no-untyped-def]
    stand_in(source)
    with pytest.raises(JavaUnavailable):
        meteor(CaptionSet(["a"], [["a"]]), timeout=0.5 if "sleep" in source else LONG)


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captions = CaptionSet(["a"], [["a"]])
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(JavaUnavailable, match="java"):
        meteor(captions)
    (tmp_path / "java").write_text("#!/bin/sh\n")
    (tmp_path / "java").chmod(0o755)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(JavaUnavailable, match=r"meteor-1\.5\.jar"):
        meteor(captions)


@pytest.mark.slow  # loads a paraphrase table, 1.5 GB
@pytest.mark.parametrize("protocol", ["coco", "tvc", "avsd_1ref", "avsd7", "avsd8"])
def test_golden_meteor(protocol: str) -> None:
    try:
        meteor(CaptionSet(["a"], [["a"]]))
    except JavaUnavailable as problem:
        if promised("java"):
            raise
        pytest.skip(f"{problem} (Debian: apt-get install default-jre-headless; make .venv/.captioning)")
    items = GOLDEN["items"]
    scores = score_captions({i["id"]: i["hyp"] for i in items}, {i["id"]: i["refs"] for i in items}, protocol)  # type: ignore[arg-type]
    assert scores.corpus["meteor"] == pytest.approx(GOLDEN["corpus"][protocol]["meteor"], abs=1e-6)
    if protocol in items[0]["scores"]:
        golden = [item["scores"][protocol]["meteor"] for item in items]
        np.testing.assert_allclose(scores.items["meteor"], golden, rtol=0, atol=1e-6)
