"""Measure time and memory for growing numbers of items, and check the rate of growth (`make bench GROWTH=1`)."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from assemble.reporting import charts, render
from assemble.reporting.results import find_promoted
from assemble.reporting.tables import load
from assemble.stages.plan import Selection, plan_stages
from common.data.listing import Clip, Listing
from common.data.samplers import EpochSampler
from common.memory.queue import KeyQueue
from common.metrics.generation.frechet import FeatureStatistics
from common.metrics.retrieval import caption_retrieval
from papers.avid_cma.loss import BankLoss
from papers.avid_cma.mining import mine_positives
from papers.m3p.encoder import M3P, M3PEncoder
from tests.benchmarks.speed import Step, about_machine, amount
from tests.data.media_factory import listing_of

#: One color per part. The last four colors are readable on light and dark pages.
COLORS = (*charts.SERIES, "#c0504d", "#7b61c9", "#7d8a1c", "#1f9e9e")


class Part(NamedTuple):
    """Make a step for N items. `slope` is the expected growth exponent, `projected` a published N beyond `sizes`."""

    make: Callable[[int], Step]
    sizes: list[int]
    slope: float
    projected: int | None = None


def _unit(count: int, dim: int = 128) -> torch.Tensor:
    return F.normalize(torch.randn(count, dim), dim=1)


def _bank(count: int) -> Step:
    loss, rows, index = BankLoss().allocate(count, 128), _unit(64), torch.randint(count, (64,))
    return lambda: loss(rows, rows, index)


def _mining(count: int) -> Step:
    banks = _unit(count), _unit(count)
    return lambda: mine_positives(*banks, 32)


def _queue(count: int) -> Step:
    queue, keys = KeyQueue(count, 128), _unit(64)
    return lambda: (queue.scores(keys, keys), queue.write(keys))


def _retrieval(count: int) -> Step:
    towers, owner = (_unit(count, 64), _unit(count, 64)), torch.arange(count)
    return lambda: caption_retrieval(*towers, owner)


def _pairs(count: int) -> Step:
    model = M3P(M3PEncoder(vocabulary_size=1000)).eval()
    image, tokens = torch.randn(count, 100, 768), torch.randint(5, 1000, (5 * count, 20))
    masks = torch.ones(count, 100, dtype=torch.bool), torch.ones(5 * count, 20, dtype=torch.bool)
    return torch.no_grad()(lambda: model.score_tile(image, masks[0], tokens, masks[1]))


def _fid(count: int) -> Step:
    def step() -> None:
        statistics = FeatureStatistics()
        for index in torch.arange(count).split(500):
            statistics.update(index, torch.randn(len(index), 2048))
        statistics.compute()

    return step


def _listing(count: int) -> Step:
    root = Path("/data")

    def step() -> None:
        listing = listing_of(root, [Clip(root / f"{n % 400}" / f"{n}.mp4", n % 400) for n in range(count)])
        assert Listing.of_columns(listing.columns()).fingerprint() == listing.fingerprint()

    return step


def _sampler(count: int) -> Step:
    return lambda: sum(1 for _ in EpochSampler(count, 256, 0))


def _plan(count: int) -> Step:
    return lambda: plan_stages("avid_cma", Selection(seeds=tuple(range(count)), everything=True))


def _tables(count: int) -> Step:
    source, known = load("avid_cma"), find_promoted("avid_cma", "mini")
    draw = [record for record in known if record.draw == known[0].draw]

    def step() -> None:
        # Make new records each time, since a record caches the values that tables read.
        records = [dataclasses.replace(record, seed=seed) for seed in range(count) for record in draw]
        render.fill(source, "mini", records)

    return step


PARTS = {
    "AVID's loss and its banks, 64 clips": Part(_bank, [10_000, 50_000, 250_000, 1_000_000, 2_000_000], 0),
    "mining positives": Part(_mining, [2_000, 4_000, 8_000, 16_000], 2, 1_784_108),
    "a queue of keys, 64 queries": Part(_queue, [10_000, 50_000, 250_000, 1_000_000], 1),
    "exact retrieval, a caption per image": Part(_retrieval, [1_000, 3_000, 10_000, 30_000, 100_000], 2),
    "M3P's retrieval, 5 captions per image": Part(_pairs, [1, 2, 4], 2, 1_000),
    "FID's statistics": Part(_fid, [1_000, 3_000, 10_000, 30_000], 1),
    "a listing and its columns": Part(_listing, [10_000, 100_000, 1_000_000, 3_000_000], 1),
    "an epoch's order": Part(_sampler, [10_000, 100_000, 1_000_000, 3_000_000], 1),
    "a plan of N runs": Part(_plan, [1, 10, 30, 100], 1),
    "tables of N runs": Part(_tables, [1, 10, 30, 100], 1),
}
#: Map each part to (N, seconds, bytes) for every size.
FOUND: dict[str, list[tuple[int, float, int]]] = {}


def _kilobytes(name: str) -> int:
    rows = Path("/proc/self/status").read_text().splitlines()
    return next(int(row.split()[1]) for row in rows if row.startswith(name))


def _measure(name: str, count: int) -> tuple[float, int]:
    """Return the CPU seconds of the fastest of up to five steps, and the peak memory of data and steps."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    before = _kilobytes("VmRSS:")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    step, seconds = PARTS[name].make(count), list[float]()
    while len(seconds) < 5 and sum(seconds) < 10:
        start = time.process_time()
        step()
        seconds.append(time.process_time() - start)
    return min(seconds), 1024 * (_kilobytes("VmHWM:") - before)


@pytest.mark.skipif(not os.environ.get("GROWTH"), reason="run by make bench GROWTH=1")
@pytest.mark.parametrize("name", PARTS)
def test_growth(name: str) -> None:
    part = PARTS[name]
    for size in part.sizes:
        with multiprocessing.get_context("fork").Pool(1) as pool:
            FOUND.setdefault(name, []).append((size, *pool.apply(_measure, (name, size))))
        print(name, *FOUND[name][-1], flush=True)
    assert _slope(name, 1) < part.slope + 0.3  # 0.3 more, because large sizes don't fit into the CPU's cache


def _slope(name: str, column: int) -> float:
    """Return the exponent of N at which seconds (1) or bytes (2) grow over the three largest sizes."""
    rows = np.array([(row[0], max(row[column], 1e-9)) for row in FOUND[name][-3:]])
    return float(np.polyfit(*np.log(rows).T, 1)[0])


def _drawn() -> str:
    """Plot milliseconds and megabytes of every part against N."""
    figure = charts.new_figure(860, 300)
    for left, column, unit, title in ((52, 1, 1e-3, "CPU ms"), (350, 2, 1e6, "MB")):
        axis = charts.add_axes(figure, left, 26, 220, 232)
        axis.set(xscale="log", yscale="log")
        axis.set_xlabel("N", color=charts.INK)
        axis.grid(axis="y", color=charts.LINE)
        charts.add_text(figure, left, 16, title, fontweight="bold")
        for number, (name, rows) in enumerate(FOUND.items()):
            style = ("-", "--", ":")[(number + number // len(charts.SERIES)) % 3]
            places, values = [row[0] for row in rows], [row[column] / unit for row in rows]
            axis.plot(places, values, style, color=COLORS[number], linewidth=1.5, label=name)
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.yaxis.set_major_formatter("{x:,.0f}")
        axis.minorticks_off()
    axis.legend(frameon=False, labelcolor=charts.INK, fontsize=11, loc="upper left", bbox_to_anchor=(1, 1))
    return charts.to_svg(figure, "Time and memory against N")


@pytest.fixture(scope="module", autouse=True)
def _page() -> object:
    """Write the figure and the table after the tests, into the folder of the page `BENCH`."""
    yield
    page = Path(os.environ.get("BENCH", "1"))
    if not FOUND or page.name == "1":
        return
    lines = [
        about_machine(), "", "![Time and memory against N](images/growth.svg)", "",
        "| what | N | time at the largest | grows as N to the | expected | memory at the largest | projected |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    for name, rows in FOUND.items():
        part, (size, seconds, used) = PARTS[name], rows[-1]
        later = ""
        if part.projected:
            later = f"{seconds * (part.projected / size) ** part.slope / 3600:,.0f} core hours at {part.projected:,}"
        lines.append(
            f"| {name} | {rows[0][0]:,} to {size:,} | {amount(seconds)} | {_slope(name, 1):.2f} | {part.slope:g} | "
            f"{used / 1e6:,.0f} MB, N to the {_slope(name, 2):.2f} | {later} |"
        )
    render.write({page: render.marked(page, growth="\n".join(lines)), page.parent / "images" / "growth.svg": _drawn()})
