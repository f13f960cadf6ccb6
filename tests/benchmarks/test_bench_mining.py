"""Time and memory of mining positives, against simple exact searches.

column_wise_16  blocks of 16 queries, scores [N, 16], top-k along the strided axis
row_wise_64     blocks of 64 queries, scores [64, N], top-k along the contiguous axis
ours            tiles that serve both of their sides, thresholds, no score computed twice

Process CPU time on one thread.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from papers.avid_cma.mining import mine_positives
from tests.benchmarks.speed import Line, add, amount, compare, in_turns

DIM, POSITIVES = 128, 32


def column_wise_16(video: Tensor, audio: Tensor, k: int) -> Tensor:
    parts = []
    for start in range(0, len(video), 16):
        block = slice(start, start + 16)
        scores = torch.minimum(video @ video[block].t(), audio @ audio[block].t())
        parts.append(scores.topk(k + 1, dim=0).indices[1:].t().sort(dim=1).values.int())
    return torch.cat(parts)


def row_wise_64(video: Tensor, audio: Tensor, k: int) -> Tensor:
    parts = []
    for start in range(0, len(video), 64):
        block = slice(start, start + 64)
        scores = torch.minimum(video[block] @ video.t(), audio[block] @ audio.t())
        parts.append(scores.topk(k + 1, dim=1).indices[:, 1:].sort(dim=1).values.int())
    return torch.cat(parts)


def ours(video: Tensor, audio: Tensor, k: int) -> Tensor:
    return mine_positives(video, audio, k)


SEARCHES: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "column_wise_16": column_wise_16,
    "row_wise_64": row_wise_64,
    "ours": ours,
}


def banks(num_items: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    video, audio = (F.normalize(torch.randn(num_items, DIM, generator=generator), dim=1) for _ in range(2))
    return video, audio


def test_search_is_faster() -> None:
    data = banks(20_000)
    results: dict[str, Tensor] = {}

    def kept(name: str) -> Callable[[], None]:
        def run() -> None:
            results[name] = SEARCHES[name](*data, POSITIVES)

        return run

    seconds = in_turns({name: kept(name) for name in SEARCHES}, 3, warm_up=0)
    assert torch.equal(results["ours"], results["column_wise_16"])
    assert torch.equal(results["ours"], results["row_wise_64"])
    what = "mining 32 positives of 20,000 clips"
    compare(what, "blocks of 64 rows, top-k", seconds["ours"], seconds["row_wise_64"]).stays_below(0.8)
    compare(what, "blocks of 16 columns, top-k", seconds["ours"], seconds["column_wise_16"]).stays_below(0.6)


MEASURE_PEAK = """
import ctypes, sys, threading, time
from tests.benchmarks.test_bench_mining import POSITIVES, SEARCHES, banks

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

def watch():
    global peak
    while running:
        peak = max(peak, resident())
        time.sleep(0.0005)

search = SEARCHES[sys.argv[1]]
search(*banks(256), POSITIVES)  # libraries allocate their own buffers once
data = banks(int(sys.argv[2]))
ctypes.CDLL(None).malloc_trim(0)  # memory that is free already must not hide what the search takes
before = peak = resident()
running = True
watcher = threading.Thread(target=watch)
watcher.start()
search(*data, POSITIVES)
running = False
watcher.join()
print(peak - before)
"""


def peak_growth(search: str, num_items: int) -> int:
    """Bytes by which a search raises the memory of a fresh process, at the highest, sampled twice a millisecond."""
    command = [sys.executable, "-c", MEASURE_PEAK, search, str(num_items)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_does_not_grow_with_the_square_of_the_items() -> None:
    cases = [("ours", 10_000), ("ours", 20_000), ("row_wise_64", 20_000)]
    peaks = {(search, items): peak_growth(search, items) for search, items in cases}
    ours, theirs = (amount(peaks[name, 20_000] / 2**20, "MiB") for name in ("ours", "row_wise_64"))
    ratio = peaks["ours", 20_000] / peaks["row_wise_64", 20_000]
    add(Line("mining, memory on top of 20,000 clips", "blocks of 64 rows, top-k", ours, theirs, ratio))
    limit = 5 * 20_000 * 64 * 4 + 20_000 * POSITIVES * 4  # five score blocks of 64 queries, and the output
    assert 0 < peaks["ours", 20_000] < limit
    output_growth = 10_000 * POSITIVES * 8 * 4
    assert peaks["ours", 20_000] < peaks["ours", 10_000] + output_growth
