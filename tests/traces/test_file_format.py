"""Reading and writing timing traces: what is wrong in a file is named with its file, row or key."""

from dataclasses import replace
from pathlib import Path

import pytest

from qllm.traces.step_times.file_format import Point, TimingError
from qllm.traces.step_times.testing import affine_timings
from qllm.traces.step_times.timings import Timings


@pytest.fixture
def lines(tmp_path: Path) -> list[str]:
    """The lines of a valid file."""
    path = tmp_path / "good.csv"
    affine_timings().save(path)
    return path.read_text().splitlines()


def load(tmp_path: Path, lines: list[str]) -> Timings:
    path = tmp_path / "trace.csv"
    path.write_text("\n".join(lines) + "\n")
    return Timings.load(path)


def row_of(lines: list[str], start: str) -> int:
    return next(at for at, line in enumerate(lines) if line.startswith(start))


def test_a_saved_file_loads_equal(tmp_path):
    timings = affine_timings(name="x", versions={"torch": "2.13"}, conditions={"power_w": 400}, repeats=7)
    points = [point._replace(spread_s=1e-6, repeats=5, source="measured") for point in timings.points]
    timings = replace(timings, points=tuple(points))
    timings.save(tmp_path / "x.csv")
    again = Timings.load(tmp_path / "x.csv")
    assert (again.name, again.repeats, again.versions, again.conditions) == (
        "x",
        7,
        {"torch": "2.13"},
        {"power_w": 400},
    )
    assert set(again.points) == {point._replace(seconds=float(f"{point.seconds:.6g}")) for point in points}


@pytest.mark.parametrize(
    ("column", "text", "message"),
    [
        (3, "-1e-6", "seconds must be a number of at least 0"),
        (3, "nan", "seconds must be a number of at least 0"),
        (3, "inf", "seconds must be a number of at least 0"),
        (3, "", "seconds must be a number, got '' .missing."),
        (3, "fast", "seconds must be a number"),
        (1, "0", "tokens must be at least 1"),
        (1, "1.5", "tokens must be a whole number"),
        (2, "7", "takes no context"),
        (4, "-1", "spread_s must be empty or at least 0"),
        (5, "0", "repeats must be empty or at least 1"),
        (0, "dense_mid", "unknown step 'dense_mid'; allowed: dense_pre"),
        (6, "guessed", "unknown source 'guessed'; allowed: measured"),
    ],
)
def test_a_bad_cell_is_named_with_file_and_row(tmp_path, lines, column, text, message):
    at = row_of(lines, "dense_pre,")
    cells = lines[at].split(",")
    cells[column] = text
    lines[at] = ",".join(cells)
    with pytest.raises(TimingError, match=rf"trace.csv, row {at + 1}: .*{message}"):
        load(tmp_path, lines)


def test_a_hole_in_a_grid_is_named(tmp_path, lines):
    at = row_of(lines, "attention_decode,65536,131072")
    del lines[at]
    count = row_of(lines, "# points")
    lines[count] = "# points: 15"
    with pytest.raises(TimingError, match=r"trace.csv: .*'attention_decode' has a hole: .* 65536, context 131072"):
        load(tmp_path, lines)


def test_a_grid_point_without_context_and_a_point_twice_are_named(tmp_path, lines):
    at = row_of(lines, "attention_prefill,1,0")
    broken = [*lines]
    broken[at] = broken[at].replace(",1,0,", ",1,,", 1)
    with pytest.raises(TimingError, match=rf"row {at + 1}: step 'attention_prefill' needs a context"):
        load(tmp_path, broken)
    lines[at] = lines[at + 1]
    with pytest.raises(TimingError, match=rf"row {at + 2}: .* stands twice"):
        load(tmp_path, lines)


@pytest.mark.parametrize("cut", [1, 5])
def test_a_file_cut_between_rows_is_called_truncated(tmp_path, lines, cut):
    with pytest.raises(TimingError, match="truncated or edited: the header announces 16 points"):
        load(tmp_path, lines[:-cut])


def test_a_file_cut_within_a_row_names_the_row(tmp_path, lines):
    lines[-1] = lines[-1][: len(lines[-1]) // 3]
    with pytest.raises(TimingError, match=rf"row {len(lines)}: .*truncated"):
        load(tmp_path, lines)


def test_a_file_cut_in_the_header_is_called_truncated(tmp_path, lines):
    with pytest.raises(TimingError, match="truncated: no table"):
        load(tmp_path, lines[: row_of(lines, "step,")])


@pytest.mark.parametrize("key", ["device", "layers", "launch_s", "expert_mode", "points", "format", "licence"])
def test_a_missing_header_key_is_named(tmp_path, lines, key):
    del lines[row_of(lines, f"# {key}:")]
    with pytest.raises(TimingError, match=rf"trace.csv: header key '{key}'"):
        load(tmp_path, lines)


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("source", "guessed", "allowed: measured, imported, modelled"),
        ("expert_mode", "both", "allowed: fused, separate"),
        ("layers", "2.5", "must be a whole number"),
        ("layers", "0", "must be above 0"),
        ("host_s", "-1", "must be at least 0"),
        ("host_s", "fast", "must be a number"),
        ("memory_bytes", ".nan", "must be a whole number"),
        ("format", "other 1", "allowed: 'qllm-timings 1'"),
        ("top_k", "999", r"must be at most experts \(4\), got 999"),
        ("layers", "100000000", "'layers' x 'experts' must be at most 16777216"),
        ("layers", "1" + 400 * "0", "must be a whole number"),
        ("device", "[A100]", r"must be a text, got \['A100'\]"),
    ],
)
def test_an_impossible_header_value_is_named(tmp_path, lines, key, text, message):
    lines[row_of(lines, f"# {key}:")] = f"# {key}: {text}"
    with pytest.raises(TimingError, match=rf"header key.*'{key}'.*{message}" if "' x '" not in message else message):
        load(tmp_path, lines)


def test_unknown_header_keys_and_broken_yaml_are_named(tmp_path, lines):
    with pytest.raises(TimingError, match="unknown header key 'lauch_s'; allowed: name"):
        load(tmp_path, ["# lauch_s: 1", *lines])
    with pytest.raises(TimingError, match="row 1: the header is not YAML"):
        load(tmp_path, ["# a: b: c", *lines])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("# layers: 3", "row 12: .*key 'layers' stands twice"),
        ("# conditions: {clock: 1, clock: 2}", "row 1: .*key 'clock' stands twice"),
        ("# conditions: &a {power: *a}", "recursive"),
        ("# date: 2026-02-31", "day is out of range|must be in range"),
        ("# 7: x", "unknown header key 7"),
        ("# engine_loop_s: 0.5", r"'engine_loop_s' must be at most host_s \(0\), got 0.5"),
        ("# least_s: {head: [1]}", r"'least_s' must give two numbers .* got head: \[1\]"),
        ("# least_s: {tail: [1, 2]}", r"'least_s' must give two numbers .* got tail"),
        ("# least_s: {head: 5}", "'least_s' must give two numbers .* got head: 5"),
        ("# max_context: 0", "'max_context' must be above 0"),
    ],
)
def test_keys_that_stand_twice_or_say_the_impossible_are_named(tmp_path, lines, line, message):
    kept = [old for old in lines if line.startswith("# layers") or not old.startswith(line.split(":")[0] + ":")]
    with pytest.raises(TimingError, match=rf"trace.csv.*({message})"):
        load(tmp_path, [line, *kept])


@pytest.mark.parametrize(("column", "text"), [(1, 30 * "9"), (2, 30 * "9")])
def test_sizes_beyond_reason_are_refused(tmp_path, lines, column, text):
    at = row_of(lines, "attention_decode,")
    cells = lines[at].split(",")
    cells[column] = text
    lines[at] = ",".join(cells)
    with pytest.raises(TimingError, match=rf"row {at + 1}: .* must be at most 1099511627776"):
        load(tmp_path, lines)


def test_a_table_that_is_no_csv_is_named(tmp_path, lines):
    with pytest.raises(TimingError, match=r"trace.csv: the table is no CSV: field larger than field limit"):
        load(tmp_path, [*lines, 200_000 * "x"])


def test_other_columns_and_other_files_are_refused(tmp_path, lines):
    lines[row_of(lines, "step,")] = "step,tokens,seconds"
    with pytest.raises(TimingError, match="the columns must be step,tokens,context"):
        load(tmp_path, lines)
    with pytest.raises(TimingError, match="no header"):
        load(tmp_path, ["m,n,k,latency", "1,2,3,4"])
    with pytest.raises(TimingError, match=r"nowhere.csv: no such file, and no bundled timing trace; bundled: a100-"):
        Timings.load(tmp_path / "nowhere.csv")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00PAR1")
    with pytest.raises(TimingError, match=r"binary.csv: cannot be read"):
        Timings.load(tmp_path / "binary.csv")


def test_points_made_in_a_program_are_checked_too():
    good = affine_timings()
    with pytest.raises(TimingError, match=r"timings 'affine', row 1: seconds must be"):
        replace(good, points=(Point("head", 1, None, -1.0), *good.points[1:]))
    with pytest.raises(TimingError, match="step 'head' has 0 points"):
        replace(good, points=tuple(point for point in good.points if point.step != "head"))
    with pytest.raises(TimingError, match="header key 'top_k' must be above 0"):
        affine_timings(top_k=0)
