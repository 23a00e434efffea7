"""docs/models.md says what tools/list_model_families.py would print for the installed transformers."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import transformers

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import list_model_families as page  # noqa: E402
from released_checkpoints import OTHERS, TWENTY  # noqa: E402

from qllm.executor.errors import UnsupportedModelError  # noqa: E402
from qllm.executor.model.checks import check_config  # noqa: E402
from qllm.executor.model.info import model_facts  # noqa: E402
from qllm.executor.model.loading import prepare_model  # noqa: E402
from qllm.executor.testing import families, tiny_config, tiny_model  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
TEXT = page.PAGE.read_text(encoding="utf-8")
WRITTEN_FOR = re.search(r"transformers ([\d.]+): \d+ of \d+", TEXT)
of_this_version = pytest.mark.skipif(
    WRITTEN_FOR is None or WRITTEN_FOR[1] != transformers.__version__,
    reason="the page was written for another version of transformers",
)
#: of every kind: what sees, latent attention, a state space, convolutions
COMPUTED = (
    "google/gemma-4-26B-A4B",
    "zai-org/GLM-4.7-Flash",
    "ibm-granite/granite-4.0-h-small",
    "LiquidAI/LFM2-8B-A1B",
)


def rows(table: str) -> list[tuple[str, ...]]:
    """The cells of one of the page's tables, without its head."""
    found = re.search(rf"<!-- models: {table} -->\n(.*?)<!-- /models -->", TEXT, re.DOTALL)
    assert found is not None
    lines = [line for line in found[1].splitlines() if line.startswith("| ")]
    return [tuple(line.strip("| ").split(" | ")) for line in lines[1:]]


def of_family(name: str) -> tuple[str, ...]:
    return next(row for row in rows("types") if row[0] == f"`{name}`")


@of_this_version
def test_every_model_type_is_listed_with_what_it_keeps() -> None:
    assert [(row[0], row[1]) for row in rows("types")] == [
        (f"`{name}`", page.keeps(page.config_to_show(name))) for name in families()
    ]
    served = sum(row[2].startswith("yes") for row in rows("types"))
    assert f": {served} of {len(rows('types'))} model types are served." in TEXT


@of_this_version
def test_what_a_configuration_alone_rules_out_is_refused_on_the_page() -> None:
    found = {}
    for name in families():
        try:
            check_config(tiny_config(name))
        except UnsupportedModelError as error:
            found[name] = f"no: {page.in_plain_words(str(error))}"
        except Exception:  # a class of configurations may ask for anything
            continue
    assert found
    assert {name: of_family(name)[2] for name in found} == found


@of_this_version
@pytest.mark.slow
@pytest.mark.parametrize("name", families())
def test_a_model_type_is_served_or_refused_as_the_page_says(name: str) -> None:
    assert of_family(name) == page.type_row(name)


@pytest.mark.parametrize("name", ["qwen3_next", "deepseek_v3", "gpt_oss", "lfm2_moe", "bailing_hybrid", "gemma4_text"])
def test_memory_computed_without_weights_is_that_of_the_engine(name: str) -> None:
    model = tiny_model(name)
    facts = model_facts(prepare_model(model.bfloat16()))
    computed = page.memory_of(tiny_config(name))
    assert (computed.kv, computed.state) == (facts["kv_bytes_per_token"], facts["state_bytes"])
    assert computed.in_ring == facts["window_bytes_per_token"]
    assert computed.ring == (-(-(facts["window"] + 511) // 16) * 16 if facts["window"] else 0)
    assert computed.weights == page.weights_of(model)


@of_this_version
@pytest.mark.parametrize("name", COMPUTED)
def test_a_checkpoint_takes_what_the_page_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    row = next(row for row in rows("checkpoints") if row[0].split(" ")[0] == name)
    monkeypatch.setattr(page, "verdict", lambda _: "")
    assert page.row_of(next(c for c in TWENTY if c.name == name)) == row
    assert row[2] == "yes"


def test_checkpoints_have_the_size_of_their_name_and_the_verdict_of_their_type() -> None:
    assert [row[0].split(" ")[0] for row in rows("checkpoints")] == [checkpoint.name for checkpoint in TWENTY]
    assert [row[0] for row in rows("quantised")] == [checkpoint.name for checkpoint in OTHERS]
    for name, family, served, fits, weights, *_ in rows("checkpoints"):
        assert served.startswith("yes") == of_family(family.strip("`"))[2].startswith("yes"), name
        assert fits.startswith("yes") <= (served == "yes" and float(weights.split()[0]) < 80), name
        told = re.search(r"-(\d+)[Bb]-", name)
        if told is not None and "8x7B" not in name:
            assert abs(float(weights.split()[0]) / 2 / float(told[1]) - 1) < 0.07, name
