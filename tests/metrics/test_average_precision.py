"""Average precision of classes that occur together."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.metrics.average_precision import average_precision

GOLDEN = Path(__file__).parents[1] / "golden" / "mct" / "voc_svm.npz"


def test_equals_the_official_one() -> None:
    with np.load(GOLDEN, allow_pickle=False) as golden:
        found = average_precision(golden["scores"], golden["label_test"])
        assert found == pytest.approx(float(golden["ap_from_scores"]), abs=1e-9)


@given(seed=st.integers(0, 1000), positives=st.integers(1, 9), negatives=st.integers(0, 9))
def test_equals_the_mean_precision_at_the_positives(seed: int, positives: int, negatives: int) -> None:
    draw = np.random.default_rng(seed)
    labels = draw.permutation([1] * positives + [0] * negatives)
    scores = draw.permutation(len(labels)).astype(float)
    ordered = labels[np.argsort(-scores)]
    precision = np.cumsum(ordered) / np.arange(1, len(ordered) + 1)
    assert average_precision(scores, labels) == pytest.approx(precision[ordered == 1].mean())


def test_difficult_samples_do_not_count_and_equal_scores_are_worth_the_share_of_positives() -> None:
    labels, scores = np.array([1, -1, 0, 1, -1]), np.array([3.0, 9.0, 2.0, 1.0, np.nan])
    assert average_precision(scores, labels) == average_precision(scores[labels >= 0], labels[labels >= 0])
    assert average_precision(np.zeros(8), np.array([1, 1, 0, 0, 0, 0, 0, 0])) == pytest.approx(0.25)


def test_without_positives_it_is_undefined_and_other_scores_are_refused() -> None:
    assert np.isnan(average_precision(np.arange(3.0), np.array([0, 0, -1])))
    assert np.isnan(average_precision(np.zeros(0), np.zeros(0, dtype=int)))
    with pytest.raises(ValueError, match="not finite"):
        average_precision(np.array([np.nan, 0.0]), np.array([1, 0]))
