"""Expert popularity tables: shares sum to 1, other layers take the nearest one, errors name file and row."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from qllm.traces.step_times.popularity import PopularityError, bundled_popularity, describe_popularity, load_popularity

ROOT = Path(__file__).resolve().parents[2]
COUNTS = ROOT.parent / "shared" / "data" / "routing" / "olmoe_mixtral_expert_counts.csv"
GOOD = ["# model: x", "layer,expert,share", "0,0,0.25", "0,1,0.75", "6,0,0.5", "6,1,0.5"]


@pytest.mark.parametrize(("name", "experts", "layers"), [("mixtral-8x7b", 8, 32), ("olmoe-1b-7b", 64, 16)])
def test_bundled_tables_give_shares_for_every_layer(name, experts, layers):
    shares = load_popularity(name, experts, layers)
    assert shares.shape == (layers, experts)
    assert shares.sum(axis=1) == pytest.approx(np.ones(layers))
    assert (shares > 0).all()


def test_mixtral_is_near_uniform_and_olmoe_is_skewed():
    assert load_popularity("mixtral-8x7b", 8, 32).max() * 8 < 1.25
    assert load_popularity("olmoe-1b-7b", 64, 16).max() * 64 > 2


def test_other_layers_take_the_nearest_layer_and_it_says_so(tmp_path):
    (tmp_path / "t.csv").write_text("\n".join(GOOD))
    assert load_popularity(tmp_path / "t.csv", 2, 9)[:, 0].tolist() == [0.25] * 4 + [0.5] * 5
    told = describe_popularity(tmp_path / "t.csv", 9)
    assert told["layers_held"] == [0, 6]
    assert told["layer_taken"] == [0, 0, 0, 0, 6, 6, 6, 6, 6]
    assert told["skew"] == {0: 1.5, 6: 1.0}


def test_uniform_needs_no_table():
    assert (load_popularity("uniform", 4, 3) == 0.25).all()


@pytest.mark.parametrize(
    ("row", "text", "message"),
    [
        (2, "0,0,-0.25", "t.csv, row 3: needs a layer"),
        (3, "0,one,0.75", "t.csv, row 4: needs a layer"),
        (3, "0,1", "t.csv, row 4: needs a layer"),
        (3, "0,1,nan", "t.csv, row 4: needs a layer"),
        (3, "0,0,0.75", "t.csv, row 4: layer 0, expert 0 stands twice"),
        (3, "0,2,0.75", "layer 0 does not number its experts from 0 to 1"),
        (3, "0,1,0.5", "the shares of layer 0 sum to 0.75"),
        (3, "6,2,0.75", "every layer must hold the same number of experts"),
        (1, "a,b,c", "row 2: the columns must be layer,expert,share"),
        (0, "# a: b: c", "the header is not YAML"),
    ],
)
def test_a_broken_table_is_named(tmp_path, row, text, message):
    lines = [*GOOD]
    lines[row] = text
    (tmp_path / "t.csv").write_text("\n".join(lines))
    with pytest.raises(PopularityError, match=message):
        load_popularity(tmp_path / "t.csv", 2, 9)


def test_another_number_of_experts_and_a_missing_file_are_named():
    with pytest.raises(PopularityError, match="the table is for 8 experts a layer, the model has 128"):
        load_popularity("mixtral-8x7b", 128, 48)
    with pytest.raises(PopularityError, match="bundled: uniform, mixtral-8x7b, olmoe-1b-7b"):
        load_popularity("qwen", 128, 48)


@pytest.mark.skipif(not COUNTS.is_file(), reason="the routing counts are not here")
def test_the_shipped_tables_are_what_the_counts_give():
    import sys

    sys.path.insert(0, str(ROOT / "tools"))
    from derive_popularity import OUT, derive

    counts = pd.read_csv(COUNTS)
    for name in bundled_popularity():
        assert (OUT / f"{name}.csv").read_text() == derive(counts, name)
