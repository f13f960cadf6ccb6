"""A paper that lacks an optional file is told so by name."""

from __future__ import annotations

import pytest

from common.training.errors import StageError
from common.training.main import main
from common.training.parts import optional_part, part


def test_a_part_is_the_module_or_an_error_that_names_the_file() -> None:
    assert part("mct", "synthetic", "makes no batches").RECIPE == "mct"
    assert optional_part("mct", "prepare") is None
    with pytest.raises(StageError, match=r"mct cannot fly: papers/mct/wings.py does not exist"):
        part("mct", "wings", "cannot fly")


def test_commands_say_which_file_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("common.training.parts.optional_part", lambda paper, name: None)
    assert main(["rehearse", "mct"]) == 2
    assert "papers/mct/rehearsal.py does not exist" in capsys.readouterr().err
    assert main(["gpu-check", "mct", "--device", "cpu", "--small"]) == 1
    assert "papers/mct/synthetic.py does not exist" in capsys.readouterr().out
