"""All that a pass's kernels read from the host: numbers in one int64 buffer, brought to the device in one copy.

The layout follows from the room alone. So a graph reads the same addresses in each replay, and new contents reach it by
one copy into the same buffer. Block tables come last, one sequence's after another: only what is used is copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

SPLIT = 256  #: keys of a part of a decode row's keys
TILE_ROWS = 64  #: query rows of a tile of a prompt
STEP_KEYS = 128  #: most keys in a step of attention; steps begin at multiples of their size
RECORDED_ROWS = 512  #: most rows of prompts in a pass that is recorded


@dataclass(frozen=True)
class DecodeWork:
    """Decode rows and the parts of their keys, int64 on the device; `parts` is loaded there and nowhere else."""

    blocks: torch.Tensor  #: block tables of all sequences, one after another
    first: torch.Tensor  #: [D] where each row's block table begins in `blocks`
    length: torch.Tensor  #: [D] keys that the row sees, itself included; 0: a padding row
    first_part: torch.Tensor  #: [D] parts of the rows before; padding rows hold the total
    parts: torch.Tensor  #: [1] the total


@dataclass(frozen=True)
class TileWork:
    """Tiles of rows, each of one sequence, int64 on the device."""

    blocks: torch.Tensor  #: block tables of all sequences, one after another
    row: torch.Tensor  #: [N] first packed row of the tile
    rows: torch.Tensor  #: [N] how many rows, at most TILE_ROWS; 0: a padding tile
    position: torch.Tensor  #: [N] of the first row in its sequence
    first: torch.Tensor  #: [N] where its sequence's block table begins in `blocks`


class Tables(NamedTuple):
    """Where KV lies, int64 on the device: in layers that keep all tokens, or in those that keep a window."""

    slots: torch.Tensor  #: [rows] where each row's KV goes; negative: nowhere
    first: torch.Tensor  #: [D] where each decode row's block table begins in `blocks`
    tile_first: torch.Tensor  #: [N] the same of each tile's sequence


class PromptPart(NamedTuple):
    """Rows of one prefill chunk between two cuts."""

    group: int  #: of rows attended between two preemption points
    first: int  #: packed rows ...
    last: int  #: ... up to this one
    position: int  #: of the first row in its sequence
    table: int  #: where its sequence's block table begins
    chunk_row: int  #: packed rows of its whole chunk ...
    chunk_last: int  #: ... up to this one
    tiles: tuple[int, int]  #: of its rows, the first and the one after the last
    ring_table: int = 0  #: where its sequence's block table begins for layers that keep a window


class Room(NamedTuple):
    """For how much a pass's inputs have room."""

    rows: int  #: tokens
    decode: int  #: of these, rows that decode; they come first
    tiles: int  #: of query rows of prompts
    samples: int  #: rows that give logits
    blocks: int  #: KV blocks in all block tables
    rings: bool = False  #: whether there are layers that keep a window


class Fields:
    """The parts of a buffer, numpy's on the host or PyTorch's on the device, by name. All hold int64.

    Attributes:
        parts: `[1]`, parts of keys that the decode rows attend over.
        ids: `[rows]`, token ids.
        positions: `[rows]`, of the tokens in their sequences.
        slots: `[rows]`, where each row's KV goes; negative for padding.
        samples: `[samples]`, rows that give logits.
        first, length, first_part: `[decode]`, see `DecodeWork`.
        tile_row, tile_rows, tile_position, tile_first: `[tiles]`, see `TileWork`.
        ring_slots, ring_first, ring_tile_first: as `slots`, `first`, `tile_first`, in layers that keep a window.
        blocks: `[blocks]`, block tables. One of a ring lacks what no row sees, so that it may begin before them all.
    """

    def __init__(self, room: Room, buffer: Any):
        self.buffer = buffer
        self._at = 0
        self.parts = self._take(1)
        self.ids, self.positions, self.slots = (self._take(room.rows) for _ in range(3))
        self.samples = self._take(room.samples)
        self.first, self.length, self.first_part = (self._take(room.decode) for _ in range(3))
        self.tile_row, self.tile_rows, self.tile_position, self.tile_first = (self._take(room.tiles) for _ in range(4))
        sizes = (room.rows, room.decode, room.tiles) if room.rings else (0, 0, 0)
        self.ring_slots, self.ring_first, self.ring_tile_first = map(self._take, sizes)
        self.blocks = buffer[self._at :]

    def _take(self, n: int) -> Any:
        self._at += n
        return self.buffer[self._at - n : self._at]


def size_of(room: Room) -> int:
    """Numbers in a buffer with that room."""
    of_rings = room.rows + room.decode + room.tiles if room.rings else 0
    return 1 + 3 * room.rows + room.samples + 3 * room.decode + 4 * room.tiles + of_rings + room.blocks


class HostInputs(Fields):
    """A pass's inputs on the host, in pinned memory where the device is a GPU. Padding until they are filled."""

    def __init__(self, room: Room, device: torch.device):
        self.room = room
        self.tensor = torch.zeros(size_of(room), dtype=torch.int64, pin_memory=device.type == "cuda")
        super().__init__(room, self.tensor.numpy())
        self.used = len(self.buffer) - room.blocks  #: numbers that the device needs; block tables add to them
        self.slots[:] = -1
        self.ring_slots[:] = -1

    def add_blocks(self, blocks: list[int]) -> int:
        """Append a block table; where it begins."""
        first = self.used - (len(self.buffer) - self.room.blocks)
        self.blocks[first : first + len(blocks)] = blocks
        self.used += len(blocks)
        return first


class Scratch:
    """Memory for decode attention over up to `parts` parts of keys, for all layers, and all passes that share it."""

    def __init__(self, parts: int):
        self.parts = parts
        self._memory = torch.empty(0)

    def take(self, heads: int, value_width: int, device: torch.device) -> torch.Tensor:
        """Memory for a layer with these heads. It grows at a first use alone, before anything is recorded."""
        from qllm.executor.gpu.decode_attention import scratch_for

        need = scratch_for(self.parts, heads, value_width, "meta").numel()
        if len(self._memory) < need:
            self._memory = scratch_for(self.parts, heads, value_width, device)
        return self._memory[:need]


class DeviceInputs(Fields):
    """A pass's inputs on the device; anything until they are loaded."""

    def __init__(self, room: Room, device: torch.device):
        super().__init__(room, torch.empty(size_of(room), dtype=torch.int64, device=device))
        self.room = room
        self.scratch = Scratch(0)  #: of decode attention

    def load(self, host: HostInputs) -> None:
        """Take over what the host filled in: one copy, which does not wait."""
        self.buffer[: host.used].copy_(host.tensor[: host.used], non_blocking=True)
        self.scratch.parts = max(self.scratch.parts, int(host.parts[0]))

    def tables(self, *, in_rings: bool) -> Tables:
        """Where the KV of layers lies that keep all tokens, or of those that keep a window."""
        if in_rings:
            return Tables(self.ring_slots, self.ring_first, self.ring_tile_first)
        return Tables(self.slots, self.first, self.tile_first)

    def decode_work(self, tables: Tables) -> DecodeWork:
        """The rows that decode."""
        return DecodeWork(self.blocks, tables.first, self.length, self.first_part, self.parts)

    def tile_work(self, tables: Tables, first: int, last: int) -> TileWork:
        """Tiles `first` to `last`."""
        at = slice(first, last)
        rows = (self.tile_row[at], self.tile_rows[at], self.tile_position[at])
        return TileWork(self.blocks, *rows, tables.tile_first[at])


def fill_parts(host: HostInputs, part_keys: int) -> None:
    """Set `first_part` and `parts` by `length`: parts of `part_keys` keys, row after row."""
    each = -(-host.length // part_keys)
    ends = np.cumsum(each)
    host.first_part[:] = ends - each
    host.parts[0] = ends[-1] if len(ends) else 0
