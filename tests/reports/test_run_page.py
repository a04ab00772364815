"""Pages of made runs with known numbers; what a real run writes is in tests/recipes."""

import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml

from wmtp_modules.reports import metrics, run_page
from wmtp_modules.reports.charts import Line, bands, chart
from wmtp_modules.reports.metrics import MOST_POINTS, Curve, read_metrics, smoothed, thinned
from wmtp_modules.reports.run_page import draw_run, write_run_page

EVIL = "<script>alert('\"&amp;')</script>"


class Page(HTMLParser):
    """Tags with attributes, the text, and the rows of tables; every tag is closed in order."""

    VOID = {"meta", "input", "rect"}

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self.rows, self._open = [], "", [], []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self._open and self._open[-1] in ("td", "th"):
            self.rows[-1][-1] += data

    def titles(self):
        return re.findall(r"step ([\d,]+): (\S+)", self.text)


def write_run(folder, lines, settings=None, **more):
    """The files of a run; ``more`` are other files' contents by name without suffix."""
    folder.mkdir(parents=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)
    if settings is not None:
        (folder / "config.yaml").write_text(yaml.safe_dump({"output_dir": str(folder)} | settings))
    for name, content in more.items():
        is_lines = isinstance(content, list)
        text = "".join(json.dumps(x) + "\n" for x in content) if is_lines else json.dumps(content)
        (folder / f"{name}.json{'l' if is_lines else ''}").write_text(text)
    return folder


def validated(step, loss, gap=0.5):
    heads = {"val_loss_head_0": loss - gap, "val_loss_head_1": loss + gap}
    return {"step": step, "val_loss": loss} | heads


def trained(step, loss):
    figures = {"loss": loss, "ess": 0.5, "selected_share": 0.6, "lr": 1e-4, "grad_norm": 2.0}
    figures |= {"noise_in_data": 0.4, "noise_in_weight": 0.3, "tokens_per_s": 100.0}
    by_head = {"selected": 0.6, "low": 0.25, "high": 0.125}
    return {"step": step} | figures | {f"weight_{k}_head_0": v for k, v in by_head.items()}


RUN = [validated(0, 4.0), trained(1, 3.5), trained(2, 3.25) | validated(2, 3.0)]
SETTINGS = {"weighting": {"name": "rho1", "ratio": 0.6}, "max_steps": 2, "seed": 1}


# ------------------------------------------------------------------------------ reading


def test_curves_are_what_was_logged(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": 1, "a": 1, "b": None}, {"step": 2, "a": 2.5, "c": True}, {"step": 3, "b": 3}]
    text = "\n".join(map(json.dumps, lines))
    path.write_text(f"{text}\n[1]\n\n{{broken\n" + '{"step": 4, "a": 9.0}')  # killed in a line
    found = read_metrics(path)
    assert found.unreadable == 2
    assert found.curves.keys() == {"a", "b"}
    assert found.curves["a"].steps.tolist() == [1, 2]
    assert found.curves["a"].values.tolist() == [1.0, 2.5]
    np.testing.assert_array_equal(found.curves["b"].values, [np.nan, 3.0])
    assert found.last_step == 3


def test_a_step_that_was_made_again_counts_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    steps = [(1, 1.0), (2, 2.0), (3, 3.0), (2, 20.0), (3, 30.0), (4, 40.0)]
    path.write_text("".join(json.dumps({"step": s, "a": a}) + "\n" for s, a in steps))
    curve = read_metrics(path).curves["a"]
    assert curve.steps.tolist() == [1, 2, 3, 4]
    assert curve.values.tolist() == [1.0, 20.0, 30.0, 40.0]


def test_thinning_keeps_both_ends_the_extremes_and_the_gaps():
    n = 500_000
    values = np.random.default_rng(0).normal(size=n)
    values[123_456], values[n - 2] = 99.0, -99.0
    values[300_000:300_004] = np.nan
    short = thinned(Curve(np.arange(1, n + 1), values))
    assert MOST_POINTS / 2 < len(short) <= MOST_POINTS
    assert (short.steps[0], short.steps[-1]) == (1, n)
    assert (np.diff(short.steps) > 0).all()
    points = dict(zip(short.steps.tolist(), short.values.tolist(), strict=True))
    assert (points[123_457], points[n - 1]) == (99.0, -99.0)
    assert [step for step, value in points.items() if math.isnan(value)] == [300_001]
    np.testing.assert_array_equal(short.values, values[short.steps - 1])
    few = Curve(np.arange(3), np.ones(3))
    assert thinned(few) is few


def test_smoothing_by_hand_leaves_gaps_out():
    curve = smoothed(Curve(np.arange(4), np.array([1.0, np.nan, 2.0, 4.0])), 0.5)
    assert curve.steps.tolist() == [0, 2, 3]
    assert curve.values.tolist() == pytest.approx(
        [1.0, (0.25 + 1) / 0.75, (0.125 + 0.5 + 2) / 0.875]
    )


def test_tokens_per_forward_stand_beside_the_controls(tmp_path):
    def decoding(line, fast):
        figures = {"tokens_per_forward": fast, "acceptance_head_1": fast - 1}
        return line | figures | {"tokens_per_forward/word_start": fast + 0.125}

    run = write_run(tmp_path / "run", RUN, SETTINGS | {"controls": ["uniform", "older"]})
    assert "Tokens per forward" not in write_run_page(run).read_text()
    lines = [decoding(validated(0, 4.0), 1.25), decoding(validated(2, 3.0), 1.5)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    uniform = {"weighting": {"name": "uniform"}}
    write_run(run / "controls" / "uniform", [decoding(validated(2, 3.5), 1.375)], uniform)
    write_run(run / "controls" / "older", RUN, {"weighting": {"name": "older"}})
    page = Page(write_run_page(run).read_text())
    found = next(i for i, row in enumerate(page.rows) if "tokens/forward" in row)
    assert page.rows[found : found + 4] == [
        ["", "tokens/forward", "head 1", "word start"],
        ["before training", "1.250", "0.250", "1.375"],
        ["uniform", "1.375", "0.375", "1.500"],
        ["rho1", "1.500", "0.500", "1.625"],
    ]
    assert "step 2: 1.5" in page.text  # in the chart


# ------------------------------------------------------------------------------- charts


def points_of(path):
    return [tuple(map(float, xy)) for xy in re.findall(r"[ML](-?[\d.]+),(-?[\d.]+)", path)]


def test_points_lie_where_the_axes_say():
    """Ticks are read off the drawing, as a reader would, and the points against them."""
    curve = Curve(np.array([0, 50, 100]), np.array([1.0, 3.0, 2.0]))
    html = chart("Loss", [Line("a", curve, every=True)], unit="nats")
    texts = re.findall(r"<text x='([\d.]+)' y='([\d.]+)' class='(\w)'>([\d.]+)", html)
    x_of = {float(value): float(x) for x, _, axis, value in texts if axis == "x"}
    y_of = {float(value): float(y) - 4 for _, y, axis, value in texts if axis == "y"}
    drawn = points_of(re.search(r"class='line' d='([^']*)'", html)[1])
    expected = [(x_of[s], y_of[v]) for s, v in ((0, 1), (50, 3), (100, 2))]
    np.testing.assert_allclose(drawn, expected, atol=0.11)
    assert re.findall(r"<title>(.*?)</title>", html) == [
        "a, step 0: 1",
        "a, step 50: 3",
        "a, step 100: 2",
    ]
    assert "a <b>2</b>" in html  # the last value, in the legend


def test_what_is_not_finite_is_a_gap():
    curve = Curve(np.arange(5), np.array([1.0, 2.0, np.nan, 3.0, np.nan]))
    line = re.search(r"class='line' d='([^']*)'", chart("Loss", [Line("a", curve)]))[1]
    assert (line.count("M"), len(points_of(line))) == (2, 3)
    assert chart("Loss", [Line("a", Curve(np.arange(2), np.full(2, np.nan)))]) == ""
    assert chart("Loss", []) == ""


@pytest.mark.parametrize(
    "values", [[5.0], [0.0, 0.0], [1e-12, 1e-12], [-1e9, 1e9], [3.0, 3.0 + 1e-15]]
)
def test_odd_ranges_have_an_axis(values):
    html = chart("Loss", [Line("a", Curve(np.arange(len(values)), np.array(values)))])
    numbers = [float(x) for x in re.findall(r"[ML](-?[\d.]+),", html)]
    assert numbers
    assert all(0 <= x <= 320 for x in numbers)
    assert 1 <= html.count("class='y'") <= 12


def test_values_that_jump_far_are_on_a_log_axis():
    jump = Curve(np.arange(100), np.append(np.ones(99), 1e5))
    assert "log scale" in chart("Gradient norm", [Line("a", jump)])
    assert "log scale" not in chart("Share", [Line("a", jump)], floor=0.0)


def test_shares_are_stacked():
    steps = np.array([1, 2])
    html = bands(
        "W",
        [
            ("low", Curve(steps, np.array([0.25, 0.5]))),
            ("high", Curve(steps, np.array([0.75, 0.5]))),
        ],
    )
    edge = [
        [float(p.split(",")[1]) for p in d.split()] for d in re.findall(r"d='M([^zMH]*)z'", html)
    ]
    (a, b, *_), (top, top_2, c, d) = edge
    assert (c, d) == (b, a)  # the second lies on the first
    assert top == top_2 < b < a
    assert "low <b>50.0%</b>" in html


# -------------------------------------------------------------------------------- pages


@pytest.fixture
def page_of():
    def make(folder, summary=None):
        html = write_run_page(folder, summary).read_text(encoding="utf-8")
        outside = r"https?:|src=|href=['\"](?!#|\.\./\.\./run\.html)|url\(|@import|<script"
        assert not re.search(outside, html)
        return Page(html)

    return make


def test_a_page_says_what_is_known(page_of, tmp_path):
    controls = ["uniform", {"longer": {"max_steps": 4}}, "gone"]
    run = write_run(tmp_path / "run", RUN, SETTINGS | {"controls": controls}, summary={"steps": 2})
    uniform = {"weighting": {"name": "uniform", "ratio": 0.6}}
    write_run(run / "controls" / "uniform", [*RUN[:2], validated(2, 3.5)], SETTINGS | uniform)
    longer = {"control": {"name": "longer", "overrides": {"max_steps": 4}}, "max_steps": 4}
    write_run(run / "controls" / "longer", [validated(4, 2.875)], SETTINGS | longer)
    write_run(run / "controls" / "old", RUN, SETTINGS)  # of an earlier config
    page = page_of(run)
    assert "Complete after 2 steps." in page.text
    assert page.rows[:5] == [
        ["", "step", "head 0", "head 1", "mean", "rho1 minus it"],
        ["before training", "0", "3.5000", "4.5000", "4.0000", ""],
        ["uniform", "2", "3.0000", "4.0000", "3.5000", "-0.5000"],
        ["longer", "4", "2.3750", "3.3750", "2.8750", "+0.1250"],
        ["rho1", "2", "2.5000", "3.5000", "3.0000", ""],
    ]
    assert ["max_steps", "2", "2", "4"] in page.rows
    assert ["weighting.name", "rho1", "uniform", "rho1"] in page.rows
    assert [row for row in page.rows if row[0] in ("output_dir", "seed", "control.name")] == []
    assert "old, step" not in page.text
    for told in ("rho1, step 2: 3", "uniform, step 2: 3.5", "longer, step 4: 2.875"):
        assert told in page.text
    # shares of weights below 1/2, to 1, to 2 and above
    for told in ("below ½ 25.0%", "½ to 1 15.0%", "1 to 2 47.5%", "2 and above 12.5%"):
        assert told in page.text
    assert f"--config {run}/config.yaml resume_from_checkpoint=true max_steps=N" in page.text
    assert f"resume_from_checkpoint=false output_dir={run}_again" in page.text


def test_a_control_points_to_its_run(page_of, tmp_path):
    control = {"control": {"name": "longer", "overrides": {"max_steps": 4}}}
    page = page_of(write_run(tmp_path / "run" / "controls" / "longer", RUN, SETTINGS | control))
    assert ("a", {"href": "../../run.html"}) in page.tags
    assert "It changes max_steps=4." in page.text


def test_the_reference_stands_in_the_table(page_of, tmp_path):
    run = write_run(tmp_path / "run", RUN, SETTINGS)
    page = page_of(run, {"steps": 2, "reference": {"heads": 2, "heldout_loss": [1.0, 2.0]}})
    assert page.rows[2] == ["reference", "", "1.0000", "2.0000", "1.5000"]


@pytest.mark.parametrize(
    "lines", [[], RUN[:1], [trained(1, 3.0)], [{"step": 7, "loss": None}], [{"step": 1}]]
)
def test_missing_parts_are_left_out(page_of, tmp_path, lines):
    page = page_of(write_run(tmp_path / "a run", lines))
    assert f"logged to step {max((x['step'] for x in lines if len(x) > 1), default=0)}" in page.text
    for text in ("nan", "None", "inf"):
        assert text not in page.text.lower().replace("information", "")
    assert page.tags.count(("svg", {})) == 0


def test_a_stopped_run_says_why(page_of, tmp_path):
    stopped = {"reason": "SIGTERM", "step": 2}
    run = write_run(tmp_path / "run", RUN, SETTINGS | {"max_steps": 1000}, exit=stopped)
    first = "# tune run --nproc_per_node 8 recipes/mine.py\n"
    (run / "config.yaml").write_text(first + (run / "config.yaml").read_text())
    page = page_of(run)
    assert "Stopped by SIGTERM, logged to step 2 of 1,000." in page.text
    again = f"{first[2:-1]} --config {run}/config.yaml resume_from_checkpoint=true"
    assert again in page.text


def test_skipped_steps_and_spikes_are_listed(page_of, tmp_path):
    skipped = [
        {"step": s, "reason": "the loss is nan", "rows": [[[s, 7]], [[8]]]} for s in range(1, 61)
    ]
    spikes = [{"step": 61, "loss": "nan", "mean_before": 3.0, "rows": [[list(range(20))]]}]
    lines = [*RUN, {"step": 3, "loss": None, "grad_norm": None}]
    page = page_of(
        write_run(tmp_path / "run", lines, SETTINGS, skipped_steps=skipped, loss_spikes=spikes)
    )
    assert "Steps that were skipped: 60. Loss spikes: 1." in page.text
    assert "loss_spikes.jsonl have 11 more" in page.text
    assert ["60", "skipped: the loss is nan", "7, 8, 60"] in page.rows
    assert ["61", "loss nan, before 3", ", ".join(map(str, range(12))) + " and 8 more"] in page.rows
    assert "step 60: skipped: the loss is nan" in page.text


def test_everything_from_outside_is_escaped(page_of, tmp_path):
    settings = {
        "weighting": {"name": EVIL},
        "max_steps": EVIL,
        "controls": [EVIL],
        EVIL: {EVIL: EVIL},
    }
    folder = tmp_path / "<b> & 'c' \"d\""
    reasons = [{"step": 1, "reason": EVIL, "rows": None}]
    document = {
        "row": 0,
        "tokens": [EVIL, "\r"],
        "marked": [True, False],
        "heads": [[None], [[1.5]]],
    }
    tokens = {
        "step": 1,
        "of_heads": [EVIL],
        "of_tokens": [],
        "left_out": 0,
        "documents": [document],
    }
    run = write_run(
        folder,
        RUN,
        settings,
        skipped_steps=reasons,
        tokens=tokens,
        exit={"reason": EVIL, "step": 1},
    )
    page = page_of(run)
    assert page.text.count(EVIL) > 5
    assert {"script", "b"} & {tag for tag, _ in page.tags} <= {"b"}  # of legends
    assert str(run) in page.text


def test_secrets_of_a_config_are_not_shown(page_of, tmp_path):
    secrets = {
        "metric_logger": {"uri": "https:" + "//me:open-sesame@host", "api_key": "open-sesame"}
    }
    run = write_run(tmp_path / "run", RUN, SETTINGS)
    (run / "config.yaml").write_text(yaml.safe_dump(SETTINGS | secrets))
    text = write_run_page(run).read_text()
    assert "open-sesame" not in text
    assert "whose values are hidden (***)" in text


def test_tokens_are_coloured_for_each_head(page_of, tmp_path):
    document = {
        "row": 7,
        "tokens": ["", "a", "\n"],
        "marked": [False, True, False],
        "heads": [[None, None], [[4.0, 2.5], None], [[1.0, 0.5], [0.25, None]]],
        "value": [0.5, 0.25, None],
    }
    tokens = {"step": 9, "of_heads": ["weight", "loss"], "of_tokens": ["value"], "left_out": 12}
    run = write_run(tmp_path / "run", RUN, SETTINGS, tokens=tokens | {"documents": [document]})
    page = page_of(run)
    spans = [attributes for tag, attributes in page.tags if tag == "span" and "title" in attributes]
    assert [span.get("class") for span in spans] == ["empty", "marked", "newline"]
    assert [span.get("style") for span in spans] == [
        "--t0:var(--grey);--t1:var(--grey)",
        "--h0:var(--u7);--t1:var(--grey)",
        "--h1:var(--d7)",
    ]
    assert spans[1]["title"] == (
        "token 1: 'a'\nhead 0: weight 4, loss 2.5\nhead 1: not supervised\nvalue 0.25"
    )
    assert spans[2]["title"].endswith("head 1: weight 0.25, loss not finite\nvalue not finite")
    assert "in step 9" in page.text
    assert "12 more tokens are not shown" in page.text
    assert [a["id"] for tag, a in page.tags if tag == "input"] == ["head0", "head1"]


def test_a_huge_run_is_thinned_and_says_so(page_of, tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "MOST_POINTS", 100)
    lines = [{"step": s, "tokens_per_s": 10.0 + (s == 4321)} for s in range(1, 6001)]
    run = write_run(tmp_path / "run", lines, SETTINGS | {"max_steps": 500_000})
    page = page_of(run)
    assert "Of up to 6,000 points of a curve" in page.text
    (line,) = [a["d"] for tag, a in page.tags if a.get("class") == "line" and "H24" not in a["d"]]
    assert len(points_of(line)) <= MOST_POINTS
    assert min(y for _, y in points_of(line)) < points_of(line)[0][1]  # the one that is higher
    assert "logged to step 6,000 of 500,000" in page.text


def test_no_run_ends_for_its_page(tmp_path, caplog):
    draw_run(tmp_path)
    assert "run.html could not be drawn: ValueError" in caplog.text
    (tmp_path / "run.html").mkdir()
    (tmp_path / "metrics.jsonl").touch()
    draw_run(tmp_path)
    assert caplog.text.count("could not be drawn") == 2


def test_the_command_draws_and_refuses(tmp_path, capsys):
    run = write_run(tmp_path / "run", RUN)
    run_page.main([str(run)])
    assert capsys.readouterr().out == f"{run / 'run.html'}\n"
    with pytest.raises(
        SystemExit, match=r"has no metrics.jsonl \(No such file or directory\): name"
    ):
        run_page.main([str(tmp_path)])


BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium here: `apt-get install chromium` has one")
def test_a_browser_has_nothing_to_complain_of(tmp_path):
    """No error on the console, no request, and at 400 pixels nothing wider than the screen."""
    controls = {"controls": ["uniform"]}
    run = write_run(tmp_path / "run", RUN, SETTINGS | controls)
    write_run(run / "controls" / "uniform", RUN, SETTINGS | {"weighting": {"name": "uniform"}})
    page = write_run_page(run)
    # The page allows no script, so one beside it looks; a window is never narrower than 500 pixels.
    look = tmp_path / "look.html"
    look.write_text(
        f"<iframe id=f width=400 height=900 frameborder=0 src='{page.as_uri()}'></iframe><script>"
        "f.onload = () => { const d = f.contentDocument; document.title = [d.body.scrollWidth, "
        "d.querySelectorAll('figure.chart svg').length, d.defaultView.performance"
        ".getEntriesByType('resource').length].join() }</script>"
    )
    done = subprocess.run(
        [
            *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"),
            *("--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}"),
            *("--dump-dom", look.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    title = re.search("<title>(.*?)</title>", done.stdout)
    assert title, done.stderr[-2000:]
    width, charts, requests = map(int, title[1].split(","))
    assert width <= 400
    assert charts > 10
    assert requests == 0
    assert "CONSOLE" not in done.stderr
