"""Test memory banks, queues of keys, momentum encoders, and groups of a batch on any number of devices."""

from __future__ import annotations

import copy
import io
from collections import deque

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from common.memory.bank import MemoryBank, last_occurrence
from common.memory.collective import all_gather_rows
from common.memory.groups import groups_here, join_groups, require_groups, split_groups
from common.memory.momentum import MomentumPair
from common.memory.queue import KeyQueue
from tests.distributed.harness import run_distributed


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


@given(
    index=st.lists(st.integers(0, 11), min_size=1, max_size=20),
    momentum=st.floats(0, 1),
    seed=st.integers(0, 50),
)
@settings(max_examples=50)
def test_update_is_the_sequential_loop(index: list[int], momentum: float, seed: int) -> None:
    bank, embeddings = MemoryBank(12, 6, momentum), unit(len(index), 6, seed=seed + 1)
    bank.vectors.copy_(unit(12, 6, seed=seed))
    before = bank.vectors.clone()
    expected = before.clone()
    for row, embedding in zip(index, embeddings):
        # If an item occurs twice, each occurrence is averaged with the old row, and the last result stays.
        expected[row] = F.normalize(momentum * before[row] + (1 - momentum) * embedding, dim=0)
    bank.write(torch.tensor(index), embeddings)
    torch.testing.assert_close(bank.vectors, expected)
    torch.testing.assert_close(bank.vectors.norm(dim=1), torch.ones(12))
    untouched = [row for row in range(12) if row not in index]
    assert torch.equal(bank.vectors[untouched], before[untouched])


@given(st.lists(st.integers(0, 8), min_size=1, max_size=30))
@settings(max_examples=50)
def test_last_occurrence(index: list[int]) -> None:
    expected = [len(index) - 1 - index[::-1].index(item) for item in index]
    assert last_occurrence(torch.tensor(index)).tolist() == expected


# -- writing -----------------------------------------------------------------------------------------------------------


@given(
    size=st.integers(1, 9),
    batches=st.lists(st.integers(0, 21), min_size=1, max_size=8),
    with_tags=st.booleans(),
)
@settings(max_examples=60)
def test_any_batches_are_first_in_first_out(size: int, batches: list[int], with_tags: bool) -> None:
    queue = KeyQueue(size, 4, tag_count=3 if with_tags else 0)
    initial = queue.vectors.clone()
    reference: deque[tuple[torch.Tensor, int, list[bool]]] = deque(maxlen=size)
    written = 0
    for step, batch in enumerate(batches):
        keys = unit(batch, 4, seed=step)
        ids = torch.arange(written, written + batch)
        tags = torch.stack([(ids >> bit) % 2 == 1 for bit in range(3)], dim=1)
        queue.write(keys, ids, tags if with_tags else None)
        for key, number, row in zip(keys, ids.tolist(), tags.tolist()):
            reference.append((key, number, row))
        written += batch
    assert queue.pointer.item() == written % size
    # Start at the oldest row. In a full queue, the oldest row follows the newest.
    slots = [(written - len(reference) + position) % size for position in range(len(reference))]
    for slot, (key, number, row) in zip(slots, reference):
        assert torch.equal(queue.vectors[slot], key)
        assert queue.image_id[slot] == number
        if with_tags:
            assert queue.tags[slot].tolist() == row
    assert queue.valid.sum() == len(reference)
    untouched = ~queue.valid
    assert torch.equal(queue.vectors[untouched], initial[untouched])
    assert (queue.image_id[untouched] == -1).all()


def test_initial_keys_are_random_unit_vectors_given_by_the_seed() -> None:
    torch.manual_seed(0)
    queue = KeyQueue(2000, 16, seed=3)
    torch.testing.assert_close(queue.vectors.norm(dim=1), torch.ones(2000))
    assert queue.vectors.mean(dim=0).abs().max() < 0.03
    torch.manual_seed(1)
    assert torch.equal(KeyQueue(2000, 16, seed=3).vectors, queue.vectors)
    assert not torch.equal(KeyQueue(2000, 16, seed=4).vectors, queue.vectors)


def test_keys_without_images_are_unknown_again() -> None:
    queue = KeyQueue(4, 4)
    queue.write(unit(4, 4), torch.arange(4))
    queue.write(unit(2, 4))
    assert queue.image_id.tolist() == [-1, -1, 2, 3]


# -- masks and tags ----------------------------------------------------------------------------------------------------


def test_masks_of_both_warm_modes() -> None:
    anchors = torch.tensor([7, 8, -1])
    for warm in ("random", "masked"):
        queue = KeyQueue(5, 4, warm=warm)  # type: ignore[arg-type]
        queue.write(unit(3, 4), torch.tensor([7, 7, 9]))
        empty = warm == "random"
        everything = queue.negatives_mask()
        assert (everything is None) == empty
        assert everything is None or everything.tolist() == [[True, True, True, False, False]]
        mask = queue.negatives_mask(anchors)
        assert mask is not None
        assert mask.tolist() == [
            [False, False, True, empty, empty],
            [True, True, True, empty, empty],
            [True, True, True, empty, empty],  # two unknown images are not the same
        ]


@given(st.integers(1, 6), st.integers(1, 30), st.integers(1, 12), st.floats(0, 3, width=32), st.integers(0, 99))
@settings(max_examples=40)
def test_shared_tags_are_counted_one_by_one(batch: int, size: int, count: int, epsilon: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    anchors, stored = rng.random((batch, count)) < 0.4, rng.random((size, count)) < 0.4
    written = int(rng.integers(0, size + 1))
    queue = KeyQueue(size, 4, tag_count=count)
    queue.write(unit(written, 4), tags=torch.from_numpy(stored[:written]))
    expected = [
        [slot < written and int((anchor & stored[slot]).sum()) > epsilon for slot in range(size)] for anchor in anchors
    ]
    for tags in (torch.from_numpy(anchors), torch.from_numpy(anchors).long(), torch.from_numpy(anchors).half()):
        assert queue.shared_tags(tags, epsilon).tolist() == expected


def test_shared_tags_are_exact_for_many_tags_under_autocast() -> None:
    queue = KeyQueue(3, 2, tag_count=3001)
    tags = torch.ones(3, 3001, dtype=torch.bool)
    tags[1, 0] = False
    queue.write(unit(3, 2), tags=tags)
    with torch.autocast("cpu", torch.bfloat16):
        assert queue.shared_tags(tags[:1], 3000.5).tolist() == [[True, False, True]]


# -- restore -----------------------------------------------------------------------------------------------------------


def test_a_restored_queue_goes_on_exactly() -> None:
    def batch(step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return unit(3, 4, seed=step), torch.arange(3) + 3 * step, torch.rand(3, 2) < 0.5

    queue = KeyQueue(7, 4, tag_count=2, warm="masked")
    for step in range(4):
        queue.write(*batch(step))
    file = io.BytesIO()
    torch.save(queue.state_dict(), file)
    file.seek(0)
    restored = KeyQueue(7, 4, tag_count=2, warm="masked", seed=9)
    restored.load_state_dict(torch.load(file, weights_only=True))
    copied = copy.deepcopy(queue)
    after = batch(4)
    for each in (queue, restored, copied):
        each.write(*after)
    for name, value in queue.state_dict().items():
        assert torch.equal(restored.state_dict()[name], value)
        assert torch.equal(copied.state_dict()[name], value)


# -- two processes -----------------------------------------------------------------------------------------------------


def test_ranks_write_the_joint_batch_in_rank_order() -> None:
    def written(rank: int) -> dict[str, torch.Tensor]:
        queue = KeyQueue(7, 4, tag_count=2, seed=rank)
        queue.synchronize()
        for step in range(2):
            ids = torch.arange(3) + 3 * rank + 6 * step
            queue.write(*all_gather_rows(unit(12, 4)[ids], ids, torch.stack([ids % 2, ids % 3], dim=1)))
        queue.check_replicas()
        return queue.state_dict()

    alone = KeyQueue(7, 4, tag_count=2, seed=0)
    for step in range(2):
        ids = torch.arange(6) + 6 * step
        alone.write(unit(12, 4)[ids], ids, torch.stack([ids % 2, ids % 3], dim=1))
    for state in run_distributed(written):
        for name, value in alone.state_dict().items():
            np.testing.assert_array_equal(state[name], value)


# -- scores ------------------------------------------------------------------------------------------------------------


def squares(positive: torch.Tensor, negatives: torch.Tensor) -> torch.Tensor:
    return (negatives - positive[:, None]).pow(2).mean()


@pytest.mark.parametrize("block_bytes", [1, 200, 1 << 20])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_equal_plain_autograd(
    monkeypatch: pytest.MonkeyPatch, block_bytes: int, stored: torch.dtype, dtype: torch.dtype
) -> None:
    monkeypatch.setattr("common.memory.queue._BLOCK_BYTES", block_bytes)
    queue = KeyQueue(11, 6).to(stored)
    queries, keys = unit(4, 6, seed=1).to(dtype), unit(4, 6, seed=2).to(dtype)
    queries.requires_grad_()
    plain = (queries * keys).sum(1), queries @ queue.vectors.to(dtype).T
    (expected,) = torch.autograd.grad(3 * squares(*plain), queries)
    scores = queue.scores(queries, keys)
    (gradient,) = torch.autograd.grad(3 * squares(*scores), queries)
    torch.testing.assert_close(scores, plain)
    torch.testing.assert_close(gradient, expected)
    with torch.no_grad():
        torch.testing.assert_close(queue.scores(queries, keys), plain)


def test_a_queue_that_is_written_before_the_backward_pass_is_an_error_and_no_wrong_gradient() -> None:
    queue, queries = KeyQueue(5, 6), unit(4, 6, seed=1).requires_grad_()
    loss = squares(*queue.scores(queries, unit(4, 6, seed=2)))
    queue.write(unit(4, 6, seed=2))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_scores_are_float32_under_autocast_and_scale_with_a_loss_scale() -> None:
    queries, keys, queue = unit(4, 6, seed=1).requires_grad_(), unit(4, 6, seed=2), KeyQueue(9, 6)
    expected = torch.autograd.grad(squares(*queue.scores(queries, keys)), queries)[0]
    with torch.autocast("cpu", torch.bfloat16):
        scores = queue.scores(queries, keys)
    assert {score.dtype for score in scores} == {torch.float32}
    gradient = torch.autograd.grad(squares(*scores) * 1024, queries)[0] / 1024
    assert torch.equal(gradient, expected)


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))


def test_buffers_are_copied() -> None:
    pair = MomentumPair(network())
    pair.query(torch.randn(8, 4) + 3)
    pair.update(0.5)
    query, key = pair.query[1], pair.key[1]  # type: ignore[index]
    assert torch.equal(key.running_mean, query.running_mean)
    assert int(key.num_batches_tracked) == 1


def test_the_average_starts_as_a_copy_without_gradient_and_trains_along() -> None:
    query = network()
    pair = MomentumPair(query)
    assert pair.query is query
    for key, source in zip(pair.key.parameters(), query.parameters()):
        assert torch.equal(key, source)
        assert key.data_ptr() != source.data_ptr()
        assert not key.requires_grad
    assert pair.key.training
    assert not pair.eval().key.training
    assert pair.train().key.training
    rows = torch.randn(6, 4)
    (query(rows) - pair.key(rows)).pow(2).sum().backward()
    assert all(key.grad is None for key in pair.key.parameters())
    assert all(source.grad is not None for source in query.parameters())
    pair.update(0.9)
    assert not any(key.requires_grad for key in pair.key.parameters())


def group_of(size: int, batch_size: int, processes: int) -> dict[int, frozenset[int]]:
    """Return the group of every sample, computed as the ranks do."""
    found: dict[int, frozenset[int]] = {}
    own = {rank: torch.arange(batch_size)[rank::processes] for rank in range(processes)}
    for rank, samples in own.items():
        count = groups_here("size", len(samples), size)
        apart = max(1, processes * len(samples) // size) if len(samples) < size else processes
        for place in range(count):
            members = torch.cat([split_groups(own[r], count)[place] for r in range(rank % apart, processes, apart)])
            found |= {int(sample): frozenset(members.tolist()) for sample in split_groups(samples, count)[place]}
    return found


@pytest.mark.parametrize("processes", [1, 2, 4, 8, 16])
def test_a_group_is_the_same_on_any_number_of_devices(processes: int) -> None:
    require_groups("size", 4, 16, processes)
    found = group_of(4, 16, processes)
    assert found == {sample: frozenset(range(sample % 4, 16, 4)) for sample in range(16)}


def test_samples_of_groups_come_back_in_order() -> None:
    x = torch.arange(12.0).view(6, 2)
    assert join_groups(split_groups(x, 3)).equal(x)
    assert join_groups(split_groups(x, 1)).equal(x)
    with pytest.raises(ValueError, match="size is 4"):
        groups_here("size", 6, 4)


@pytest.mark.parametrize(("size", "batch_size", "processes"), [(8, 56, 8), (9, 56, 7), (64, 32, 1)])
def test_devices_that_cannot_hold_the_groups_are_refused(size: int, batch_size: int, processes: int) -> None:
    with pytest.raises(ValueError, match="negatives_group"):
        require_groups("model.loss.negatives_group", size, batch_size, processes)
    require_groups("model.loss.negatives_group", None, batch_size, processes)
