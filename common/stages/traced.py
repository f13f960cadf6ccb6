"""Encoders of a trained model as programs of `torch.export`, which run without this code, and are the same.

A folder holds `<modality>.pt2` for each encoder that takes tensors and a page that says what goes in. Every program is
read back from its file and compared with the model, at other batch sizes than the one that it was made with.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from common.errors import StageError
from common.files import whole_folder
from common.stages.export import Encoder, TrainedModel
from common.stages.parts import CARD

#: Largest difference between program and model, relative to the largest output: a few roundings of float32.
TOLERANCE = 1e-5
#: Batch sizes at which they are compared; a program is made with 2.
BATCHES = (1, 3)


def write_traced(model: type[TrainedModel], checkpoint: str | Path, output: str | Path) -> tuple[Path, list[str]]:
    """Write the encoders of a trained model as programs; the folder appears whole or not at all.

    Args:
        model: its class.
        checkpoint: `checkpoints/last.ckpt` of a finished stage, or the folder of an export.
        output: the folder; it must be new or empty.

    Returns:
        `output`, and a line for each program.

    Raises:
        StageError: the model cannot be read or has no such encoder, the folder is taken, or a program gives something
            else than the model.
    """
    output = Path(output)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise StageError(f"--output {output} is taken: give a new folder")
    encoders = model.from_export(checkpoint).encoders()
    if not encoders:
        raise StageError(
            f"{model.paper} has no encoder that takes tensors alone; `--layout safetensors` holds all of it"
        )
    told = []
    with whole_folder(output) as partial:
        for name, encoder in encoders.items():
            path = partial / f"{name}.pt2"
            difference = _write(encoder.eval(), path)
            shapes = ", ".join(f"{str(x.dtype).removeprefix('torch.')} {_shape(x)}" for x in encoder.inputs)
            told.append(f"{path.name}: {shapes} -> [B, {encoder.width}], differs from the model by {difference:.1e}")
        (partial / CARD).write_text(_page(model, told), encoding="utf-8")
    return output, told


def _write(encoder: Encoder, path: Path) -> float:
    """Write a program; returns by how much what it gives differs from the encoder's, relative to the largest value."""
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
            expected, found = encoder(*inputs), loaded(*inputs)
            if found.shape != expected.shape:
                raise StageError(
                    f"{path.name}: the program gives {list(found.shape)}, the model {list(expected.shape)}"
                )
            worst = max(worst, float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12)))
    if not worst <= TOLERANCE:
        raise StageError(f"{path.name}: the program differs from the model by {worst:.1e}, more than {TOLERANCE:.0e}")
    return worst


def _shape(x: Tensor) -> str:
    sizes = [str(size) for size in x.shape[1:]]
    if not x.is_floating_point():
        sizes[0] = "L"
    return f"[{', '.join(['B', *sizes])}]"


def _page(model: type[TrainedModel], told: list[str]) -> str:
    lines = [
        f"# Encoders of {model.__name__}",
        "",
        *(f"- `{line.partition(':')[0]}`:{line.partition(':')[2]}" for line in told),
        "",
        "```python",
        "import torch",
        f'encode = torch.export.load("{told[0].partition(":")[0]}").module()',
        "```",
        "",
        f"What goes in is what `read_...` of `{model.__name__}` gives, of video and sound clip by clip. These",
        "files are programs: load them only from those whose code you would run.",
    ]
    return "\n".join(lines) + "\n"
