"""Linear machines on windows."""

import subprocess
import sys

import numpy as np
import pytest

from common.metrics.linear_svm import classify_windowed

OPTIONS = {"C": 1.0, "loss": "hinge", "tol": 1e-4, "max_iter": 200, "random_state": 0}


def samples(noise: int, label: np.ndarray) -> np.ndarray:
    draw = np.random.default_rng(noise)
    centre = np.random.default_rng(0).standard_normal((3, 1, 6))
    return (5 + centre[label] + 0.3 * draw.standard_normal((len(label), 4, 6))).astype(np.float32)


def test_learns_from_the_chosen_and_judges_the_chosen() -> None:
    label = np.arange(30) % 3
    train, test = samples(1, label), samples(2, label)
    wrong = label.copy()
    wrong[:10] = 0  # never looked at
    guess = classify_windowed(train, test, wrong, np.arange(30) >= 10, np.arange(30) < 9, 0.01, OPTIONS)
    assert guess.tolist() == label[:9].tolist()


def test_inputs_are_left_as_they_are() -> None:
    label = np.arange(12) % 3
    train, test = samples(1, label), samples(2, label)
    before = train.copy(), test.copy()
    everyone = np.ones(12, dtype=bool)
    classify_windowed(train, test, label, everyone, everyone, 0.01, OPTIONS)
    assert np.array_equal(before[0], train)
    assert np.array_equal(before[1], test)


def test_labels_need_not_be_positions() -> None:
    label = np.arange(12) % 3
    everyone = np.ones(12, dtype=bool)
    names = np.array([40, 7, 12])[label]
    guess = classify_windowed(samples(1, label), samples(2, label), names, everyone, everyone, 0.01, OPTIONS)
    assert guess.tolist() == names.tolist()


def test_features_that_are_not_finite() -> None:
    label = np.arange(12) % 3
    train = samples(1, label)
    train[3, 2, 1] = np.inf
    everyone = np.ones(12, dtype=bool)
    with pytest.raises(ValueError, match="features"):
        classify_windowed(train, train, label, everyone, everyone, 0.01, OPTIONS)


def test_starts_without_torch() -> None:
    code = "import sys, common.metrics.linear_svm; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
