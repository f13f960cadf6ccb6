"""What a stage imports: no more than it needs to begin."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from common.reporting.papers import project_root
from common.stages.lean import LEFT_OUT

CODE = """
import sys
from pathlib import Path
from common.stages.lean import import_lightning
import_lightning()
import papers.avid_cma.data, papers.avid_cma.module
import common.stages.cli, common.stages.loggers, common.stages.telemetry, common.training.callbacks
loaded = {name.partition(".")[0] for name in sys.modules}
print("LOADED", sorted(loaded & {"matplotlib", "scipy", "sklearn", "transformers", "wandb"}))
from lightning_utilities.core.imports import RequirementCache, package_available
about = dict(run_id="lean", name="lean", group="tests", job_type="probe", tags=[], config={})
run = common.stages.loggers.wandb_logger(directory=Path(sys.argv[1]), **about)
print("LAUNCH", "wandb.sdk.launch" in sys.modules)
run.experiment.finish()
print("THERE", bool(RequirementCache("scipy>=1")), package_available("scipy"))
from torchmetrics.detection import MeanAveragePrecision
MeanAveragePrecision(backend="pycocotools")
"""


def test_a_stage_begins_without_plots_scipy_and_transformers(tmp_path: Path) -> None:
    """And W&B without its launch agent. What is left out is there again for whoever asks for it; so is a metric."""
    assert {"matplotlib", "scipy", "transformers"} >= LEFT_OUT
    command = [sys.executable, "-c", CODE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=project_root(), timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["LOADED []", "LAUNCH False", "THERE True True"]
