"""Build a stage from its merged configuration, with LightningCLI."""

from __future__ import annotations

import functools
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from assemble.stages.configuration import RunConfiguration, check_arguments, check_keys, take_switches
from assemble.stages.layers import Layer, classes_in, merge, place
from assemble.stages.lightning_workarounds import dump_without_validation, whole_number_limits
from assemble.stages.request import StageRequest
from common.errors import ConfigurationError
from common.training.callbacks import SamplesForAll, SpacedCheckpoints
from common.training.switches import ApplySwitches, Switches
from common.types import class_at


class StageCLI(LightningCLI):
    """Builds trainer, model and data of one stage from a configuration without placeholders. Runs nothing."""

    def __init__(self, config: dict[str, Any], trainer_arguments: dict[str, Any] | None = None) -> None:
        self._limits = whole_number_limits(config.get("trainer"))
        self._trainer_arguments = {**self._limits, **(trainer_arguments or {})}
        self.stated_switches, without = take_switches(config)
        self.switches = Switches(**self.stated_switches)  # type: ignore[arg-type]
        super().__init__(
            args=without,
            run=False,
            save_config_callback=None,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            parser_kwargs={"exit_on_error": False},
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the mapping, without the parent's warning about sys.argv."""
        try:
            self.config = parser.parse_object(args)
        except Exception as error:
            raise ConfigurationError(_brief(error)) from None

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        extra = dict(self._trainer_arguments)
        spaced = SpacedCheckpoints(self.switches.checkpoint_minutes)
        callbacks = [*extra.pop("callbacks", []), ApplySwitches(self.switches), SamplesForAll(), spaced]
        configured = self._get(self.config_init, "trainer", default={})
        if extra.get("logger"):
            # Keep our loggers, which the record needs, and add the user's.
            theirs = configured.get("logger")
            listed = theirs if isinstance(theirs, list) else [] if isinstance(theirs, bool | None) else [theirs]
            extra["logger"] = [*extra["logger"], *listed]
        trainer_config = {**configured, **extra, **kwargs}
        try:
            return self._instantiate_trainer(trainer_config, callbacks)
        except (MisconfigurationException, TypeError, ValueError) as error:
            raise ConfigurationError(
                f"trainer: {' '.join(str(error).split())} (--hardware, a file in configs/hardware, and --trainer.* set "
                "devices and accelerator)"
            ) from None

    def _dump_config(self) -> None:
        dump_without_validation(self)
        super()._dump_config()

    def resolved(self) -> dict[str, Any]:
        """Return the configuration with all defaults, as plain data."""
        self._dump_config()
        model = self.config_dump["model"]
        model["init_args"] = {**(model.get("init_args") or {}), **self.stated_switches}
        self.config_dump["trainer"].update(self._limits)
        return self.config_dump


def _brief(error: Exception) -> str:
    """Shorten jsonargparse's message to the field and its problem."""
    lines = [line.strip().removeprefix("- ") for line in str(error).splitlines()]
    keys = [line.split('"')[1] for line in lines if line.startswith('Parser key "')]
    problem = "; ".join(dict.fromkeys(line for line in lines if line and not line.startswith(_NOISE)))
    for plain, word in _WORDS.items():
        problem = problem.replace(plain, word)
    return f"{'.'.join(keys)}: {problem}" if keys else problem


#: Lines in which jsonargparse lists the types that it tried.
_NOISE = (
    "Parser key", "Does not validate", "Subtypes:", "Errors:", "Problem with given class_path", "Given value",
    "For further", "Expected a <class 'NoneType'>",
)  # fmt: skip
_WORDS = {
    "Expected a <class 'float'>": "expected a number",
    "Expected a <class 'int'>": "expected a whole number",
    "Expected a <class 'bool'>": "expected true or false",
    "Expected a <class 'str'>": "expected a text",
    "typing.Literal": "one of ",
}


class _Parsed(StageCLI):
    """Checks the types of a configuration and builds nothing."""

    def _set_seed(self) -> None: ...

    def instantiate_classes(self) -> None:
        """Build nothing."""


def check(request: StageRequest) -> None:
    """Check names, types and ranges in a stage's configuration. Build only the loss, without storage."""
    run = request.configuration
    config = run.with_placeholders(DATA="data", RUN="run")
    parents = [Layer(f"tables.yaml, from {name}", place(config, name, None)) for name in request.parents]
    started = functools.reduce(merge, (layer.content for layer in parents), config)
    try:
        check_keys(take_switches(started)[1], parents)
        check_arguments(started, [*run.layers, *parents])
        _Parsed(config)
        for path, node in classes_in(config["model"]):
            if path.rpartition(".")[2] == "loss":  # it refuses arguments that don't fit together
                try:
                    with torch.device("meta"):
                        class_at(node["class_path"])(**node.get("init_args") or {})
                except ValueError:
                    raise
                except Exception:  # it needs storage or files, which only the stage has
                    continue
    except ValueError as error:
        raise ConfigurationError(f"{run.paper}/{run.recipe}: {error}") from None


def build(run: RunConfiguration, config: dict[str, Any], trainer_arguments: dict[str, Any] | None = None) -> StageCLI:
    """Check the merged configuration, then build trainer, model and data."""
    check_arguments(config, run.layers)
    try:
        cli = StageCLI(config, trainer_arguments)
    except ConfigurationError:
        raise
    except ValueError as error:
        raise ConfigurationError(_brief(error)) from error
    if cli.switches.batch_norm_group is not None and run.trains and run.config["trainer"].get("sync_batchnorm"):
        raise ConfigurationError(
            "trainer.sync_batchnorm normalizes over all samples, but batch_norm_group over fewer: remove one of them"
        )
    return cli
