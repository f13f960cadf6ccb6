"""Build the model and data of a recipe at the smoke scale, without a trainer."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from assemble.stages.cli import build
from assemble.stages.configuration import resolve
from papers.vx2text.data import collate

#: Arguments for a stage that starts from random weights.
WITHOUT_PARENTS = [word for name in ("text", "video", "audio") for word in (f"--model.{name}_pretrained", "null")]


def built(recipe: str, tmp_path: Path, seed: int = 0, **overrides: Any) -> Any:
    """Build the recipe's `model` and `datamodule`. Overrides are fields with `__` in place of dots."""
    arguments = [text for name, value in overrides.items() for text in (f"--{name.replace('__', '.')}", str(value))]
    run = resolve("vx2text", recipe, scale="smoke", seed=seed, arguments=arguments)
    config = run.with_placeholders(DATA=str(tmp_path), RUN=str(tmp_path))
    cli = build(run, config, {"default_root_dir": str(tmp_path), "logger": False})
    cli.datamodule.prepare_data()
    return cli


def started(recipe: str, tmp_path: Path, rank: int = 0, world: int = 1, step: int = 0, **overrides: Any) -> Any:
    """Do the same as `built`, then load weights, initialize tables, and add a minimal trainer for training steps."""
    cli = built(recipe, tmp_path, **overrides)
    cli.model._trainer = SimpleNamespace(
        global_rank=rank,
        world_size=world,
        global_step=step,
        log_every_n_steps=1,
        fit_loop=SimpleNamespace(total_batch_idx=step),
        datamodule=cli.datamodule,
        ckpt_path=None,
    )
    cli.model.setup("fit")
    cli.model.log = cli.model.log_dict = lambda *_, **__: None
    return cli


def batch_of(cli: Any, split: str = "train", count: int = 4) -> dict[str, Any]:
    """Return a batch of the first samples of a split."""
    items = cli.datamodule.items(split, training=False)
    return collate([items[number] for number in range(count)])


def gradients(module: Any, part: str) -> set[str]:
    """Return the names of a part's parameters that have a nonzero gradient."""
    return {
        name
        for name, parameter in module.get_submodule(part).named_parameters()
        if parameter.grad is not None and bool(torch.count_nonzero(parameter.grad))
    }
