"""What each weighting is worth where the critic is exact and the model is a table of counts.

    uv run python benchmarks/tabular_critic.py

A Markov chain writes responses; from a random token on, most of them are spoiled: the rest is drawn
without regard to what came before. A response is good if it is not spoiled. V[u], the probability
that it is good given its tokens so far, follows from the forward recursion over the two hidden
states. The policy is a bigram table, for which the minimiser of a weighted loss is the table of
weighted counts, smoothed alike for all. Printed is the excess of its loss on good text over the
chain's own entropy, which no critic, model or optimizer blurs: what is left is the weighting.

The tests of tests/weighting/test_tabular.py take the world from here.

Shapes: N responses of a prompt token and L more, S symbols.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from wmtp_modules.loss.mtp_loss import shift_to_heads
from wmtp_modules.weighting.advantage import FLOOR, SCALED, advantages, log_raw_weights
from wmtp_modules.weighting.calibrate import calibrate_log, scaled_weights, solve_scale

SMOOTHING = 0.1  # counts of each cell, where the weights of a sample add up to its good tokens
CRITICS = ("value", "relative", "gated", "ratio", "td", "gae")
WEIGHTINGS = ("uniform", "good only", *CRITICS, "old formula on good", "oracle")


class World:
    """A chain, its spoiling, and what is known of both.

    Args:
        good: share of good responses of easy and of hard prompts (even and odd symbols).
    """

    def __init__(self, S: int = 20, L: int = 30, good=(0.25, 0.05), seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.S, self.L = S, L
        self.chain_SS = rng.dirichlet(np.full(S, 0.3), S) * 0.98 + 0.02 / S
        self.spoiled_S = np.linalg.matrix_power(self.chain_SS, 200)[0]  # the same unigrams
        self.good_S = np.where(np.arange(S) % 2 == 0, *good)  # by prompt
        self.stays_S = self.good_S ** (1 / L)  # chance that a sound response stays sound
        self.good_share = self.good_S.mean()  # prompts are equally likely
        occupancy_S, at_S = np.zeros(S), self.good_S / self.good_S.sum()
        for _ in range(L):
            occupancy_S += at_S / L
            at_S = at_S @ self.chain_SS
        self._occupancy_S = occupancy_S  # of the contexts of good responses

    def sample(self, N: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [N, L + 1], and which of them are spoiled."""
        x_NL = np.zeros((N, self.L + 1), np.int64)
        spoiled_NL = np.zeros((N, self.L + 1), bool)
        x_NL[:, 0] = rng.integers(self.S, size=N)
        edges_SS, edges_S = self.chain_SS.cumsum(1), self.spoiled_S.cumsum()
        for u in range(1, self.L + 1):
            turns_N = rng.random(N) >= self.stays_S[x_NL[:, 0]]
            spoiled_NL[:, u] = spoiled_NL[:, u - 1] | turns_N
            edges_NS = np.where(spoiled_NL[:, u, None], edges_S, edges_SS[x_NL[:, u - 1]])
            x_NL[:, u] = (rng.random(N)[:, None] > edges_NS).sum(1).clip(max=self.S - 1)
        return x_NL, spoiled_NL

    def values(self, x_NL: np.ndarray) -> np.ndarray:
        """Exact V after each token, [N, L + 1]."""
        values_NL, _ = self._forward(x_NL)
        return values_NL

    def probabilities(self, x_NL: np.ndarray) -> np.ndarray:
        """Of whole responses under the law of all of them, [N]."""
        return self._forward(x_NL)[1] / self.S

    def _forward(self, x_NL: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        stays_N = self.stays_S[x_NL[:, 0]]
        sound_N, spoiled_N = np.ones(len(x_NL)), np.zeros(len(x_NL))
        values_NL = np.empty(x_NL.shape)
        for u in range(self.L + 1):
            if u:
                turned_N = spoiled_N + sound_N * (1 - stays_N)
                sound_N = sound_N * stays_N * self.chain_SS[x_NL[:, u - 1], x_NL[:, u]]
                spoiled_N = turned_N * self.spoiled_S[x_NL[:, u]]
            both_N = sound_N + spoiled_N
            values_NL[:, u] = sound_N / both_N * stays_N ** (self.L - u)
        return values_NL, both_N

    def excess(self, x_NL: np.ndarray, weights_NL: np.ndarray) -> float:
        """Loss of weighted counts on good text, above the chain's entropy.

        ``weights_NL`` are of tokens 1 to L, [N, L].
        """
        cells = (x_NL[:, :-1] * self.S + x_NL[:, 1:]).ravel()
        counts = np.bincount(cells, weights_NL.ravel(), minlength=self.S**2)
        table_SS = counts.reshape(self.S, self.S) + SMOOTHING
        table_SS /= table_SS.sum(1, keepdims=True)
        divergence_S = (self.chain_SS * np.log(self.chain_SS / table_SS)).sum(1)
        return float(self._occupancy_S @ divergence_S)


def tensors(values_NL: np.ndarray, good_N: np.ndarray) -> tuple[torch.Tensor, ...]:
    """values, good, keep and doc as the product's functions take them."""
    values_BT = torch.from_numpy(values_NL)
    keep_BT = torch.ones_like(values_BT, dtype=torch.bool)
    keep_BT[:, 0] = False
    good_BT = torch.from_numpy(good_N.astype(float))[:, None].expand_as(values_BT)
    return values_BT, good_BT, keep_BT, torch.zeros_like(keep_BT, dtype=torch.int64)


def of_head_0(log_raw_BT: torch.Tensor) -> torch.Tensor:
    return shift_to_heads(log_raw_BT, 1, 0.0)[:, :-1]


def blurred(values_NL: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """V as a model might give it: a logit with an error of its own, that knows no certainty."""
    logits_NL = np.log(values_NL) - np.log1p(-values_NL.clip(max=1 - 1e-9))
    logits_NL = logits_NL.clip(-4, 4) + 0.5 * rng.standard_normal(logits_NL.shape)
    return 1 / (1 + np.exp(-logits_NL))


def weights(
    name: str, world: World, x_NL: np.ndarray, spoiled_NL: np.ndarray, values_NL: np.ndarray
) -> np.ndarray:
    """Weights [N, L] of tokens 1 to L; they add up to about the sample's number of good tokens."""
    good_N = ~spoiled_NL[:, -1]
    share, every_NL = good_N.mean(), np.ones(x_NL[:, 1:].shape)
    if name == "uniform":
        return share * every_NL
    if name == "good only":
        return good_N[:, None] * every_NL
    if name == "old formula on good":
        mean, std = share, good_N.std()
        case = tensors((values_NL[good_N] - mean) / std, (good_N[good_N] - mean) / std)
        z_BT = advantages(*case, lam=0.95)
        own = z_BT[:, 1:]
        z_BT = ((z_BT - own.mean()) / own.std(correction=0)).clamp(-5, 5)
        out_NL = np.zeros(every_NL.shape)
        mask = torch.ones(*own.shape, 1, dtype=torch.bool)
        out_NL[good_N] = calibrate_log(of_head_0(z_BT), mask, 0.1, 5.0)[..., 0].numpy()
        return out_NL
    case = tensors(values_NL, good_N)
    if name == "oracle":
        log_raw_BT = torch.where(torch.from_numpy(spoiled_NL), -torch.inf, 0.0)
    else:
        known = {"floor": FLOOR * share}
        if name in ("td", "gae"):
            own = advantages(*case, lam=0.95 if name == "gae" else 0.0)[:, 1:]
            known = {"mean": own.mean().item(), "std": own.std(correction=0).item()}
        log_raw_BT = log_raw_weights(*case, advantage=name, **known)
    log_raw_BT1 = of_head_0(log_raw_BT)
    mask = torch.ones_like(log_raw_BT1, dtype=torch.bool)
    if name in (*SCALED, "oracle"):
        scale_K = solve_scale(log_raw_BT1.flatten().float(), [0], 0.0, 20.0)
        weights_BT1 = scaled_weights(log_raw_BT1, mask, scale_K, 0.0, 20.0)
    else:
        weights_BT1 = calibrate_log(log_raw_BT1, mask, 0.0, 20.0)
    return share * weights_BT1[..., 0].numpy()


def excesses(
    world: World, N: int, seeds: int, names=WEIGHTINGS, *, blur: bool = False
) -> dict[str, np.ndarray]:
    """Excess losses [seeds] of each weighting, all on the same samples."""
    found = {name: [] for name in names}
    for seed in range(seeds):
        rng = np.random.default_rng([seed, N])
        x_NL, spoiled_NL = world.sample(N, rng)
        values_NL = world.values(x_NL)
        values_NL = blurred(values_NL, rng) if blur else values_NL
        for name in names:
            weights_NL = weights(name, world, x_NL, spoiled_NL, values_NL)
            found[name].append(world.excess(x_NL, weights_NL))
    return {name: np.array(values) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=40)
    args = parser.parse_args()
    world = World()
    columns = {f"N = {N}": excesses(world, N, args.seeds) for N in (100, 1000, 5000)}
    columns["N = 1000, blurred"] = excesses(world, 1000, args.seeds, blur=True)
    lines = [
        f"{world.S} symbols, prompt and {world.L} tokens, {1 - world.good_share:.0%} of responses "
        f"spoiled, {args.seeds} seeds.",
        "V is exact; blurred, its logit is within 4 of 0 and has an error of 0.5.",
        "Excess loss on good text, mean and standard error:",
        f"{'':20}" + "".join(f"{title:>18}" for title in columns),
    ]
    for name in WEIGHTINGS:
        cells = [of[name] for of in columns.values()]
        told = (f"{x.mean():10.4f} ±{x.std() / args.seeds**0.5:.4f}" for x in cells)
        lines.append(f"{name:20}" + "".join(told))
    text = "\n".join(lines)
    print(text)
    path = Path(__file__).with_name("results") / "tabular_critic.txt"
    path.write_text(f"uv run python benchmarks/tabular_critic.py\n\n{text}\n")


if __name__ == "__main__":
    main()
