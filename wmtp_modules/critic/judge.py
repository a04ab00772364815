"""Judges a value head on held-out responses, shared out over the ranks and equal on all of them.

Shapes: N rows of a data set, P pairs of rows, M judged tokens (``figures.Judged``).
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from wmtp_modules.critic import figures
from wmtp_modules.critic.folder import TrainingState, save_critic
from wmtp_modules.critic.pairs import HeldoutPairs, response_spans
from wmtp_modules.critic.rewards import Responses
from wmtp_modules.critic.states import RowStates, set_feature_statistics_
from wmtp_modules.models.mtp_transformer import MTPTransformer
from wmtp_modules.models.value_head import ValueHead
from wmtp_modules.parallel.process_group import all_reduce_sum, patient_barrier
from wmtp_modules.reports.curves import plot_calibration
from wmtp_modules.run.watchdog import Watchdog

BATCH_ROWS = 32  # at a time
FIT_ROWS = 4096  # training rows from which features are standardised, and a pairs critic scaled


class Judge:
    """Held-out loss and report of a critic; every rank calls the same methods.

    ``trunk`` is the frozen model, whole on this rank; ``pairs`` are held-out ones, from
    ``heldout_pairs``; ``objective`` is ``bce`` or ``pairs``. ``states`` are of the training rows.
    """

    def __init__(
        self,
        trunk: MTPTransformer,
        train: Responses,
        heldout: Responses,
        pairs: HeldoutPairs,
        *,
        objective: str,
        watchdog: Watchdog,
    ) -> None:
        self._vocab_size, device = trunk.args["vocab_size"], next(trunk.parameters()).device
        self._train, self._heldout = train, heldout
        self.states = RowStates(trunk, train.rows, device)
        self._heldout_states = RowStates(trunk, heldout.rows, device)
        self._judged = figures.Judged.of(heldout.rows, *response_spans(heldout.rows))
        self._pairs = pairs
        self._objective = objective
        self._watchdog = watchdog

    def prepare_(self, head: ValueHead, seed: int) -> None:
        """Give an untrained head b, and the scale of its features, of the training rows."""
        mean = self._train.good.mean()
        head.base.fill_(float(np.log(mean / (1 - mean))))
        set_feature_statistics_(head, self.states, self._share(self._fit_rows(seed)))

    def heldout_loss(self, head: ValueHead) -> float:
        """The objective on held-out responses, per token or per pair."""
        logits_M, _ = self._of_tokens(head, self._heldout_states, self._judged)
        if self._objective == "bce":
            return figures.cross_entropy(logits_M, self._heldout.good[self._judged.row])
        judged, scores_N = self._judged, np.zeros(len(self._heldout.good))
        scores_N[judged.has_response] = logits_M[judged.last]
        step_M = np.where(judged.place > 0, np.diff(logits_M, prepend=0.0), 0.0)
        n_N = np.maximum(np.diff(judged.offsets) - 1, 0)
        square_N = np.bincount(judged.row, step_M**2, minlength=len(n_N))
        return figures.pairs_cross_entropy(
            scores_N, np.stack([square_N, n_N], 1), self._pairs.rows_P2
        )

    def fit_scale_(self, head: ValueHead, seed: int) -> None:
        """Make probabilities of a pairs critic's running sums: kappa >= 0 of b + kappa L.

        By token-level cross-entropy on training rows. A bce critic's are probabilities already.
        """
        if self._objective == "pairs":
            train, rows, base = self._train, self._fit_rows(seed), head.base.item()
            judged = figures.Judged.of(train.rows, *response_spans(train.rows))
            logits_M, _ = self._of_tokens(head, self.states, judged, rows)
            some_M = np.isin(judged.row, rows)
            good_M = train.good[judged.row[some_M]]
            head.kappa.fill_(fit_kappa(logits_M[some_M] - base, base, good_M))

    def report(self, head: ValueHead) -> tuple[dict, np.ndarray]:
        """``critic_report``, and the logits of V after every judged held-out token [M]."""
        train, heldout = self._train, self._heldout
        logits_M, losses_M = self._of_tokens(head, self._heldout_states, self._judged)
        table_V = figures.token_table(
            figures.Judged.of(train.rows, *response_spans(train.rows)),
            train.good,
            self._vocab_size,
        )
        report = figures.critic_report(
            self._judged, logits_M, losses_M, heldout.good, table_V, self._pairs.rows_P2
        )
        return report | {"pair_kind": self._pairs.kind}, logits_M

    def finish(
        self, head: ValueHead, state: TrainingState, where: Path, record: dict, seed: int
    ) -> None:
        """Give the head its best weights and scale, and write report, picture and record.

        Args:
            head: of the critic.
            state: of its training.
            where: folder of the critic.
            record: what else to keep, see ``save_critic``.
            seed: of the rows that the scale is fitted on.
        """
        head.load_state_dict(state.best_head)
        self.fit_scale_(head, seed)
        report, logits_M = self.report(head)
        report |= {"steps": state.step, "base": head.base.item(), "kappa": head.kappa.item()}
        if dist.get_rank() == 0:
            row_M = self._judged.row
            plot_calibration(
                figures.sigmoid(logits_M),
                self._heldout.good[row_M],
                row_M,
                where / "calibration.png",
            )
            more = {"report": report, "heldout_losses": state.heldout_losses}
            save_critic(where, head, record | more)
        patient_barrier()

    def _fit_rows(self, seed: int) -> np.ndarray:
        rng = np.random.default_rng(seed)
        return np.sort(rng.permutation(len(self._train.rows))[:FIT_ROWS])

    @torch.no_grad()
    def _of_tokens(
        self,
        head: ValueHead,
        states: RowStates,
        judged: figures.Judged,
        rows: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Logits of V, and head 0's loss, at every judged token, fp64 [M] each, of all ranks.

        With ``rows`` of these only, and 0 elsewhere.
        """
        rows = np.arange(len(judged.first)) if rows is None else rows
        found_2M = torch.zeros(2, len(judged.token), dtype=torch.float64)
        for indices in self._share(rows[judged.has_response[rows]]):
            batch, hidden_BTD, surprise_BT3 = states(indices)
            logits_BT = head(hidden_BTD, surprise_BT3, batch["y"])
            both_2BT = torch.stack([logits_BT, surprise_BT3[..., 0]]).double().cpu()
            for b, row in enumerate(indices.tolist()):
                begin, end, u = *judged.offsets[row : row + 2], judged.first[row] - 1
                found_2M[:, begin:end] = both_2BT[:, b, u : u + end - begin]
        found_2M[1, judged.place == 0] = 0.0  # NaN at a row's first token, and read nowhere
        (found_2M,) = all_reduce_sum(found_2M.to(head.base.device))
        return tuple(found_2M.cpu().numpy())

    def _share(self, indices: np.ndarray) -> Iterator[np.ndarray]:
        """This rank's part of some rows, in batches."""
        own = indices[dist.get_rank() :: dist.get_world_size()]
        batches = (own[i : i + BATCH_ROWS] for i in range(0, len(own), BATCH_ROWS))
        return self._watchdog.beating(batches, "rows that judge the critic")


def fit_kappa(sums_M: np.ndarray, base: float, good_M: np.ndarray) -> float:
    """The kappa >= 0 at which sigmoid(base + kappa * sums) has the least cross-entropy.

    It is convex in kappa: a root of its derivative, or 0 where that is not negative there.
    """
    from scipy.optimize import root_scalar

    def slope(kappa: float) -> float:
        return float(((figures.sigmoid(base + kappa * sums_M) - good_M) * sums_M).mean())

    if slope(0.0) >= 0:
        return 0.0
    high = 1.0
    while slope(high) < 0 and high < 1e6:  # beyond: the sums tell good from bad without an error
        high *= 2
    return root_scalar(slope, bracket=(0.0, high)).root if slope(high) >= 0 else high
