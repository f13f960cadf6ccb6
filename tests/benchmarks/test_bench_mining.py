"""Time and memory of mining positives, against simple exact searches.

Run with `pytest tests/benchmarks/test_bench_mining.py --benchmark-only`.

column_wise_16  blocks of 16 queries, scores [N, 16], top-k along the strided axis
row_wise_64     blocks of 64 queries, scores [64, N], top-k along the contiguous axis
ours            tiles that serve both of their sides, thresholds, no score computed twice

Process CPU time on one thread; `test_search_is_faster` takes the three in one process.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from papers.avid_cma.mining import mine_positives

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


@pytest.mark.benchmark(timer=time.process_time)
@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("num_items", [2_500, 5_000, 10_000, 20_000])
def test_search(benchmark: Any, num_items: int, search: str) -> None:
    benchmark.group = f"mining, N={num_items}"
    benchmark.pedantic(SEARCHES[search], (*banks(num_items), POSITIVES), rounds=2, warmup_rounds=1)


def test_search_is_faster(benchmark: Any) -> None:
    data = banks(20_000)
    seconds: dict[str, float] = dict.fromkeys(SEARCHES, float("inf"))
    results: dict[str, Tensor] = {}

    def compare() -> None:
        for _ in range(2):
            for name, search in SEARCHES.items():
                start = time.process_time()
                results[name] = search(*data, POSITIVES)
                seconds[name] = min(seconds[name], time.process_time() - start)

    benchmark.pedantic(compare, rounds=1)
    benchmark.extra_info.update({name: round(value, 2) for name, value in seconds.items()})
    print(f"\nseconds: {benchmark.extra_info}")
    assert torch.equal(results["ours"], results["column_wise_16"])
    assert torch.equal(results["ours"], results["row_wise_64"])
    assert seconds["ours"] < seconds["row_wise_64"]
    assert seconds["column_wise_16"] > 1.5 * seconds["ours"]


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
def test_memory_does_not_grow_with_the_square_of_the_items(benchmark: Any) -> None:
    peaks: dict[tuple[str, int], int] = {}

    def measure() -> None:
        for search, num_items in [("ours", 10_000), ("ours", 20_000), ("row_wise_64", 20_000)]:
            peaks[search, num_items] = peak_growth(search, num_items)

    benchmark.pedantic(measure, rounds=1)
    mebibytes = {f"{search}_{num_items}": round(peak / 2**20, 1) for (search, num_items), peak in peaks.items()}
    benchmark.extra_info.update(mebibytes)
    print(f"\npeak growth in MiB: {mebibytes}")
    limit = 5 * 20_000 * 64 * 4 + 20_000 * POSITIVES * 4  # five score blocks of 64 queries, and the output
    assert 0 < peaks["ours", 20_000] < limit
    output_growth = 10_000 * POSITIVES * 8 * 4
    assert peaks["ours", 20_000] < peaks["ours", 10_000] + output_growth
