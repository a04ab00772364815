"""Estimates pass@k without bias, with bootstrap intervals: P problems, R resamples."""

from collections.abc import Mapping, Sequence

import numpy as np

RESAMPLES = 10_000
CHUNK = 500  # resamples at once: 500 x 10,000 problems are 40 MB
INTERVAL = (2.5, 97.5)  # percentiles


def estimate_pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that k of n samples, drawn without replacement, include a correct one (of c).

    Chen et al. 2021 (arXiv 2107.03374), eq. 1: 1 - C(n - c, k) / C(n, k), as a product because
    the binomials overflow. Needs 0 <= c <= n and 1 <= k <= n.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {c} correct in {n} samples: needs 0 <= c <= n, 1 <= k <= n")
    if n - c < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1)))


def pass_at_k(
    results: Mapping[int | str, tuple[int, int]], ks: Sequence[int], seed: int
) -> dict[str, object]:
    """Mean pass@k over problems with its 95 % bootstrap percentile interval.

    Problems are resampled, not samples: the interval says how far the figure would move with other
    problems of the same kind. With one problem this is unknown and the interval is [0, 1]. If all
    problems have the same figure, so does every resample, and the interval is a point.

    Args:
        results: (n, c) of each scored problem; n may differ.
        ks: values of k. A k above the number of samples of some problem is omitted.
        seed: of the resamples, which are the same for all k.

    Returns:
        {"pass_at_k": {"1": {"value", "low", "high"}}, "omitted_k": [...]} as fractions.
    """
    fewest = min((n for n, _ in results.values()), default=0)
    kept = [k for k in sorted(set(ks)) if k <= fewest]
    figures = {}
    for k in kept:
        values_P = np.array([estimate_pass_at_k(n, c, k) for n, c in results.values()])
        low, high = _interval(values_P, seed)
        figures[str(k)] = {"value": float(values_P.mean()), "low": low, "high": high}
    return {"pass_at_k": figures, "omitted_k": [k for k in sorted(set(ks)) if k > fewest]}


def best_temperatures(
    by_temperature: Sequence[tuple[float | None, Mapping[str, Mapping[str, float]]]],
) -> dict[str, dict]:
    """For each k, the temperature with the highest pass@k: an oracle, chosen on the same samples.

    Takes pairs of temperature and the "pass_at_k" of ``pass_at_k``, and returns for each k its
    figure with "temperature"; a tie goes to the first. The interval ignores that it was chosen.
    """
    best: dict[str, dict] = {}
    for temperature, figures in by_temperature:
        for k, figure in figures.items():
            if k not in best or figure["value"] > best[k]["value"]:
                best[k] = {"temperature": temperature, **figure}
    return best


def _interval(values_P: np.ndarray, seed: int) -> tuple[float, float]:
    n_problems = len(values_P)
    if n_problems == 1:
        return 0.0, 1.0
    generator = np.random.default_rng(seed)
    means_R = np.empty(RESAMPLES)
    for start in range(0, RESAMPLES, CHUNK):
        drawn_RP = generator.integers(0, n_problems, (min(CHUNK, RESAMPLES - start), n_problems))
        means_R[start : start + CHUNK] = values_P[drawn_RP].mean(axis=1)
    low, high = np.percentile(means_R, INTERVAL)
    return float(low), float(high)
