"""Judges a value head on held-out responses, shared out over the ranks and equal on all of them.

Shapes: N rows of a data set, P pairs of rows. ``sums_N3`` holds ``value_sums`` of every row.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from wmtp_modules.critic import figures
from wmtp_modules.critic.folder import TrainingState, save_critic
from wmtp_modules.critic.rewards import Responses
from wmtp_modules.critic.values import near_marks_of_rows, sums_of_rows
from wmtp_modules.models.mtp_transformer import MTPTransformer
from wmtp_modules.models.value_head import ValueHead
from wmtp_modules.parallel.process_group import all_reduce_sum, patient_barrier
from wmtp_modules.reports.curves import plot_calibration
from wmtp_modules.run.watchdog import Watchdog

BATCH_ROWS = 32  # at a time
FIT_ROWS = 4096  # training rows from which a pairwise critic's scale is fitted


class Judge:
    """Held-out loss and report of a critic; every rank calls the same methods.

    ``trunk`` is the frozen model, whole on this rank; ``pairs_P2`` are held-out pairs, from
    ``training_items``; ``objective`` is ``regression`` or ``pairwise``.
    """

    def __init__(
        self,
        trunk: MTPTransformer,
        train: Responses,
        heldout: Responses,
        pairs_P2: np.ndarray,
        *,
        objective: str,
        watchdog: Watchdog,
    ) -> None:
        self._trunk = trunk
        assert train.rewards is not None
        assert heldout.rewards is not None
        self._train, self._heldout = train, heldout
        self._rewards_train_N, self._rewards_N = train.rewards, heldout.rewards
        self._pairs_P2 = pairs_P2
        self._objective = objective
        self._watchdog = watchdog

    def heldout_loss(self, head: ValueHead) -> float:
        """The objective on held-out responses, per token or per pair."""
        sums_N3 = self._heldout_sums(head)
        if self._objective == "pairwise":
            return figures.pairwise_loss_of(sums_N3, self._pairs_P2)
        return figures.value_loss_of(sums_N3, self._rewards_N)

    def fit_scale_(self, head: ValueHead, seed: int) -> None:
        """Give the values of a pairwise critic the rewards' scale; a regression critic has it."""
        if self._objective == "pairwise":
            rng = np.random.default_rng(seed)
            indices = np.sort(rng.permutation(len(self._train.rows))[:FIT_ROWS])
            sums_N3 = self._sums(head, self._train, indices)
            scale, shift = figures.fit_affine(sums_N3[indices], self._rewards_train_N[indices])
            head.scale.fill_(scale)
            head.shift.fill_(shift)

    def report(self, head: ValueHead) -> tuple[dict, np.ndarray]:
        """``critic_report``, with ``delta_near_mutation`` where known, and mean values [N]."""
        rows, rewards_N = self._heldout.rows, self._rewards_N
        sums_N3 = self._heldout_sums(head)
        report = figures.critic_report(sums_N3, rewards_N, self._pairs_P2)
        if "noise" in rows.column_names:
            bad = self._share(np.flatnonzero(rewards_N <= 0))
            found = near_marks_of_rows(self._trunk, head, rows, bad, rewards_N)
            (found,) = all_reduce_sum(torch.from_numpy(found).to(head.shift.device))
            hits, chance, n_rows = found.tolist()
            if n_rows:
                near = {"share": hits / n_rows, "chance": chance / n_rows, "rows": int(n_rows)}
                report["delta_near_mutation"] = near
        return report, figures.row_means_of(sums_N3)

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
        report, means_N = self.report(head)
        report |= {"steps": state.step, "scale": head.scale.item(), "shift": head.shift.item()}
        if dist.get_rank() == 0:
            plot_calibration(means_N, self._heldout.rewards, where / "calibration.png")
            more = {"report": report, "heldout_losses": state.heldout_losses}
            save_critic(where, head, record | more)
        patient_barrier()

    def _heldout_sums(self, head: ValueHead) -> np.ndarray:
        return self._sums(head, self._heldout, np.arange(len(self._heldout.rows)))

    def _sums(self, head: ValueHead, responses: Responses, indices: np.ndarray) -> np.ndarray:
        """``value_sums`` of some rows, shared out over the ranks."""
        own = sums_of_rows(self._trunk, head, responses.rows, self._share(indices))
        (sums_N3,) = all_reduce_sum(torch.from_numpy(own).to(head.shift.device))
        return sums_N3.cpu().numpy()

    def _share(self, indices: np.ndarray) -> Iterator[np.ndarray]:
        """This rank's part of some rows, in batches."""
        own = indices[dist.get_rank() :: dist.get_world_size()]
        batches = (own[i : i + BATCH_ROWS] for i in range(0, len(own), BATCH_ROWS))
        return self._watchdog.beating(batches, "rows that judge the critic")
