import json

import numpy as np
import pytest

from wmtp_modules.reports import curves
from wmtp_modules.reports.curves import plot_curves
from wmtp_modules.reports.metrics import read_metrics


@pytest.fixture
def metrics(tmp_path):
    """Two runs of three steps with two heads."""
    lines = [{"step": 0, "val_loss": 3.0, "val_loss_head_0": 2.5, "val_loss_head_1": 3.5}]
    lines += [{"step": step, "loss": 3.0 - step, "ess": 0.5} for step in (1, 2)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    for name in ("uniform", "rho1"):
        (tmp_path / f"{name}.jsonl").write_text(text)
    return {name: tmp_path / f"{name}.jsonl" for name in ("uniform", "rho1")}


def test_every_panel_says_what_it_shows(metrics):
    figure = curves._curves({name: read_metrics(path) for name, path in metrics.items()})
    axes = [axis for part in figure.subfigs for axis in part.axes]
    assert [axis.get_title() for axis in axes] == [
        "Held-out loss, mean of heads",
        "Training loss, unweighted, smoothed",
        "Effective sample size",
        "Held-out loss, head 0",
        "Held-out loss, head 1",
    ]
    assert all(axis.get_xlabel() == "optimizer step" for axis in axes)
    units = ["loss (nats per token)", "loss (nats per token)", "share of tokens"]
    assert [axis.get_ylabel() for axis in axes] == [*units, "loss (nats per token)", ""]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["uniform", "rho1"]
    for axis in axes:
        drawn = {line.get_label() for line in axis.get_lines()} - {"_child0", "_child2"}
        assert drawn == {"uniform", "rho1"}


def test_tokens_per_forward_have_a_panel_unless_there_is_one_head(metrics):
    def titles():
        figure = curves._curves({name: read_metrics(path) for name, path in metrics.items()})
        return [axis.get_title() for part in figure.subfigs for axis in part.axes]

    lines = {"step": 0, "tokens_per_forward": 1.5}
    for more, is_drawn in (({}, False), ({"acceptance_head_1": 0.5}, True)):
        with metrics["rho1"].open("a") as file:
            file.write(json.dumps(lines | more) + "\n")
        assert ("Held-out tokens per forward" in titles()) == is_drawn


def test_many_runs_of_long_names_are_told_apart_inside_the_picture(metrics):
    lines = read_metrics(metrics["rho1"])
    figure = curves._curves({f"another_{i}_{'n' * 30}": lines for i in range(16)})
    (legend,) = figure.legends
    figure.canvas.draw()
    box, whole = legend.get_window_extent(), figure.bbox
    assert box.x0 >= 0
    assert box.x1 <= whole.x1
    drawn = figure.subfigs[0].axes[0].get_lines()
    looks = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in drawn}
    assert len(looks) == 16


def test_the_picture_is_written(metrics, tmp_path):
    plot_curves(metrics, tmp_path / "new" / "curves.png")
    assert (tmp_path / "new" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_to_draw(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match=r"no loss to draw in .*empty.jsonl"):
        plot_curves({"a": tmp_path / "empty.jsonl"}, tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


def test_calibration_bins_hold_equally_many_tokens_in_order():
    rng = np.random.default_rng(0)
    predicted, good = rng.random(50), rng.integers(0, 2, 50).astype(float)
    rows = np.arange(50) // 2  # two tokens of each response
    (axis,) = curves._calibration(predicted, good, rows, bins=5).axes
    _, (points, _, (bars,)) = axis.get_lines()[0], axis.containers[0].lines
    order = np.argsort(predicted).reshape(5, 10)
    np.testing.assert_allclose(points.get_xdata(), predicted[order].mean(1))
    np.testing.assert_allclose(points.get_ydata(), good[order].mean(1))
    # An error bar counts a response once, however many of its tokens are in the bin.
    for part, segment in zip(order, bars.get_segments(), strict=True):
        error = good[part].std() / len(set(rows[part])) ** 0.5
        np.testing.assert_allclose(np.ptp(segment[:, 1]), 2 * error)
    assert axis.get_xlabel() == "predicted share of good, V"
