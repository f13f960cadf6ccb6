"""Test linear SVMs on windows, and the average precision of classes that occur together."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

from common.metrics.linear_svm import average_precision, classify_windowed, evaluate_class

GOLDEN = Path(__file__).parents[1] / "golden" / "mct" / "voc_svm.npz"
OPTIONS = {"C": 0.01, "loss": "hinge", "tol": 1e-4, "max_iter": 1000, "random_state": 0}


def test_windows_are_classified_as_by_a_pipeline_of_the_library() -> None:
    draw, label = np.random.default_rng(0), np.arange(90) % 3
    names, train = np.array([40, 7, 12])[label], np.arange(90) % 5 > 0
    rows = 4000 + 0.6 * np.eye(6)[label][:, None] + draw.standard_normal((2, 90, 4, 6))
    seen, asked = (rows * 10.0 ** np.arange(-2, 4)).astype(np.float32)
    library = make_pipeline(StandardScaler(), LinearSVC(dual=True, **OPTIONS))
    library.fit(seen[train].reshape(-1, 6).astype(float), names[train].repeat(4))
    decision = library.decision_function(asked[~train].reshape(-1, 6).astype(float)).reshape(-1, 4, 3).mean(1)
    guess = classify_windowed(seen, asked, names, train, ~train, 1e-6, OPTIONS)
    expected = library.classes_[decision.argmax(1)]
    assert 0.4 < (expected == names[~train]).mean() < 1
    assert (guess == expected).mean() > 0.9


class TestOneClass:
    def test_equals_the_official_routine(self) -> None:
        with np.load(GOLDEN, allow_pickle=False) as golden:
            verdict = evaluate_class(
                golden["feat_train"], golden["label_train"], golden["feat_test"], golden["label_test"]
            )
            assert verdict.average_precision == pytest.approx(float(golden["svm_ap"]), abs=1e-4)
        assert verdict.cost == 10
        assert not verdict.left_out

    def rows(self, seed: int, label: np.ndarray, gap: float = 2.0) -> np.ndarray:
        draw = np.random.default_rng(seed)
        rows = draw.standard_normal((len(label), 5)).astype(np.float32)
        rows[:, 0] += gap * label
        return rows

    def test_difficult_is_negative_in_training_and_ignored_in_the_test(self) -> None:
        label = np.array([1, 0, 0, 0] * 10)
        rows, difficult = self.rows(0, label), np.where(np.arange(40) % 8 == 1, -1, label)
        plain = evaluate_class(rows, label, rows, label)
        assert evaluate_class(rows, difficult, rows, label) == plain
        judged = difficult >= 0
        expected = evaluate_class(rows, label, rows[judged], label[judged])
        assert evaluate_class(rows, label, rows, difficult) == expected

    def test_the_first_of_equally_good_costs_wins(self) -> None:
        label = np.array([1, 0, 0] * 8)
        verdict = evaluate_class(self.rows(0, label, 9.0), label, self.rows(1, label, 9.0), label, costs=[0.5])
        assert verdict.cost == 0.5
        assert verdict.average_precision == 1
        tie = evaluate_class(self.rows(0, label, 9.0), label, self.rows(1, label, 9.0), label, costs=[1, 0.1, 10])
        assert tie.cost == 1
        label = np.array([1, 1] + [0] * 20)  # two positives allow fewer folds
        verdict = evaluate_class(self.rows(0, label, 9.0), label, self.rows(1, label, 9.0), label)
        assert verdict.average_precision == 1

    def test_classes_that_cannot_be_judged_are_left_out_with_a_reason(self) -> None:
        label = np.array([1, 0] * 6)
        rows = self.rows(0, label)
        for training in (np.zeros(12, int), np.eye(12, dtype=int)[3], np.full(12, -1), np.ones(12, int)):
            verdict = evaluate_class(rows, training, rows, label)
            assert np.isnan(verdict.average_precision)
            assert "training" in verdict.left_out
        verdict = evaluate_class(rows, label, rows, np.where(label == 1, -1, 0))
        assert np.isnan(verdict.average_precision)
        assert verdict.left_out == "no positive test sample"

    def test_features_that_are_not_finite(self) -> None:
        label = np.array([1, 0] * 6)
        rows = self.rows(0, label)
        wrong = np.where(rows == rows[3, 2], np.nan, rows)
        for features in ((wrong, label, rows, label), (rows, label, wrong, label)):
            with pytest.raises(ValueError, match="features"):
                evaluate_class(*features)
        everyone = np.ones(12, dtype=bool)
        with pytest.raises(ValueError, match="features"):
            classify_windowed(wrong[:, None], wrong[:, None], label, everyone, everyone, 0.01, OPTIONS)


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
