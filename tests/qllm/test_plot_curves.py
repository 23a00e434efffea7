"""Figures: what the lines hold, and the same file for the same results."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure

from qllm.config.config import load_config
from qllm.config.yaml_lines import ConfigError
from qllm.experiment.results import Results
from qllm.experiment.sweep import simulate
from qllm.plots.curves import plot_slo, plot_ttft, save_figures
from qllm.plots.lines import x_axis
from qllm.plots.perfetto import record, timeline_runs
from qllm.plots.point import plot_ablation, plot_cdf, plot_time_spent
from qllm.plots.report import write_report
from qllm.plots.schedule import save_timeline
from qllm.plots.style import log_axis, new_figure
from qllm.traces.step_times.testing import affine_timings
from tests.cli_support import CONFIG, write_config

mpl.use("Agg")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return simulate(write_config(tmp_path_factory.mktemp("figures")))


def lines(ax) -> dict[str, tuple[list, list]]:
    """What has a label for a legend."""
    drawn = {str(line.get_label()): (list(line.get_xdata()), list(line.get_ydata())) for line in ax.get_lines()}
    return {label: data for label, data in drawn.items() if not label.startswith("_")}


def test_ttft_lines_are_the_summarys_columns(results: Results) -> None:
    drawn = lines(plot_ttft(results, "ttft_p99_s"))
    assert set(drawn) == {"fcfs", "qllm", "SLO 0.05 s"}
    rows = results.summary[(results.summary["policy"] == "qllm") & (results.summary["class"] == "ls")]
    assert drawn["qllm"] == (rows["rate"].tolist(), rows["ttft_p99_s"].tolist())
    assert drawn["SLO 0.05 s"][1] == [0.05, 0.05]


def test_slo_lines_agree_with_the_summary(results: Results) -> None:
    drawn = lines(plot_slo(results))
    rows = results.summary[(results.summary["policy"] == "fcfs") & (results.summary["class"] == "ls")]
    np.testing.assert_allclose(drawn["fcfs"][1], rows["slo_attainment"])


def test_another_class_and_other_swept_keys(results: Results, tmp_path: Path) -> None:
    assert "be" in plot_ttft(results, cls="be").get_ylabel()
    overrides = ["sweep.rate=[50]", "sweep.limits.max_seqs=[2, 4, 8]", "seeds=1"]
    swept = simulate(write_config(tmp_path), set=overrides)
    assert x_axis(swept) == "limits.max_seqs"
    assert lines(plot_ttft(swept))["fcfs"][0] == [2, 4, 8]
    both = simulate(write_config(tmp_path), set=[*overrides[1:], "sweep.rate=[5, 50]"])
    assert "qllm, limits.max_seqs=4" in lines(plot_slo(both))


def test_the_rate_of_a_class_is_an_axis_and_that_of_all_together_makes_no_lines(tmp_path: Path) -> None:
    rates = ["rate=null", "classes.ls={rate: 5, share: null}", "classes.be={rate: 20, share: null}"]
    lengths = [f"classes.{cls}.{key}=8" for cls in ("ls", "be") for key in ("prompt", "output")]
    swept = simulate(
        write_config(tmp_path), set=[*rates, *lengths, "sweep={classes.ls.rate: [5, 10]}", "seeds=1", "requests=20"]
    )
    assert swept.summary["rate"].nunique() == 2
    assert x_axis(swept) == "classes.ls.rate"
    ax = plot_ttft(swept)
    assert ax.get_xlabel() == "ls request rate (requests/s)"
    drawn = lines(ax)
    assert drawn["fcfs"][0] == [5, 10]
    assert {"fcfs", "qllm"} == {label for label in drawn if not label.startswith("SLO")}
    assert "10 ls requests/s" in plot_time_spent(swept).get_xlabel()
    whole = simulate(
        write_config(tmp_path),
        set=[*rates, *lengths, "sweep={classes.ls.rate: [5, 10], rate: [20, 40]}", "seeds=1", "requests=20"],
    )
    assert x_axis(whole) == "rate"


def test_files_are_the_same_for_the_same_results_and_name_the_timings(results: Results, tmp_path: Path) -> None:
    caption = "Timings: affine: modelled; no device"
    first, second = (save_figures(results, folder, caption) for folder in _folders(tmp_path))
    assert [path.name for path in first] == [
        "ttft.png",
        "ttft.svg",
        "throughput.png",
        "throughput.svg",
        "slo.png",
        "slo.svg",
    ]
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()
    assert caption in (tmp_path / "0" / "ttft.svg").read_text()


def test_no_slo_no_slo_figure(tmp_path: Path) -> None:
    without = simulate(write_config(tmp_path), set=["classes.ls.slo=null", "sweep.rate=[5]", "seeds=1"])
    assert [path.name for path in save_figures(without, tmp_path, "")] == [
        *("ttft.png", "ttft.svg", "throughput.png", "throughput.svg")
    ]


def _folders(parent: Path) -> list[Path]:
    folders = [parent / "0", parent / "1"]
    for folder in folders:
        folder.mkdir()
    return folders


def panels(results: Results, folder: Path, monkeypatch: pytest.MonkeyPatch, **more) -> dict[str, Figure]:
    """The figures that `save_figures` writes, by name."""
    found: dict[str, Figure] = {}

    def keep(self: Figure, path: Path, **_) -> None:
        found[path.stem] = self

    monkeypatch.setattr(Figure, "savefig", keep)
    save_figures(results, folder, "Timings: affine: modelled", **more)
    return found


def caption(figure: Figure) -> str:
    return figure.get_supxlabel().replace("\n", " ")


def test_the_figures_show_every_class_and_attainment_by_bound_and_the_caption_the_bounds(tmp_path, monkeypatch) -> None:
    bounds = ["classes.ls.slo={ttft: 0.05, tpot: 0.02}", "classes.be.slo={ttft_over_isolated: 4}"]
    figures = panels(simulate(write_config(tmp_path), set=bounds), tmp_path, monkeypatch)
    shown = {name: [ax.get_ylabel() for ax in figure.axes if ax.axison] for name, figure in figures.items()}
    assert shown == {
        "ttft": ["ls TTFT, mean (s)", "ls TTFT, p99 (s)", "be TTFT, mean (s)", "be TTFT / isolated TTFT, p99"],
        "throughput": [
            *("ls turnaround, mean (s)", "ls throughput (requests/s)"),
            *("be turnaround, mean (s)", "be throughput (requests/s)"),
        ],
        "slo": [
            *("ls SLO attainment (good / sent)", "ls TTFT bound met (of sent)", "ls TPOT bound met (of sent)"),
            "be SLO attainment (good / sent)",  # below that of ls: the same bar for all
        ],
    }
    for figure in figures.values():
        assert "SLO of ls: TTFT at most 0.05 s, TPOT at most 0.02 s." in caption(figure)
        assert "SLO of be: TTFT at most 4 x isolated." in caption(figure)
        assert "Bands: 95\u00a0%, bootstrap over 2 seeds: about from the lowest seed to the highest." in caption(figure)
    assert "finished requests of the class / makespan" in caption(figures["throughput"])


def test_lines_of_a_figure_are_columns_of_the_summary(results: Results) -> None:
    for column, plot in (("slo_ttft_met", plot_slo), ("ttft_p50_s", plot_ttft)):
        drawn = lines(plot(results, column=column))
        rows = results.summary[(results.summary["policy"] == "qllm") & (results.summary["class"] == "ls")]
        np.testing.assert_allclose(drawn["qllm"][1], rows[column])
    with pytest.raises(ConfigError, match="column is 'ttft_mean'; allowed: ttft_mean_s, "):
        plot_ttft(results, "ttft_mean")
    with pytest.raises(ConfigError, match="class is 'x'; allowed: ls, be"):
        plot_slo(results, cls="x")


@pytest.mark.parametrize(("column", "near"), [("ttft_mean_s", 1e-9), ("ttft_p99_s", 0.1)])
def test_bands_go_from_the_lowest_seed_to_the_highest_and_stay_positive(
    results: Results, column: str, near: float
) -> None:
    ax = plot_ttft(results, column)
    bands = [band for band in ax.collections if isinstance(band, PolyCollection)]
    assert len(bands) == 2
    ls = results.counted[(results.counted["class"] == "ls") & (results.counted["policy"] == "fcfs")]
    runs = ls.groupby(["rate", "seed"])["ttft_s"]
    of_seeds = (runs.mean() if column == "ttft_mean_s" else runs.quantile(0.99)).groupby("rate").agg(["min", "max"])
    corners = bands[0].get_paths()[0].vertices
    for rate, (low, high) in of_seeds.iterrows():
        at = corners[corners[:, 0] == rate][:, 1]
        assert (at.min(), at.max()) == pytest.approx((low, high), rel=near)  # of p99 with values that stand twice
        assert at.min() > 0


def test_lines_that_coincide_are_drawn_side_by_side(tmp_path, monkeypatch) -> None:
    twice = "policies=[fcfs, {name: fcfs, label: again}, {name: qllm, fill_tokens: 0}]"
    same = simulate(write_config(tmp_path), set=[twice, "sweep.rate=[50, 100, 200]"])
    figure = panels(same, tmp_path, monkeypatch)["ttft"]
    fcfs, again, qllm = (line for line in figure.axes[0].get_lines() if line.get_label() in ("fcfs", "again", "qllm"))
    assert list(fcfs.get_ydata()) == list(again.get_ydata())
    places = [line.get_transform().transform([(100, 0.1)])[0] for line in (fcfs, again, qllm)]
    assert np.linalg.norm(places[0] - places[1]) * 72 / figure.dpi == pytest.approx(1.6)
    assert places[2] == pytest.approx(figure.axes[0].transData.transform((100, 0.1)))
    assert "Lines that coincide are drawn side by side." in caption(figure)
    alone = panels(simulate(write_config(tmp_path), set=["policies=[fcfs]"]), tmp_path, monkeypatch)["ttft"]
    assert "coincide" not in caption(alone)


def test_saturated_points_are_hollow(tmp_path, monkeypatch) -> None:
    loaded = simulate(write_config(tmp_path), set=["sweep.rate=[1, 500, 1000]", "requests=120", "limits.max_seqs=1"])
    figures = panels(loaded, tmp_path, monkeypatch)
    rows = loaded.summary[(loaded.summary["class"] == "be") & (loaded.summary["policy"] == "qllm")]
    assert rows["saturated"].tolist() == [False, True, True]
    colour = next(line for line in figures["ttft"].axes[2].get_lines() if line.get_label() == "qllm").get_color()
    hollow = [line for line in figures["ttft"].axes[2].get_lines() if line.get_markerfacecolor() == "white"]
    [mine] = [line for line in hollow if line.get_color() == colour]
    assert list(mine.get_xdata()) == [500, 1000]
    assert list(mine.get_ydata()) == rows["ttft_mean_s"].tolist()[1:]
    assert "Saturated: the queue still grew when arrivals ended" in caption(figures["ttft"])
    assert "saturated" in [text.get_text() for text in figures["ttft"].legends[0].get_texts()]


def two_gpus(folder: Path, rates: str) -> Results:
    config = write_config(folder)
    affine_timings(layers=4, experts=8, top_k=2, hidden=64, source="imported", expert=(4e-4, 1e-6)).save(
        folder / "slow.csv"
    )
    return simulate(config, set=["sweep.timings=[timings.csv, slow.csv]", f"sweep.rate={rates}"])


def test_a_swept_text_has_a_panel_for_each_value_that_names_its_source(tmp_path, monkeypatch) -> None:
    swept = two_gpus(tmp_path, "[5, 50]")
    figure = panels(swept, tmp_path, monkeypatch)["ttft"]
    assert x_axis(swept) == "rate"
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    assert titles == ["timings = timings.csv (modelled)"] * 4 + ["timings = slow.csv (imported)"] * 4
    for ax, name in ((figure.axes[0], "timings.csv"), (figure.axes[4], "slow.csv")):
        rows = swept.summary[(swept.summary["timings"] == name) & (swept.summary["class"] == "ls")]
        assert lines(ax)["fcfs"] == ([5, 50], rows[rows["policy"] == "fcfs"]["ttft_mean_s"].tolist())
    assert figure.axes[0].get_ylim() == figure.axes[4].get_ylim()
    told = swept.config.provenance["timings"]
    assert "affine: modelled; " in told.split(" | ")[0]
    assert "affine: imported; " in told.split(" | ")[1]
    # one axes of one's own has lines by value
    drawn = lines(plot_ttft(swept))
    assert {"fcfs, timings=timings.csv", "qllm, timings=slow.csv"} <= set(drawn)
    assert all(data[0] in ([5, 50], [0, 1]) for data in drawn.values())


def test_a_swept_text_without_rates_has_places_on_the_x_axis_and_no_line_joins_them(tmp_path, monkeypatch) -> None:
    swept = two_gpus(tmp_path, "[50]")
    ax = panels(swept, tmp_path, monkeypatch)["ttft"].axes[0]
    assert x_axis(swept) == "timings"
    assert [label.get_text() for label in ax.get_xticklabels()] == ["timings.csv (modelled)", "slow.csv (imported)"]
    fcfs, qllm = (line for line in ax.get_lines() if line.get_label() in ("fcfs", "qllm"))
    assert fcfs.get_linestyle() == qllm.get_linestyle() == "None"
    assert np.round(fcfs.get_xdata()).tolist() == np.round(qllm.get_xdata()).tolist() == [0, 1]
    assert (fcfs.get_xdata() < qllm.get_xdata()).all()
    rows = swept.summary[(swept.summary["class"] == "ls") & (swept.summary["policy"] == "fcfs")]
    assert list(fcfs.get_ydata()) == rows["ttft_mean_s"].tolist()


def test_a_setting_of_one_policy_may_be_a_text(tmp_path, monkeypatch) -> None:
    swept = simulate(write_config(tmp_path), set=["sweep.policies.1.resume=[prefill, idle]", "seeds=1"])
    titles = [ax.get_title(loc="left") for ax in panels(swept, tmp_path, monkeypatch)["slo"].axes]
    assert titles == ["policies.1.resume = prefill", "policies.1.resume = idle"]


def test_more_combinations_than_fit_are_named_in_the_caption(tmp_path, monkeypatch) -> None:
    sweep = ["sweep.limits.max_seqs=[2, 3, 4]", "sweep.limits.block_size=[8, 16, 32]", "sweep.rate=[5, 50]"]
    swept = simulate(write_config(tmp_path), set=[*sweep, "seeds=1", "requests=10", "policies=[fcfs]"])
    figure = panels(swept, tmp_path, monkeypatch)["slo"]
    assert len(figure.axes) == 8
    assert "1 of 9 combinations of swept values are in the table only." in caption(figure)


TRACES = {
    "all at once": ("0,100,5\n0,200,5\n0,300,5\n", []),
    "one request": ("0,100,5\n", []),
    "one request later": ("3,100,5\n", ["seeds=3"]),
    "none has room": ("0,100,5\n1,90,5\n", ["limits.kv_blocks=1"]),
    "one token each": ("0,100,1\n1,90,1\n", ["classes.ls.slo={tpot: 0.1}"]),
    "warm-up of all": ("0,100,5\n1,90,5\n", ["warmup.seconds=10"]),
    "one rate": ("0,100,5\n1,90,5\n", ["sweep.rate=[3]", "seeds=2"]),
}


@pytest.mark.parametrize(("rows", "changed"), TRACES.values(), ids=TRACES)
def test_runs_without_a_rate_or_with_a_single_point_are_drawn(rows: str, changed: list[str], tmp_path: Path) -> None:
    (tmp_path / "trace.csv").write_text("arrival_s,prompt_tokens,output_tokens\n" + rows)
    text = CONFIG[: CONFIG.index("classes:")] + "classes: {ls: {slo: {ttft: 0.05}}, be: {share: 0.3}}\n"
    text += "arrival: {process: trace, file: trace.csv}\npolicies: [fcfs, qllm]\n"
    path = write_config(tmp_path, text)
    found = simulate(path, set=changed)
    for plot in (plot_ttft, plot_slo, plot_cdf, plot_ablation, plot_time_spent):
        plot(found)
    recorded = record(timeline_runs(load_config(path, changed)))
    save_timeline(recorded, tmp_path / "timeline.png", "x")
    report = write_report([found.save(tmp_path / "out")], tmp_path / "report.html")
    assert report.read_text().count("<img alt") == 3  # it draws what `save_figures` does
    pyplot.close("all")


def test_single_points_have_a_place_for_each_policy(tmp_path, monkeypatch) -> None:
    single = simulate(write_config(tmp_path), set=["sweep.rate=[50]", "seeds=1"])
    ax = panels(single, tmp_path, monkeypatch)["ttft"].axes[0]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["fcfs", "qllm"]
    assert ax.get_xlabel() == "50 requests/s"
    assert [line.get_xdata()[0] for line in ax.get_lines() if line.get_label() in ("fcfs", "qllm")] == list(
        ax.get_xticks()
    )


def test_all_points_lie_within_the_axes(tmp_path, monkeypatch) -> None:
    alike = simulate(write_config(tmp_path), set=["sweep.rate=[50]", "seeds=1"])  # throughputs that hardly differ
    for figure in panels(alike, tmp_path, monkeypatch).values():
        for ax in figure.axes:
            for data in lines(ax).values():
                points = (ax.transData + ax.transAxes.inverted()).transform(np.column_stack(data))
                assert ((points[:, 1] > 0.01) & (points[:, 1] < 0.99)).all()


def test_a_policy_keeps_its_colour_among_several_results(results: Results, tmp_path, monkeypatch) -> None:
    other = simulate(write_config(tmp_path), set=["policies=[{name: qllm, fill_tokens: 0}, hybrid]", "seeds=1"])
    order = ["fcfs", "qllm", "hybrid"]
    colours = []
    for found in (results, other):
        ax = panels(found, tmp_path, monkeypatch, policies=order)["ttft"].axes[0]
        colours.append({line.get_label(): line.get_color() for line in ax.get_lines() if line.get_label() in order})
    assert colours[0]["qllm"] == colours[1]["qllm"]
    assert len({*colours[0].values(), *colours[1].values()}) == 3


def test_the_caption_tells_rejections_and_the_warm_up(tmp_path, monkeypatch) -> None:
    limited = ["limits.kv_blocks=40", "sweep.rate=[5, 50]", "seeds=1"]
    for warmup, told in (
        ("{seconds: 0.5}", "The first 0.5 s of each run"),
        ("{share: 0.1}", "The first 10% of the re"),
    ):
        found = simulate(write_config(tmp_path), set=[*limited, f"warmup={warmup}"])
        text = caption(panels(found, tmp_path, monkeypatch)["slo"])
        rejected = (found.counted["status"] == "rejected").sum()
        assert f"{rejected} of {len(found.counted)} requests were rejected and have no times." in text
        assert told in text


def test_a_swept_bound_is_drawn_nowhere_and_told_with_its_values(tmp_path, monkeypatch) -> None:
    swept = simulate(write_config(tmp_path), set=["sweep.classes.ls.slo.ttft=[0.02, 0.05]", "seeds=1"])
    figures = panels(swept, tmp_path, monkeypatch)
    assert "SLO of ls: TTFT at most 0.02 or 0.05 s." in caption(figures["slo"])
    assert not any(label.startswith("SLO") for label in lines(figures["ttft"].axes[0]))
    swept = simulate(write_config(tmp_path), set=["sweep.classes.ls.slo=[{ttft: 0.05}, {tpot: 0.01}]", "seeds=1"])
    figure = panels(swept, tmp_path, monkeypatch)["slo"]
    assert "SLO of ls: TTFT at most 0.05 s, TPOT at most 0.01 s." in caption(figure)
    assert [len(ax.texts) for ax in figure.axes] == [0, 0, 1, 0, 1, 0]  # a bound that does not hold has no values


@pytest.mark.parametrize("low", [1e-6, 0.0371, 1.0, 812.0])
@pytest.mark.parametrize("factor", [1.0, 1.01, 2.0, 9.0, 60.0, 800.0, 2e4, 3e7])
def test_numbers_on_logarithmic_axes_do_not_collide(low: float, factor: float) -> None:
    figure = new_figure(4.2, 3.1)
    ax = figure.subplots()
    ax.plot([low, low * factor], [low, low * factor])
    log_axis(ax.xaxis)
    log_axis(ax.yaxis)
    figure.draw_without_rendering()
    for axis, side in ((ax.xaxis, 0), (ax.yaxis, 1)):
        boxes = [label.get_window_extent() for label in axis.get_majorticklabels() if label.get_text()]
        first, last = axis.get_view_interval()
        shown = [box for box, at in zip(boxes, axis.get_majorticklocs(), strict=True) if first <= at <= last]
        assert shown
        spans = sorted((box.x0, box.x1) if side == 0 else (box.y0, box.y1) for box in shown)
        assert all(end < start for (_, end), (start, _) in pairwise(spans))
