"""Test `assemble list` and `assemble show`, and the errors for a wrong name."""

from __future__ import annotations

from pathlib import Path

import pytest

from assemble.commands.main import main
from assemble.reporting.tables import expand, load
from assemble.stages.modes import _missing_weights
from assemble.stages.recipes import recipes_of
from assemble.stages.request import Selection, find_request


def said(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> str:
    assert main(list(arguments)) == status
    captured = capsys.readouterr()
    return captured.err if status else captured.out


def test_list_names_every_table_stage_and_recipe_of_a_paper(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    output = said(capsys, "list", "avid", "--runs", str(tmp_path))
    first = {line.split()[0] for line in output.splitlines() if line}
    assert first >= {table.id for table in load("avid").tables}
    assert first >= {instance.id for instance in expand("avid", "mini")}
    assert first >= set(recipes_of("avid"))
    line = next(line for line in output.splitlines() if line.startswith("esc@avid_cma "))
    assert "esc50_svm" in line
    assert line.split()[-1].startswith("0")  # the seeds of the promoted records


def test_show_says_where_a_stage_comes_from(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    output = said(capsys, "show", "avid/avid_cma", "--runs", str(tmp_path))
    assert "CMA: starts from AVID" in output
    assert "configs/avid_cma/base.yaml < configs/avid_cma/cma.yaml < configs/avid_cma/mini.yaml" in output
    assert "starts from: avid (model.warm_start)" in output
    for name in ("avid_cma", "cma"):
        output = said(capsys, "show", f"avid/{name}", "--runs", str(tmp_path))
        (line,) = [line.split() for line in output.splitlines() if line.startswith("avid_cma ")]
        assert line[:4] == ["avid_cma", "pretrain", "cma", "avid"]
        assert line[-2] == "-"  # nothing has run here; the seeds of the promoted records follow
        assert line[-1].startswith("0")
    assert "deviations of this scale" in output
    assert "fills: table kinetics_transfer, row AVID-CMA" in said(capsys, "show", "avid/esc@avid_cma")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fitt", "avid"], "there is no command 'fitt': did you mean 'fit'?"),
        (["fit", "avid"], "`assemble list avid` shows them"),
        (["fit", "avid/ucf_1"], "'ucf_1' measures a model: say which, as in avid/ucf_1@avid"),
        (["fit", "avid/avid", "--temperature", "0.1"], "did you mean --model.loss.temperature?"),
        (["fit", "--model.temperature", "0.1", "avid/avid"], "give name before --model.temperature, whose value was"),
        (["tables", "avvid"], "assemble: unknown paper 'avvid'"),
        (["explain", "xmcgan", "minni", "S", "fd"], "no table of xmc_gan named 'minni': did you mean 'mini'?"),
        (["explain", "xmcgan", "mini", "s plus w", "fd"], "did you mean 'S + W'?"),
        (["explain", "xmcgan", "mini", "S", "fdd"], "no metric of mini named 'fdd': did you mean 'fd'?"),
        (["explain", "xmcgan", "ablation", "S", "fid", "--scale", "mini"], "has no scale mini; scales: paper"),
        (["reproduce", "avid", "mct"], "unrecognized arguments: mct (it takes one paper"),
    ],
)
def test_a_wrong_name_is_answered_in_a_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    error = said(capsys, *arguments, status=2)
    assert words in error
    assert error.count(",") < 12


def test_a_bare_recipe_that_measures_a_model_warns_of_random_weights(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    where = ["--scale", "smoke", "--runs", str(tmp_path)]
    assert main(["fit", "avid/esc50_svm", *where]) == 0
    assert (
        "warning: without --model.pretrained and --data.audio.statistics, esc50_svm measures random weights"
        in capsys.readouterr().err
    )
    # A row whose name says "untrained" needs no warning.
    assert _missing_weights(find_request("avid/esc@untrained", Selection(scale="mini", runs=tmp_path))) == ""
