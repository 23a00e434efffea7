"""Expert popularity: the share of a layer's token assignments that goes to each expert.

A table is a CSV file (layer, expert, share) below `# key: value` lines of provenance. It holds a few layers; every
other takes the shares of the nearest one held. They are not averaged: expert 3 of one layer has nothing to do with
expert 3 of another, and an average would be too even.
"""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np

from qllm.traces.comment_header import HeaderError, read_header

_FOLDER = Path(__file__).parents[1] / "data" / "popularity"
COLUMNS = ["layer", "expert", "share"]


class PopularityError(ValueError):
    """A popularity table that cannot be used; the message names file and row, and what is allowed."""


def bundled_popularity() -> list[str]:
    """Names of the tables that ship with the package."""
    return sorted(path.stem for path in _FOLDER.glob("*.csv"))


def load_popularity(name_or_path: str | Path, experts: int, layers: int) -> np.ndarray:
    """Read each expert's share of the tokens: float64[layers, experts], each row sums to 1.

    Args:
        name_or_path: A bundled name ("uniform" needs no table) or a file.
        experts: Experts in a layer of the model.
        layers: Layers of the model.

    Raises:
        PopularityError: The file is missing or broken, or holds another number of experts.
    """
    if str(name_or_path) == "uniform":
        return np.full((layers, experts), 1 / experts)
    path, _, table = _read(name_or_path)
    held = len(next(iter(table.values())))
    if held != experts:
        raise PopularityError(f"{path}: the table is for {held} experts a layer, the model has {experts}")
    return np.array([table[nearest] for nearest in _nearest(table, layers)])


def describe_popularity(name_or_path: str | Path, layers: int) -> dict[str, Any]:
    """Describe a popularity table.

    Args:
        name_or_path: A bundled name or a file.
        layers: Layers of the model.

    Returns:
        The table's header; `layers_held`: the layers that it holds; `layer_taken`: for each layer of the model, the one
        whose shares it takes; `skew`: for each layer of the table, its largest share over the mean share.

    Raises:
        PopularityError: The file is missing or broken.
    """
    _, header, table = _read(name_or_path)
    skew = {layer: float(shares.max() * len(shares)) for layer, shares in table.items()}
    return {**header, "layers_held": sorted(table), "layer_taken": _nearest(table, layers), "skew": skew}


def _nearest(table: dict[int, np.ndarray], layers: int) -> list[int]:
    return [min(table, key=lambda held: (abs(held - layer), held)) for layer in range(layers)]


def _read(name_or_path: str | Path) -> tuple[Path, dict[str, Any], dict[int, np.ndarray]]:
    bundled = bundled_popularity()
    path = _FOLDER / f"{name_or_path}.csv" if str(name_or_path) in bundled else Path(name_or_path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        names = ", ".join(["uniform", *bundled])
        raise PopularityError(f"{path}: no readable file, and no bundled popularity table; bundled: {names}") from None
    try:
        header, head = read_header(lines)
    except HeaderError as error:
        raise PopularityError(f"{path}: {error}") from None
    if head >= len(lines) or lines[head].split(",") != COLUMNS:
        raise PopularityError(f"{path}, row {head + 1}: the columns must be {','.join(COLUMNS)}")
    return path, header, _layers(path, lines, head + 1)


def _layers(path: Path, lines: list[str], first: int) -> dict[int, np.ndarray]:
    shares: dict[int, dict[int, float]] = {}
    for number, cells in enumerate(csv.reader(lines[first:]), start=first + 1):
        try:
            layer, expert, share = int(cells[0]), int(cells[1]), float(cells[2])
            if len(cells) != 3 or layer < 0 or expert < 0 or not (math.isfinite(share) and share >= 0):
                raise ValueError
        except (ValueError, IndexError):
            raise PopularityError(
                f"{path}, row {number}: needs a layer and an expert of at least 0 and a share of at least 0, "
                f"got {','.join(cells)!r}"
            ) from None
        if expert in shares.setdefault(layer, {}):
            raise PopularityError(f"{path}, row {number}: layer {layer}, expert {expert} stands twice")
        shares[layer][expert] = share
    sizes = {len(row) for row in shares.values()}
    if len(sizes) != 1:
        raise PopularityError(
            f"{path}: every layer must hold the same number of experts, got {sorted(sizes) or 'none'}"
        )
    table = {}
    for layer, row in shares.items():
        values = np.array([row.get(expert, np.nan) for expert in range(len(row))])
        if np.isnan(values).any():
            raise PopularityError(f"{path}: layer {layer} does not number its experts from 0 to {len(row) - 1}")
        if abs(values.sum() - 1) > 1e-3:
            raise PopularityError(f"{path}: the shares of layer {layer} sum to {values.sum():.4f}, not to 1")
        table[layer] = values / values.sum()
    return table
