from itertools import combinations

import numpy as np
import pytest

from wmtp_modules.evaluation import pass_at_k as module
from wmtp_modules.evaluation.pass_at_k import best_temperatures, estimate_pass_at_k, pass_at_k


@pytest.mark.parametrize("n", range(1, 8))
def test_the_mean_over_all_subsets(n):
    for c in range(n + 1):
        right = [True] * c + [False] * (n - c)
        for k in range(1, n + 1):
            subsets = [any(subset) for subset in combinations(right, k)]
            assert estimate_pass_at_k(n, c, k) == pytest.approx(np.mean(subsets), abs=1e-12)


def test_exact_values():
    assert estimate_pass_at_k(10, 3, 1) == pytest.approx(0.3, abs=1e-15)
    assert estimate_pass_at_k(5, 2, 2) == pytest.approx(0.7, abs=1e-15)
    # Numerator and denominator have 300 digits here.
    assert estimate_pass_at_k(1000, 1, 100) == pytest.approx(0.1, abs=1e-12)
    assert estimate_pass_at_k(200, 0, 100) == 0.0
    assert estimate_pass_at_k(200, 101, 100) == 1.0


@pytest.mark.parametrize(("n", "c", "k"), [(3, 4, 1), (3, -1, 1), (3, 1, 4), (3, 1, 0)])
def test_what_is_no_estimate(n, c, k):
    with pytest.raises(ValueError, match=rf"pass@{k} of {c} correct in {n} samples"):
        estimate_pass_at_k(n, c, k)


def test_mean_over_problems_of_unequal_n():
    found = pass_at_k({"a": (4, 1), "b": (2, 2), 3: (10, 0)}, [10, 1, 2, 5], seed=0)
    assert found["pass_at_k"]["1"]["value"] == pytest.approx((0.25 + 1 + 0) / 3)
    assert found["pass_at_k"]["2"]["value"] == pytest.approx((0.5 + 1 + 0) / 3)
    # One problem has two samples only: what k = 5 would be is nobody's to say.
    assert list(found["pass_at_k"]) == ["1", "2"]
    assert found["omitted_k"] == [5, 10]


def test_interval_is_that_of_the_seed_and_holds_the_value():
    results = {i: (10, i % 11) for i in range(50)}
    first, again, other = (pass_at_k(results, [1, 10], seed)["pass_at_k"] for seed in (1, 1, 2))
    assert first == again != other
    for figure in first.values():
        assert 0 <= figure["low"] < figure["value"] < figure["high"] <= 1


def test_one_problem_none_and_all_alike():
    assert pass_at_k({"a": (2, 1)}, [1], 0)["pass_at_k"]["1"] == {
        "value": 0.5, "low": 0.0, "high": 1.0,
    }  # fmt: skip
    assert pass_at_k({}, [1, 10], 0) == {"pass_at_k": {}, "omitted_k": [1, 10]}
    assert pass_at_k({"a": (1, 1), "b": (1, 1)}, [1], 0)["pass_at_k"]["1"] == {
        "value": 1.0, "low": 1.0, "high": 1.0,
    }  # fmt: skip


@pytest.mark.parametrize("n_problems", [40, 164])
def test_interval_covers_the_truth_of_its_family(monkeypatch, n_problems):
    """Problems whose chances are Beta(0.6, 1): the mean of pass@k over that family is known."""
    monkeypatch.setattr(module, "RESAMPLES", 1000)
    generator = np.random.default_rng(0)
    k, n, trials = 5, 20, 400
    chances = generator.beta(0.6, 1.0, 2_000_000)
    truth = np.mean(1 - (1 - chances) ** k)
    covered = 0
    for trial in range(trials):
        rights = generator.binomial(n, generator.beta(0.6, 1.0, n_problems))
        results = {i: (n, int(c)) for i, c in enumerate(rights)}
        figure = pass_at_k(results, [k], trial)["pass_at_k"][str(k)]
        covered += figure["low"] <= truth <= figure["high"]
    # 95 % asked for; a percentile interval of few problems is known to be a little narrow.
    assert 0.91 <= covered / trials <= 0.98


def test_oracle_temperature_is_chosen_for_each_k():
    def figures(*values):
        return {
            str(k): {"value": value, "low": value - 0.1, "high": value + 0.1}
            for k, value in zip((1, 10), values, strict=False)
        }

    best = best_temperatures([(0.1, figures(0.4, 0.6)), (0.8, figures(0.3, 0.7)), (1.0, {})])
    assert best == {
        "1": {"temperature": 0.1, **figures(0.4)["1"]},
        "10": {"temperature": 0.8, **figures(0.3, 0.7)["10"]},
    }
    assert best_temperatures([(0.1, figures(0.4)), (0.8, figures(0.4))])["1"]["temperature"] == 0.1
