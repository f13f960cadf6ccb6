"""The measurement of a step on the CPU, at the smallest widths: the code that runs on a GPU, but for its events."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from common.commands.main import main
from common.errors import ReportingError
from common.reporting import gpu
from common.reporting.render import between_markers
from common.stages.gpu_check import is_big


def test_a_step_is_measured_kept_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["gpu-check", "mct", "--recipe", "moco_v2", "--device", "cpu", "--small", "--precision", "32-true"]
    command += ["--steps", "2", "--output", str(tmp_path)]
    assert main([*command, "--model.loss.queue_size", "64"]) == 0
    assert "where the time goes" in capsys.readouterr().out
    (step,) = gpu.find(tmp_path)
    assert (step.paper, step.recipe, step.batch, step.steps) == ("mct", "moco_v2", 4, 2)
    assert step.seconds > 0
    assert step.flops > 1e6
    assert step.matrix_rate > 1e8
    assert 0 < step.rate_share < 1.5
    assert step.outside_big_share is not None
    assert 0 < step.outside_big_share < 1
    assert 1 <= len(step.kernels) <= 10
    assert any(kernel["big"] for kernel in step.kernels)
    assert step.host_waits is None
    # A small one is no result; one at paper scale is shown, and the other papers are said to be missing.
    assert "moco_v2" not in gpu.markdown([step])
    page = gpu.markdown([replace(step, scale="paper", host_waits=2.0, idle_share=0.25)])
    assert "| MCT | moco_v2 |" in page
    assert "| 25% | 2 |" in page
    assert page.count("not measured yet") == 4


def test_what_is_no_measurement_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps({"paper": "mct"}), encoding="utf-8")
    with pytest.raises(ReportingError, match=r"wrong\.json is no measurement"):
        gpu.find(tmp_path)


def test_a_machine_without_a_gpu_is_told_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["gpu-check", "avid", "--steps", "1"]) == 1
    assert "finds no GPU" in capsys.readouterr().out
    assert main(["gpu-check", "--recipe", "avid"]) == 2


def test_the_page_shows_what_was_measured() -> None:
    text = gpu.page().read_text(encoding="utf-8")
    new = between_markers(text, gpu.MARKERS, gpu.markdown(gpu.find()), "docs/gpu.md")
    assert new == text, "run `assemble gpu-check`, or gpu.render()"


@pytest.mark.parametrize(
    ("name", "big"),
    [
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", True),
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NNT", True),
        ("void cudnn::engines_precompiled::nchwToNhwcKernel<__half>", False),
        ("sm80_xmma_fprop_implicit_gemm_bf16f32_nhwc", True),
        ("void at::native::vectorized_elementwise_kernel<4, CUDAFunctor_add>", False),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80", True),
        ("void cudnn::bn_fw_tr_1C11_kernel_NCHW", False),
        ("aten::convolution_backward", True),
    ],
)
def test_kernels_are_told_apart(name: str, big: bool) -> None:
    assert is_big(name) == big
