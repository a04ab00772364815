"""Whole optimizer steps in float64, from the mathematics alone: a second opinion on the recipes.

Nothing here comes from the code under test. One document at a time goes through a Llama written out
by hand, from position 0 and seeing itself only, so there are no packs, masks, shards or chunks;
selections sort, calibrations bisect, and the optimizer is its textbook formula.

Shapes: T positions of one document, N tokens of a joint micro-batch (all ranks' documents one after
the other, padding left out), K heads, D model width. Head k at position t predicts token t + k + 1.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

FIRST_TOKEN = 256  # row i begins with token FIRST_TOKEN + i, and no other token is that large


@dataclass(frozen=True)
class Row:
    """One document: token ids, and for each whether it is supervised and whether it is noise."""

    tokens: list[int]
    keep: list[bool]
    noise: list[bool]
    reward: float = 0.0
    problem_id: str | None = None
    weight: list[float] | None = None  # what the data say of each token, for ``column``


@dataclass(frozen=True)
class Document:
    """A row at its place in a joint micro-batch: it begins at ``start`` in pack ``pack``."""

    row: int
    pack: int
    start: int


def documents_of(packs: Sequence[Sequence[int]], rows: Sequence[Row]) -> list[Document]:
    """The documents of a joint micro-batch, told apart by their tokens."""
    found = []
    for pack, tokens in enumerate(packs):
        place = 0
        while own := [
            i for i, r in enumerate(rows) if [*tokens[place : place + len(r.tokens)]] == r.tokens
        ]:
            (row,) = own
            found.append(Document(row, pack, place))
            place += len(rows[row].tokens)
        assert len({*tokens[place:]}) <= 1, "what follows is no padding: a row is cut, or unknown"
    return found


# ------------------------------------------------------------------------------- model


def rms_norm(x: torch.Tensor, scale: torch.Tensor, eps: float) -> torch.Tensor:
    """x over its root mean square, times a scale per feature."""
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * scale


class Llama:
    """The model of a folder in Meta's format, in float64, for one document at a time."""

    def __init__(self, folder: Path) -> None:
        self.params = json.loads((folder / "params.json").read_text())
        weights = torch.load(folder / "consolidated.pth", weights_only=True)
        self.weights = {key: w.double().requires_grad_() for key, w in weights.items()}
        self.n_heads = self.params.get("n_future_tokens", 1)
        self._n_trunk = self.params["n_layers"] - self.n_heads
        self._eps = self.params["norm_eps"]

    def trunk(self, tokens: Sequence[int]) -> torch.Tensor:
        """Output [T, D] of the last trunk block, which all heads read."""
        hidden_TD = self.weights["tok_embeddings.weight"][list(tokens)]
        for i in range(self._n_trunk):
            hidden_TD = self._block(f"layers.{i}", hidden_TD)
        return hidden_TD

    def losses(self, tokens: Sequence[int], trunk_TD: torch.Tensor) -> torch.Tensor:
        """Cross-entropy [T, K] of every head on every token; 0 where its target is past the end."""
        columns = [self.loss_of(self.logits(k, trunk_TD), tokens, k) for k in range(self.n_heads)]
        return torch.stack(columns, 1)

    def logits(self, k: int, trunk_TD: torch.Tensor, is_apart: bool = False) -> torch.Tensor:
        """Logits [T, V] of head k, of which no gradient leaves its block if it stands apart."""
        name = f"layers.{self._n_trunk}" if k == 0 else f"extra_heads.{k - 1}"
        norm, output = self.weights["norm.weight"], self.weights["output.weight"]
        if is_apart:
            trunk_TD, norm, output = trunk_TD.detach(), norm.detach(), output.detach()
        return rms_norm(self._block(name, trunk_TD), norm, self._eps) @ output.T

    def loss_of(self, logits_TV: torch.Tensor, tokens: Sequence[int], k: int) -> torch.Tensor:
        """Cross-entropy [T] of head k; 0 where its target is past the end."""
        targets = torch.tensor(tokens[k + 1 :], dtype=torch.int64)
        log_p = logits_TV.log_softmax(-1)[: len(targets)].gather(1, targets[:, None])
        return F.pad(-log_p.squeeze(1), (0, len(tokens) - len(targets)))

    def entropy(self, trunk_TD: torch.Tensor) -> torch.Tensor:
        """Entropy [T] of what head 0 expects next, in nats."""
        hidden_TD = self._block(f"layers.{self._n_trunk}", trunk_TD)
        hidden_TD = rms_norm(hidden_TD, self.weights["norm.weight"], self._eps)
        log_p = (hidden_TD @ self.weights["output.weight"].T).log_softmax(-1)
        return -(log_p.exp() * log_p).sum(-1)

    def _block(self, name: str, x_TD: torch.Tensor) -> torch.Tensor:
        def weight(part: str) -> torch.Tensor:
            return self.weights[f"{name}.{part}.weight"]

        x_TD = x_TD + self._attention(weight, rms_norm(x_TD, weight("attention_norm"), self._eps))
        y_TD = rms_norm(x_TD, weight("ffn_norm"), self._eps)
        gate, up = y_TD @ weight("feed_forward.w1").T, y_TD @ weight("feed_forward.w3").T
        return x_TD + (gate * gate.sigmoid() * up) @ weight("feed_forward.w2").T

    def _attention(self, weight: Callable, x_TD: torch.Tensor) -> torch.Tensor:
        T, D = x_TD.shape
        n_heads = self.params["n_heads"]
        n_kv_heads = self.params.get("n_kv_heads", n_heads)
        width = D // n_heads

        def project(name: str, heads: int) -> torch.Tensor:
            return (x_TD @ weight(f"attention.{name}").T).view(T, heads, width)

        q, k, v = project("wq", n_heads), project("wk", n_kv_heads), project("wv", n_kv_heads)
        q, k = self._rotate(q), self._rotate(k)
        later = torch.ones(T, T, dtype=torch.bool).triu(1)
        outputs = []
        for head in range(n_heads):
            shared = head * n_kv_heads // n_heads  # grouped queries share keys and values
            scores = q[:, head] @ k[:, shared].T / math.sqrt(width)
            outputs.append(scores.masked_fill(later, -math.inf).softmax(-1) @ v[:, shared])
        return torch.cat(outputs, 1) @ weight("attention.wo").T

    def _rotate(self, x: torch.Tensor) -> torch.Tensor:
        """Turn each pair of neighbouring features i by t * base^(-2i / width), Meta's RoPE."""
        T, _, width = x.shape
        base = self.params.get("rope_theta", 10_000.0)
        speeds = base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        angles = (torch.arange(T, dtype=torch.float64)[:, None] * speeds)[:, None]
        even, odd = x[..., 0::2], x[..., 1::2]
        turned = (
            even * angles.cos() - odd * angles.sin(),
            even * angles.sin() + odd * angles.cos(),
        )
        return torch.stack(turned, -1).flatten(-2)


# ----------------------------------------------------------------------------- weights


def scale_of(raw: torch.Tensor, w_min: float, w_max: float) -> float:
    """The c for which clip(c * raw, w_min, w_max) has mean 1, by bisection."""
    low, high = 0.0, 1.0
    while (high * raw).clamp(w_min, w_max).mean() < 1:
        high *= 2
    for _ in range(200):
        c = (low + high) / 2
        low, high = (c, high) if (c * raw).clamp(w_min, w_max).mean() < 1 else (low, c)
    return high


def calibrate(raw: torch.Tensor, w_min: float, w_max: float) -> torch.Tensor:
    """clip(c * raw, w_min, w_max) with mean 1."""
    return (scale_of(raw, w_min, w_max) * raw).clamp(w_min, w_max)


def softened(z: torch.Tensor, cfg: dict) -> torch.Tensor:
    """Calibrated exp(z / temperature)."""
    return calibrate(((z - z.max()) / cfg["temperature"]).exp(), cfg["w_min"], cfg["w_max"])


def soft(scores: torch.Tensor, cfg: dict) -> torch.Tensor:
    """Weights of the soft selection over the tokens of one head."""
    mean, std = scores.mean(), scores.std(correction=0)
    return softened(((scores - mean) / (std + 1e-6)).clamp(-5, 5), cfg)


def topk(scores: torch.Tensor, scopes: Sequence[int], ratio: float) -> torch.Tensor:
    """N / m on the m best of each scope's N tokens, 0 on the others; the first of equals wins."""
    weights = torch.zeros_like(scores)
    for scope in set(scopes):
        members = [i for i, s in enumerate(scopes) if s == scope]
        m = min(len(members), max(1, round(ratio * len(members))))
        best = sorted(members, key=lambda i: (-scores[i].item(), i))[:m]
        weights[best] = len(members) / m
    return weights


def shuffled(scores: torch.Tensor, groups: Sequence[int], keys: Sequence[float]) -> torch.Tensor:
    """Scores permuted inside each group: its i-th place gets that of its i-th smallest key."""
    out = scores.clone()
    for group in set(groups):
        members = [i for i, g in enumerate(groups) if g == group]
        out[members] = scores[sorted(members, key=lambda i: keys[i])]
    return out


def response_of(row: Row) -> list[int]:
    """Places of a row's response tokens; the first token of a row is none, no head predicts it."""
    return [u for u in range(1, len(row.tokens)) if row.keep[u]]


def advantages(row: Row, values: Sequence[float], good: float, lam: float) -> dict[int, float]:
    """Generalised advantage of each response token of a row, given V after every token."""
    found, after = {}, 0.0
    response = response_of(row)
    for u in reversed(response):
        delta = (good if u == response[-1] else values[u]) - values[u - 1]
        found[u] = after = delta + lam * after
    return found


def raw_weights(
    row: Row, values: Sequence[float], advantage: str, floor: float
) -> dict[int, float]:
    """Raw weight of each response token of a row, given V after every token."""
    response, found = response_of(row), {}
    for u in response:
        start, before = values[response[0] - 1], values[u - 1]
        by = {
            "value": 1.0,
            "relative": max(start, floor),
            "gated": max(before, start),
            "ratio": before,
        }[advantage]
        found[u] = values[u] / by
    return found


@torch.no_grad()
def critic_features(row: Row, model: Llama) -> torch.Tensor:
    """What a critic reads at each token, [T, D + 3]: trunk and surprise, NaN where there is none.

    The trunk's output at a root mean square of 1; loss and entropy of head 0 one token earlier,
    loss of head 1 two tokens earlier.
    """
    T, trunk_TD = len(row.tokens), model.trunk(row.tokens)
    loss_TK, entropy_T = model.losses(row.tokens, trunk_TD), model.entropy(trunk_TD)
    surprise_T3 = torch.full((T, 3), math.nan, dtype=torch.float64)
    for u in range(1, T):
        surprise_T3[u, 0], surprise_T3[u, 1] = loss_TK[u - 1, 0], entropy_T[u - 1]
        if u >= 2:
            surprise_T3[u, 2] = loss_TK[u - 2, 1]
    ones_D = torch.ones(trunk_TD.shape[1], dtype=torch.float64)
    return torch.cat([rms_norm(trunk_TD, ones_D, 1e-6), surprise_T3], 1)


def critic_logits(row: Row, features_TE: torch.Tensor, head: dict, kind: str) -> torch.Tensor:
    """Logit [T] of V after every token of a row, from the tensors of a value head by name."""
    x_TE = ((features_TE - head["mean"]) / head["std"]).nan_to_num(nan=0.0)
    inner_TD = x_TE @ head["hidden.weight"].T + head["hidden.bias"]
    d_T = (inner_TD * inner_TD.sigmoid()) @ head["out.weight"][0] + head["out.bias"]
    if kind == "state":
        return head["base"] + d_T
    response = response_of(row)
    if kind == "sum":
        sums = [d_T[[j for j in response if j <= u]].sum() for u in range(len(row.tokens))]
        return head["base"] + head["kappa"] * torch.stack(sums)
    last_prompt = response[0] - 1 if response else 0
    v0 = head["base"] + x_TE[last_prompt] @ head["start.weight"][0] + head["start.bias"][0]
    stays = torch.exp(-(1 + head["hazard"].exp()).log())
    logits = []
    for u in range(len(row.tokens)):
        read = [j for j in response if j <= u]
        # Odds of bad are those before the response, times what its tokens say of each place of
        # the turn, or of none so far.
        odds = stays ** len(read)
        for i in range(len(read)):
            odds = odds + (1 - stays) * stays**i * (-d_T[read[i:]].sum()).exp()
        logits.append(v0 - odds.log())
    return torch.stack(logits)


def trained_critic(
    rows: Sequence[Row],
    good: Sequence[float],
    model: Llama,
    cfg: dict,
    seed: int,
    draw: Callable,
    items: Sequence[Sequence[int]],
) -> dict[str, torch.Tensor]:
    """The value head after all steps on one rank, and its scale.

    Args:
        good: f(R) of each row.
        cfg: the config's block ``critic``; its AdamW has all its arguments.
        draw: ``draw(n_items, size, step, seed)``, which items a step takes.
        items: rows of each item: one for ``bce``, the better and the worse one for ``pairs``.
    """
    features, kind = [critic_features(row, model) for row in rows], cfg["head"]
    responses = [response_of(row) for row in rows]
    judged = [[r[0] - 1, *r] if r else [] for r in responses]
    share = sum(good) / len(good)
    every_NE = torch.cat([f[at] for f, at in zip(features, judged, strict=True)])
    known = [x[~x.isnan()] for x in every_NE.T]
    fixed = {
        "base": torch.tensor(math.log(share / (1 - share)), dtype=torch.float64),
        "mean": torch.stack([x.mean() for x in known]),
        "std": torch.stack([x.std(correction=0) for x in known]),
        "kappa": torch.ones((), dtype=torch.float64),
    }
    D = every_NE.shape[1] - 3
    torch.manual_seed(seed)
    hidden = torch.nn.Linear(D + 3, D)  # the one layer that starts at random
    head = {"hidden.weight": hidden.weight.detach(), "hidden.bias": hidden.bias.detach()}
    head |= {"out.weight": torch.zeros(1, D), "out.bias": torch.zeros(1)}
    if kind == "turn":
        head |= {"start.weight": torch.zeros(1, D + 3), "start.bias": torch.zeros(1)}
        head["hazard"] = torch.tensor(0.02).expm1().log()  # softplus of it is 0.02
    head = {name: value.double().requires_grad_() for name, value in head.items()}
    moments = dict.fromkeys(head, (0.0, 0.0))
    optimizer = cfg["optimizer"]

    def logits_of(i: int) -> torch.Tensor:
        return critic_logits(rows[i], features[i], head | fixed, kind)

    for step in range(cfg["max_steps"]):
        drawn = [items[item] for item in draw(len(items), cfg["batch_size"], step, seed)]
        if cfg["objective"] == "pairs":
            loss = sum(pair_loss(*((logits_of(i), responses[i]) for i in pair)) for pair in drawn)
            count = len(drawn)
        else:
            of_rows = [i for (i,) in drawn]
            loss = sum(bce(logits_of(i)[judged[i]], good[i]) for i in of_rows)
            count = sum(len(judged[i]) for i in of_rows)
        (loss / count).backward()
        for name, w in head.items():
            change, moments[name] = adamw(
                step, w, w.grad, optimizer["lr"], optimizer, moments[name]
            )
            with torch.no_grad():
                w += change
            w.grad = None
    head = {name: w.detach() for name, w in head.items()}
    if cfg["objective"] == "pairs":
        sums = [logits_of(i)[at] - fixed["base"] for i, at in enumerate(judged)]
        of_tokens = torch.cat([torch.full((len(x),), g) for x, g in zip(sums, good, strict=True)])
        fixed["kappa"] = fitted_kappa(torch.cat(sums), fixed["base"], of_tokens)
    return head | fixed


def bce(logits: torch.Tensor, good: float | torch.Tensor) -> torch.Tensor:
    """Sum of the cross-entropies of sigmoid(logits) against f(R)."""
    return -(good * F.logsigmoid(logits) + (1 - good) * F.logsigmoid(-logits)).sum()


def pair_loss(better: tuple, worse: tuple) -> torch.Tensor:
    """-log sigmoid(L[end] of the better - L[end] of the worse) + the mean d^2 of both."""
    ends, squares, n = [], 0.0, 0
    for logits, response in (better, worse):
        d = [logits[u] - logits[u - 1] for u in response]
        ends.append(sum(d))
        squares, n = squares + sum(one**2 for one in d), n + len(d)
    return squares / n - F.logsigmoid(ends[0] - ends[1])


def fitted_kappa(sums: torch.Tensor, base: torch.Tensor, good: torch.Tensor) -> torch.Tensor:
    """Where sigmoid(base + kappa sums) has the least cross-entropy, kappa >= 0, by thirds."""
    low, high = 0.0, 1e3
    for _ in range(300):
        left, right = low + (high - low) / 3, high - (high - low) / 3
        if bce(base + left * sums, good) <= bce(base + right * sums, good):
            high = right
        else:
            low = left
    return torch.tensor(low, dtype=torch.float64)


def adamw(step: int, w, grad, lr: float, optimizer: dict, moments: tuple) -> tuple:
    """What AdamW adds to a parameter in a step, from 0, and its moments after it."""
    beta1, beta2 = optimizer["betas"]
    first = beta1 * moments[0] + (1 - beta1) * grad
    second = beta2 * moments[1] + (1 - beta2) * grad.square()
    unbiased = first / (1 - beta1 ** (step + 1)), second / (1 - beta2 ** (step + 1))
    direction = unbiased[0] / (unbiased[1].sqrt() + optimizer["eps"])
    return -lr * (optimizer["weight_decay"] * w.detach() + direction), (first, second)


# -------------------------------------------------------------------------------- run


@dataclass(frozen=True)
class Critic:
    """What the critic's stages leave to the policy.

    Attributes:
        good: f(R), one per training row.
        policy_rows: training rows that train the policy.
        values: V after every token of each training row.
    """

    good: list[float]
    policy_rows: list[int]
    values: list[list[float]]


class Run:
    """One training run of a recipe's config.

    Args:
        cfg: the config, as plain containers.
        world: number of ranks.
        folder: checkpoint to start from.
        rows: training rows.
        rows_val: held-out rows.
        draw: ``draw(G, T, seed=, step=)``, the random number of each token of micro-batch ``step``.
        reference: the reference model of Rho-1.
        critic: what the critic's stages left.
    """

    def __init__(
        self,
        cfg: dict,
        world: int,
        folder: Path,
        rows: Sequence[Row],
        rows_val: Sequence[Row],
        *,
        draw: Callable,
        reference: Llama | None = None,
        critic: Critic | None = None,
    ) -> None:
        self.cfg, self.weighting, self.world = cfg, cfg["weighting"], world
        self.model = Llama(folder)
        self.before = {key: w.detach().clone() for key, w in self.model.weights.items()}
        self.rows, self.rows_val = rows, rows_val
        self._draw, self._reference, self._critic = draw, reference, critic
        K = self.model.n_heads
        # Isolated, the further heads have a loss, a count and a norm of their own.
        self._is_apart = cfg.get("extra_heads") == "isolated"
        decayed = [self.weighting["decay"] ** k for k in range(K)]
        if self._is_apart:
            decayed = [1.0, *(one / sum(decayed[1:]) for one in decayed[1:])]
        else:
            decayed = [one / sum(decayed) for one in decayed]
        self._alphas_K = torch.tensor(decayed, dtype=torch.float64)
        self._distill = cfg.get("distill")
        self.clipped: list[bool] = []  # whether all groups were, in each step
        self.empty_packs = 0  # in which no head has a target
        self.times_seen = torch.zeros(len(rows), dtype=torch.int64)
        self._moments = {key: (0.0, 0.0) for key in self.model.weights}
        name = self.weighting["name"]
        if name == "oracle" and critic is not None:
            self.weighting = self.weighting | {"w_min": 0.0}
        self._of_tokens: dict[int, dict[int, float]] = {}  # raw weights, or z of td and gae
        self._scale_K: list[float] | None = None
        if critic is not None and name in ("critic", "shuffled", "oracle"):
            self._of_tokens = self._known_before_training()

    def __call__(self, micro_batches: Sequence[Sequence[Sequence[int]]]) -> list[dict]:
        """Train, and give what is logged, a line per step and one before them.

        Args:
            micro_batches: token ids of the packs of every joint micro-batch.
        """
        accumulation = self.cfg["gradient_accumulation_steps"]
        lines = [{"step": 0} | self.heldout()]
        self.noise_sums = torch.zeros(4, dtype=torch.float64)
        for step in range(self.cfg["max_steps"]):
            numbers = range(step * accumulation, (step + 1) * accumulation)
            figures = self._step(step, [(n, micro_batches[n]) for n in numbers])
            is_last = step + 1 == self.cfg["max_steps"]
            if is_last or (step + 1) % self.cfg["run_val_every_n_steps"] == 0:
                figures |= self.heldout()
            lines.append({"step": step + 1} | figures)
        return lines

    def update(self) -> dict[str, torch.Tensor]:
        """What all steps together added to each parameter."""
        return {key: w.detach() - self.before[key] for key, w in self.model.weights.items()}

    @torch.no_grad()
    def heldout(self) -> dict[str, float]:
        """Unweighted losses of the held-out rows."""
        K = self.model.n_heads
        total_K, count_K = torch.zeros(2, K, dtype=torch.float64)
        for row in self.rows_val:
            losses_TK = self.model.losses(row.tokens, self.model.trunk(row.tokens))
            mask_TK = self._mask(row)
            total_K += (losses_TK * mask_TK).sum(0)
            count_K += mask_TK.sum(0)
        losses = (total_K / count_K).tolist()
        named = {f"val_loss_head_{k}": loss for k, loss in enumerate(losses)}
        return named | {"val_loss": sum(losses) / K}

    @torch.no_grad()
    def reference_heldout(self) -> list[float]:
        """Losses of the reference on the held-out rows' targets of each head."""
        K = self.model.n_heads
        total_K, count_K = torch.zeros(2, K, dtype=torch.float64)
        for row in self.rows_val:
            mask_TK = self._mask(row)
            total_K += self._reference_losses(row).where(mask_TK, 0).sum(0)
            count_K += mask_TK.sum(0)
        return (total_K / count_K).tolist()

    def _mask(self, row: Row) -> torch.Tensor:
        """Where a head has a target: a supervised token of the same document."""
        T, K = len(row.tokens), self.model.n_heads
        has = [[t + k + 1 < T and row.keep[t + k + 1] for k in range(K)] for t in range(T)]
        return torch.tensor(has, dtype=torch.bool)

    def _of_targets(self, row: Row, per_token: Sequence[float], nothing: float) -> torch.Tensor:
        """[T, K]: the number of each token where heads predict it."""
        T, K = len(row.tokens), self.model.n_heads
        at = [
            [per_token[t + k + 1] if t + k + 1 < T else nothing for k in range(K)] for t in range(T)
        ]
        return torch.tensor(at, dtype=torch.float64)

    # -------------------------------------------------------------------- one step

    def _step(self, step: int, micro_batches: list[tuple[int, Sequence]]) -> dict[str, float]:
        K = self.model.n_heads
        n_K, loss_K, distill_K = torch.zeros(3, K, dtype=torch.float64)
        objective = 0.0
        noise_4 = torch.zeros(4, dtype=torch.float64)
        for number, packs in micro_batches:
            documents = documents_of(packs, self.rows)
            self.times_seen[[document.row for document in documents]] += 1
            chosen = [self.rows[document.row] for document in documents]
            pairs = zip(documents, chosen, strict=True)
            filled = {document.pack for document, row in pairs if self._mask(row).any()}
            self.empty_packs += len(packs) - len(filled)
            parts = [self._row_losses(row) for row in chosen]
            losses_NK, distilled_NK = (torch.cat(part) for part in zip(*parts, strict=True))
            mask_NK = torch.cat([self._mask(row) for row in chosen])
            weights_NK = self._weights(number, packs, documents, losses_NK.detach(), mask_NK)
            trained_NK = losses_NK
            if self._distill:
                share_K = torch.tensor([0.0] + [self._distill["weight"]] * (K - 1))
                trained_NK = (1 - share_K) * losses_NK + share_K * distilled_NK
                distill_K += (distilled_NK.detach() * mask_NK).sum(0)
            loss = (self._alphas_K * weights_NK * trained_NK).sum()
            objective += loss.item()
            loss.backward()
            n_K += mask_NK.sum(0)
            loss_K += (losses_NK.detach() * mask_NK).sum(0)
            on_noise_NK = torch.cat([self._of_targets(r, r.noise, False) for r in chosen]) * mask_NK
            noise_4 += torch.stack(
                [
                    on_noise_NK.sum(),
                    mask_NK.sum(),
                    (weights_NK * on_noise_NK).sum(),
                    weights_NK.sum(),
                ]
            )
        n_prime = (self._alphas_K * n_K).sum()
        norms = self._optimize(step, n_K)
        self.noise_sums += noise_4

        figures = {
            "loss": ((self._alphas_K * loss_K).sum() / n_prime).item(),
            **{f"loss_head_{k}": (loss_K[k] / n_K[k]).item() for k in range(K) if n_K[k]},
            "weighted_loss": objective / n_prime.item(),
            "lr": self.cfg["optimizer"]["lr"] * self.schedule(step),
            "grad_norm": norms[0],
            **({"grad_norm_extra_heads": norms[1]} if self._is_apart else {}),
            "clipped_share": float(self.clipped[-1]),  # of the one step since the last line
            **self._statistics(weights_NK, mask_NK),
        }
        if self._distill:
            figures |= {f"distill_head_{k}": (distill_K[k] / n_K[k]).item() for k in range(1, K)}
        if noise_4[0]:
            figures["noise_in_data"] = (noise_4[0] / noise_4[1]).item()
            figures["noise_in_weight"] = (noise_4[2] / noise_4[3]).item()
        return figures

    def _statistics(self, weights_NK: torch.Tensor, mask_NK: torch.Tensor) -> dict[str, float]:
        """Figures of the weights of one joint micro-batch; none for a head without targets."""
        w_min, w_max, near = self.weighting["w_min"], self.weighting["w_max"], 1e-6
        named, ess, selected = {}, 0.0, 0.0
        for k in range(self.model.n_heads):
            w = weights_NK[mask_NK[:, k], k]
            if not len(w):
                continue
            figures = {
                "mean": w.mean().item(),
                "ess": (w.sum() ** 2 / (len(w) * w.square().sum())).item(),
                "selected": (w >= 1 - near).double().mean().item(),
                "low": (w < 0.5 - near).double().mean().item(),
                "high": (w >= 2 - near).double().mean().item(),
                "at_min": (w <= w_min + near).double().mean().item(),
                "at_max": (w >= w_max - near).double().mean().item(),
            }
            named |= {f"weight_{name}_head_{k}": value for name, value in figures.items()}
            ess += len(w) * figures["ess"]
            selected += len(w) * figures["selected"]
        n = mask_NK.sum().item()
        return named | {"ess": ess / n, "selected_share": selected / n}

    def _row_losses(self, row: Row) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses [T, K] of one document, and those of the further heads against head 0."""
        trunk_TD = self.model.trunk(row.tokens)
        if not self._is_apart and not self._distill:
            losses_TK = self.model.losses(row.tokens, trunk_TD)
            return losses_TK, torch.zeros_like(losses_TK)
        losses, distilled, T = [], [], len(row.tokens)
        for k in range(self.model.n_heads):
            logits_TV = self.model.logits(k, trunk_TD, is_apart=self._is_apart and k > 0)
            losses.append(self.model.loss_of(logits_TV, row.tokens, k))
            kl_T = torch.zeros(T, dtype=torch.float64)
            if k == 0:
                head_0_TV = logits_TV.detach()
            elif self._distill and k < T:
                s = self._distill["temperature"]
                p, q = (head_0_TV[k:] / s).softmax(-1), (logits_TV[: T - k] / s).softmax(-1)
                kl_T = F.pad(s * s * (p * (p / q).log()).sum(-1), (0, k))
            distilled.append(kl_T)
        return torch.stack(losses, 1), torch.stack(distilled, 1)

    def _optimize(self, step: int, n_K: torch.Tensor) -> list[float]:
        """One update of every parameter; the gradients' norms before they are clipped."""
        weights, lr = self.model.weights, self.cfg["optimizer"]["lr"] * self.schedule(step)
        alone_K = torch.arange(len(n_K)) > 0
        groups = [(weights.keys(), (self._alphas_K * n_K).sum())]
        if self._is_apart:
            further = [key for key in weights if key.startswith("extra_heads.")]
            groups = [
                (weights.keys() - {*further}, n_K[0]),
                (further, (self._alphas_K * n_K)[alone_K].sum()),
            ]
        norms = []
        for keys, n_prime in groups:
            grads = {
                key: torch.zeros_like(weights[key])
                if weights[key].grad is None
                else weights[key].grad / n_prime
                for key in keys
            }
            norm = math.sqrt(sum(grad.square().sum().item() for grad in grads.values()))
            share = min(1.0, self.cfg["clip_grad_norm"] / (norm + 1e-6))
            for key, grad in grads.items():
                w = weights[key]
                with torch.no_grad():
                    w += self._change(step, w, grad * share, lr, key, self._moments)
                w.grad = None
            norms.append(norm)
        self.clipped.append(norms[0] > self.cfg["clip_grad_norm"])
        return norms

    def _change(self, step, w, grad, lr, key, moments) -> torch.Tensor:
        optimizer = self.cfg["optimizer"]
        if optimizer["_component_"] == "torch.optim.SGD":
            return -lr * grad
        assert optimizer["_component_"] == "torch.optim.AdamW"
        change, moments[key] = adamw(step, w, grad, lr, optimizer, moments[key])
        return change

    def schedule(self, step: int) -> float:
        """Share of the learning rate in a step, from 0: linear warm-up, then half a cosine."""
        warmup, steps = self.cfg["num_warmup_steps"], self.cfg["max_steps"]
        if step < warmup:
            return step / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))

    # --------------------------------------------------------------------- weights

    def _weights(
        self,
        number: int,
        packs: Sequence[Sequence[int]],
        documents: list[Document],
        losses_NK: torch.Tensor,
        mask_NK: torch.Tensor,
    ) -> torch.Tensor:
        """Final weights of a joint micro-batch, 0 where a head has no target."""
        keys = self._draw(len(packs), len(packs[0]), seed=self.cfg["seed"], step=number)
        chosen = [self.rows[document.row] for document in documents]
        keys_of = [
            [float(keys[d.pack][d.start + t]) for t in range(len(row.tokens))]
            for d, row in zip(documents, chosen, strict=True)
        ]
        keys_NK = torch.cat(
            [self._of_targets(r, k, math.nan) for r, k in zip(chosen, keys_of, strict=True)]
        )
        numbers = [i for i, row in enumerate(chosen) for _ in row.tokens]  # document of each token
        scores_NK = self._scores(documents, keys_of, losses_NK)
        name, weights_NK = self.weighting["name"], torch.zeros_like(losses_NK)
        for k in range(self.model.n_heads):
            places = mask_NK[:, k].nonzero().flatten().tolist()
            if not places:
                continue
            own = [numbers[n] for n in places]
            if name == "uniform":
                weights = torch.ones(len(places), dtype=torch.float64)
            elif name == "oracle" and self._critic is None:
                of_targets = [self._of_targets(row, row.noise, False)[:, k] for row in chosen]
                clean = torch.cat(of_targets)[places] == 0
                clean = clean if clean.any() else ~clean  # uniform
                weights = clean.double() * len(places) / clean.sum()
            elif name == "column":
                raw = [self._of_targets(row, row.weight, math.nan)[:, k] for row in chosen]
                bounds = self.weighting["w_min"], self.weighting["w_max"]
                weights = calibrate(torch.cat(raw)[places], *bounds)
            elif name == "dft":
                raw = (-losses_NK[places, k]).exp()
                weights = calibrate(raw, self.weighting["w_min"], self.weighting["w_max"])
            elif name == "random_topk":
                weights = self._select(keys_NK[places, k], own, documents)
            elif name == "top_loss":
                weights = self._select(losses_NK[places, k], own, documents)
            elif self._scale_K is not None:
                bounds = self.weighting["w_min"], self.weighting["w_max"]
                weights = (self._scale_K[k] * scores_NK[places, k]).clamp(*bounds)
            elif self._critic is not None:  # critic and its shuffled, which permutes tokens
                weights = softened(scores_NK[places, k], self.weighting)
            else:
                scores = scores_NK[places, k]
                if name == "shuffled":
                    scores = shuffled(scores, own, keys_NK[places, k].tolist())
                if self.weighting["selection"] == "soft":
                    weights = soft(scores, self.weighting)
                else:
                    weights = self._select(scores, own, documents)
            strength = self.weighting["strength"]
            weights_NK[places, k] = (1 - strength) + strength * weights
        return weights_NK

    def _select(self, scores, own: list[int], documents: list[Document]) -> torch.Tensor:
        scope = self.weighting.get("scope", "microbatch")
        scope_of = {
            "microbatch": lambda i: 0,
            "rank": lambda i: documents[i].pack % self.world,
            "document": lambda i: i,
        }[scope]
        return topk(scores, [scope_of(i) for i in own], self.weighting["ratio"])

    def _scores(self, documents, keys_of, losses_NK) -> torch.Tensor | None:
        """Excess losses, or what a critic says of the targets of every head."""
        if self.weighting["name"] not in ("rho1", "critic", "shuffled", "oracle"):
            return None
        if self._of_tokens:
            parts = []
            for document, keys in zip(documents, keys_of, strict=True):
                z = self._of_tokens[document.row]
                if self.weighting["name"] == "shuffled":
                    order = sorted(z, key=lambda u: keys[u])
                    z = {u: z[other] for u, other in zip(z, order, strict=True)}
                row = self.rows[document.row]
                per_token = [z.get(u, math.nan) for u in range(len(row.tokens))]
                parts.append(self._of_targets(row, per_token, math.nan))
            return torch.cat(parts)
        reference_NK = torch.cat([self._reference_losses(self.rows[d.row]) for d in documents])
        excess_NK = losses_NK - reference_NK
        return excess_NK.abs() if self.weighting["score"] == "abs_excess" else excess_NK

    @torch.no_grad()
    def _reference_losses(self, row: Row) -> torch.Tensor:
        """r[t, k]: the reference's own head k, or its next-token loss on head k's target."""
        K = self.model.n_heads
        losses = self._reference.losses(row.tokens, self._reference.trunk(row.tokens))
        if self._reference.n_heads > 1:
            return losses[:, :K]
        before = [math.nan, *losses[:-1, 0].tolist()]  # of each token, by the one before it
        return self._of_targets(row, before, math.nan)

    # ---------------------------------------------------------------------- critic

    def _known_before_training(self) -> dict[int, dict[int, float]]:
        """Raw weight of every response token of the policy's rows, or z for td and gae.

        In the order of the tokens, which is what a permutation of them goes by.
        """
        critic, advantage = self._critic, self.weighting["advantage"]
        chosen = critic.policy_rows
        if self.weighting["name"] == "oracle":
            found = {
                i: {u: float(not self.rows[i].noise[u]) for u in response_of(self.rows[i])}
                for i in chosen
            }
        elif advantage in ("td", "gae"):
            return self._standardised_advantages(0.0 if advantage == "td" else None)
        else:
            floor = 0.1 * sum(critic.good) / len(critic.good)
            found = {
                i: raw_weights(self.rows[i], critic.values[i], advantage, floor) for i in chosen
            }
        self._scale_K = []
        for k in range(self.model.n_heads):  # head k predicts no earlier token than k + 1
            raw = [x for of_row in found.values() for u, x in of_row.items() if u >= k + 1]
            bounds = self.weighting["w_min"], self.weighting["w_max"]
            self._scale_K.append(scale_of(torch.tensor(raw, dtype=torch.float64), *bounds))
        return found

    def _standardised_advantages(self, lam: float | None) -> dict[int, dict[int, float]]:
        """z of every response token of the policy's rows, over all of which it is standardised."""
        critic, lam = self._critic, self.weighting["lam"] if lam is None else lam
        found = {
            i: advantages(self.rows[i], critic.values[i], critic.good[i], lam)
            for i in critic.policy_rows
        }
        every = torch.tensor(
            [a for of_row in found.values() for a in of_row.values()], dtype=torch.float64
        )
        mean, std = every.mean().item(), every.std(correction=0).item()
        return {
            i: {u: min(5.0, max(-5.0, (of_row[u] - mean) / (std + 1e-6))) for u in sorted(of_row)}
            for i, of_row in found.items()
        }
