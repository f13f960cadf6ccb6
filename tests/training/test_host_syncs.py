"""Check that no training step waits for its device, mixes devices, or has more operations for a larger batch.

The steps run on CUDA tensors without storage. Autograd asks the driver for devices, so the steps run in a process with
a replacement for the driver. If torch lacks CUDA, they run on CPU tensors, which only shows the operations.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from assemble.reporting.papers import existing_papers
from assemble.reporting.records import IGNORED_KEYS, SEED_KEYS, config_hash
from assemble.stages.configuration import resolve
from assemble.stages.estimate import estimate, fake_training
from assemble.stages.plan import plan_stages
from assemble.stages.recipes import scales_of
from assemble.stages.request import Selection
from assemble.stages.synthetic import NOWHERE, StopAfter
from common.memory import collective
from common.training.callbacks import StepSeed, StopOnNonFiniteLoss

CUDA = torch.device("cuda:0")
DEVICE = CUDA if torch.version.cuda else torch.device("cpu")
INNER = ("note", "__torch_dispatch__")
HARDWARE = {"paper": "gpu8", "single": "gpu1"}
ROOT = Path(__file__).parents[2]
DRIVER = """
static int device;
int cuDevicePrimaryCtxGetState(int d, unsigned *flags, int *active) { *flags = 0; *active = 1; return 0; }
int cudaGetDeviceCount(int *count) { *count = 1; return 0; }
int cudaGetDevice(int *d) { *d = device; return 0; }
int cudaSetDevice(int d) { device = d; return 0; }
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = *greatest = 0; return 0; }
int cudaStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
int cudaEventCreateWithFlags(void **event, unsigned flags) { *event = &device; return 0; }
int cudaEventRecord(void *event, void *stream) { return 0; }
int cudaEventRecordWithFlags(void *event, void *stream, unsigned flags) { return 0; }
int cudaEventDestroy(void *event) { return 0; }
int cudaStreamWaitEvent(void *stream, void *event, unsigned flags) { return 0; }
int cudaGetDeviceProperties(char *properties, int d) {
  for (int i = 0; i < 512; i++) properties[i] = 0;
  *(int *)(properties + 360) = 9;  /* compute capability */
  return 0;
}
int cudaGetDeviceProperties_v2(char *properties, int d) { return cudaGetDeviceProperties(properties, d); }
"""
#: Settings at the smoke scale: a single group of samples, since each group adds operations, and no vocabulary.
SMOKE = {
    "avid_cma": ["--batch_norm_group", "null"],
    "xmc_gan": ["--model.generator.batch_norm_group", "null", "--model.loss.negatives_group", "null"],
    "vx2text": ["--data.tokenizer.pretrained", NOWHERE],
}
#: The published sizes are tested for recipes with memories, many losses or a risk of float32. `MAIN` has all models.
PUBLISHED = ("avid_cma/cma", "xmc_gan/xmc_gan", "m3p/m3p")
MAIN = ("avid_cma/cma", "mct/mct_tag", "xmc_gan/xmc_gan", "m3p/m3p", "vx2text/small")
#: Torchvision's detector reads boxes on the host, so this recipe is left out.
WAITING = ("mct/voc_detection",)


class Watch(TorchDispatchMode):
    """Note what makes the host wait and any float64 in the last step, and count the operations and FLOPs."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: Counter[str] = Counter()
        self.flops: Counter[str] = Counter()
        self.operations = 0
        self.on = False

    def note(self, what: str) -> None:
        if self.on:
            frames = [f for f in traceback.extract_stack() if f.filename.startswith(str(ROOT)) and f.name not in INNER]
            lines = [f"{Path(f.filename).name}:{f.lineno}" for f in frames if ".venv" not in f.filename]
            self.notes[f"{what} at {' < '.join(lines[:-3:-1])}"] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        name = func.overloadpacket.__name__
        if not any(tensor.device.type == DEVICE.type for tensor in tensors) and name != "_to_copy":
            return func(*args, **kwargs)
        self.operations += self.on
        if name == "_fused_sgd_":
            return None  # fake tensors don't support it
        if name == "_local_scalar_dense" and args[0].is_cuda:
            self.note("read")
            return 1.0 if args[0].is_floating_point() else 1
        if name in ("_to_copy", "copy_"):
            source = args[1] if name == "copy_" else args[0]
            target = args[0].device if name == "copy_" else torch.device(kwargs.get("device") or source.device)
            if source.device.type != target.type:
                waits = not (target.type == "cuda" and (args[2:] or [kwargs.get("non_blocking")])[0])
                if waits:
                    self.note(f"copy from {source.device.type} to {target.type}")
                if name == "_to_copy":
                    dtype = kwargs.get("dtype") or source.dtype
                    return torch.empty_strided(source.shape, source.stride(), dtype=dtype, device=target)
        result = func(*args, **kwargs)
        if any(leaf.dtype == torch.float64 for leaf in tree_leaves(result) if isinstance(leaf, Tensor)):
            self.note(f"float64 of {func}")
        if self.on and func.overloadpacket in flop_registry:
            count = flop_registry[func.overloadpacket](*args, **kwargs, out_val=result)
            self.flops[str(tensors[0].dtype)] += count
        return result


class Last(pl.Callback):
    def __init__(self, watch: Watch, batches: int) -> None:
        self.watch = watch
        self.batches = batches

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.watch.on = batch_idx + 1 == self.batches

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.watch.on = False


def step(case: str) -> dict[str, Any]:
    watch = Watch()
    if case == "planted":
        plant(watch)
        return {"case": case, "notes": watch.notes}
    paper, recipe, scale, precision, size = case.split("/")
    arguments = ["--trainer.precision", precision]
    if scale == "smoke":
        arguments += SMOKE.get(paper, [])
    run = resolve(paper, recipe, scale=scale, hardware=HARDWARE.get(scale, "cpu"), arguments=arguments)
    batches = 1 if scale == "smoke" else 2  # the first step creates the optimizers' state
    callbacks = [StepSeed(), Last(watch, batches), StopAfter(batches)]
    if DEVICE == CUDA:
        callbacks.insert(1, StopOnNonFiniteLoss(NOWHERE))  # on the CPU it would read every loss
    _, meter, _ = fake_training(run, int(size) or None, DEVICE, watch, callbacks)
    seen = {"notes": watch.notes, "flops": watch.flops, "operations": watch.operations}
    return {"case": case, "peak": meter.peak, **seen}


def plant(watch: Watch) -> None:
    with FakeTensorMode(), watch:
        watch.on = True
        values = torch.zeros(4, device=CUDA)
        assert float(values.sum()) == 1.0  # reads the value, which is arbitrary
        values.cpu()
        values.copy_(torch.zeros(4))
        values.copy_(torch.zeros(4), non_blocking=True)
        torch.tensor([1.0, 2.0], device=CUDA)
        values.double()
        with pytest.raises(DynamicOutputShapeException):
            values[values > 0]
        with pytest.raises(RuntimeError, match="at least two devices"):
            values + torch.zeros(4)
        collective.is_distributed = lambda: True
        collective.mean_over_ranks = lambda tensor: tensor
        assert collective.share_of_mean(3, CUDA).is_cuda  # type: ignore[union-attr]


def steps(cases: list[str], folder: Path) -> list[dict[str, Any]]:
    """Run the steps in a process with a replacement for the driver, and return the results."""
    environment = dict(os.environ)
    if DEVICE == CUDA:
        compiler = shutil.which("cc")
        if compiler is None or torch.cuda.is_available():
            pytest.skip("needs a C compiler and no GPU")
        source, library = folder / "driver.c", folder / "libcuda.so.1"
        source.write_text(DRIVER)
        subprocess.run([compiler, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, source], check=True)
        environment["LD_PRELOAD"] = str(library)
    command = [sys.executable, "-m", "tests.training.test_host_syncs", *cases]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def check(results: list[dict[str, Any]]) -> None:
    for result in results:
        total = sum(result["flops"].values())
        share = result["flops"].get("torch.float32", 0) / total
        print(f"{result['case']}: {share:.2%} of {total / 1e12:.3g} TFLOP in float32, {result['peak'] / 1e9:.1f} GB")
        assert not result["notes"] or DEVICE != CUDA, result
        assert share < 0.01 or "32-true" in result["case"], result


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Run all cases in one process, since a process takes seconds to start, and return the results."""
    published = [f"{name}/paper/bf16-mixed/0" for name in PUBLISHED]
    small = [f"{name}/smoke/32-true/{size}" for name in MAIN for size in (2, 4)]
    planted = ["planted"] if DEVICE == CUDA else []
    made = steps([*published, *small, *planted], tmp_path_factory.mktemp("cuda"))
    return {result["case"]: result for result in made}


def test_published_steps_of_the_main_recipes_stay_on_the_device_and_in_bfloat16(
    results: dict[str, dict[str, Any]],
) -> None:
    check([results[f"{name}/paper/bf16-mixed/0"] for name in PUBLISHED])
    for name in PUBLISHED:
        precision = ["--trainer.precision", "bf16-mixed"]
        run = resolve(*name.split("/"), scale="paper", hardware="gpu8", arguments=precision)
        # The estimate was computed for the CPU.
        assert estimate(run).peak_bytes == pytest.approx(results[f"{name}/paper/bf16-mixed/0"]["peak"], rel=0.1)


@pytest.mark.parametrize("name", MAIN)
def test_a_larger_batch_needs_no_more_operations(name: str, results: dict[str, dict[str, Any]]) -> None:
    small, large = (results[f"{name}/smoke/32-true/{size}"]["operations"] for size in (2, 4))
    assert small == large > 0, "a loop over the samples of a batch"
    assert not results[f"{name}/smoke/32-true/4"]["notes"] or DEVICE != CUDA


@pytest.mark.skipif(DEVICE != CUDA, reason="needs a torch for CUDA")
def test_the_watch_sees_what_waits(results: dict[str, dict[str, Any]]) -> None:
    kinds = Counter(note.split(" at ")[0] for note in results["planted"]["notes"])
    copies = {"copy from cuda to cpu": 1, "copy from cpu to cuda": 2}
    assert kinds == {"read": 1, **copies, "float64 of aten._to_copy.default": 1}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("paper", [paper.name for paper in existing_papers()])
def test_published_steps_of_every_recipe(paper: str, precision: str, tmp_path: Path) -> None:
    runs = {}
    for scale in {"paper", "single"} & set(scales_of(paper)):
        for item in plan_stages(paper, Selection(scale=scale, hardware=HARDWARE[scale])):
            if item.run.trains and f"{paper}/{item.run.recipe}" not in WAITING:
                key = config_hash(item.run.config, IGNORED_KEYS | SEED_KEYS)
                runs[key] = f"{paper}/{item.run.recipe}/{scale}/{precision}/0"
    cases = sorted(set(runs.values()))
    results = steps(cases, tmp_path)
    assert len(results) == len(cases)
    check(results)


if __name__ == "__main__":
    # Nothing must use the fake device, but autocast must be on.
    torch.cuda.is_available = lambda: False
    torch.cuda.current_device = lambda: 0
    torch.cuda.is_bf16_supported = lambda *_: True
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    Tensor.pin_memory = lambda self, *_: self  # type: ignore[method-assign]
    for name in sys.argv[1:]:
        print(json.dumps(step(name)), flush=True)
