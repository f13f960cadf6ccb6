"""Encoders of a trained model as programs of `torch.export`, which run without this code.

A folder holds `<modality>.pt2` for each encoder that takes only tensors, and a page on its inputs. Every program is
read back from its file and compared with the model at other batch sizes.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from common.errors import StageError
from common.files import whole_folder
from common.stages.export import Encoder, TrainedModel, check_free
from common.stages.paper_modules import CARD

#: Largest difference between program and model, relative to the largest output: a few roundings of float32.
TOLERANCE = 1e-5
#: Batch sizes of the comparison; a program is made with 2.
BATCHES = (1, 3)


def write_programs(model: type[TrainedModel], checkpoint: str | Path, output: str | Path) -> tuple[Path, list[str]]:
    """Write the encoders of a stage or an export into a new folder; returns it, and a line per program."""
    output = Path(output)
    check_free(output)
    told = []
    with whole_folder(output) as partial:
        for name, encoder in model.from_export(checkpoint).encoders().items():
            path = partial / f"{name}.pt2"
            difference = _write(encoder.eval(), path)
            shapes = ", ".join(f"{str(x.dtype).removeprefix('torch.')} {_shape(x)}" for x in encoder.inputs)
            told.append(f"{path.name}: {shapes} -> [B, {encoder.width}], differs from the model by {difference:.1e}")
        (partial / CARD).write_text(_page(model, told), encoding="utf-8")
    return output, told


def _write(encoder: Encoder, path: Path) -> float:
    """Write a program; returns its largest difference from the encoder, relative to the largest value."""
    dims = tuple(
        {0: torch.export.Dim.DYNAMIC} | ({} if x.is_floating_point() else {1: torch.export.Dim.DYNAMIC})
        for x in encoder.inputs
    )
    with torch.no_grad():
        program = torch.export.export(encoder, encoder.inputs, dynamic_shapes=(dims,))
        torch.export.save(program, path)
        loaded = torch.export.load(path).module()
        worst = 0.0
        for batch in BATCHES:
            inputs = tuple(torch.cat([x, x.flip(0)])[:batch] for x in encoder.inputs)
            expected = encoder(*inputs)
            found = float((loaded(*inputs) - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
            if not found <= TOLERANCE:  # nor is NaN
                raise StageError(
                    f"{path.name}: the program differs from the model by {found:.1e}, more than {TOLERANCE:.0e}"
                )
            worst = max(worst, found)
    return worst


def _shape(x: Tensor) -> str:
    sizes = [str(size) for size in x.shape[1:]]
    if not x.is_floating_point():
        sizes[0] = "L"
    return f"[{', '.join(['B', *sizes])}]"


def _page(model: type[TrainedModel], told: list[str]) -> str:
    lines = "\n".join(f"- {line}" for line in told)
    return f"""# Encoders of {model.__name__}

{lines}

```python
import torch
encode = torch.export.load("{told[0].partition(":")[0]}").module()
```

What goes in is what `read_...` of `{model.__name__}` gives, of video and sound clip by clip. These
files are programs: load them only from those whose code you would run.
"""
