"""The Runner: starts passes over one model and one KV cache."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from importlib.util import find_spec

import torch
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from qllm.executor.latent.hook import keeps_latents
from qllm.executor.model.attention_plan import place_for_kernels
from qllm.executor.model.kv_cache import PagedKVCache, Rings
from qllm.executor.model.packed_batch import Batch, Sequence
from qllm.executor.model.passes import RunAhead, RunningPass
from qllm.executor.model.split import Split, Splitter, whole
from qllm.executor.recurrent.states import keeps_state, new_state
from qllm.executor.unpacked.caches import unpacked_layers


class Runner:
    """Starts passes over one prepared model and a cache of `kv_blocks` blocks. All passes belong to one thread.

    Args:
        model: prepared.
        kv_blocks: of the cache.
        block_size: tokens in a block.
        splitter: how passes are cut.
        kernels: whether those of `qllm.executor.gpu` compute attention and experts; by default on a GPU.
        rings: how layers with a sliding window keep the window alone (`window_of`); None: they keep all tokens.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        kv_blocks: int,
        block_size: int = 16,
        splitter: Splitter = whole,
        *,
        kernels: bool | None = None,
        rings: Rings | None = None,
    ):
        self.model = model
        self.device = model.device
        self.kernels = has_kernels(self.device) if kernels is None else kernels
        self.cache = PagedKVCache(kv_blocks, block_size, self.device, rings)
        self.splitter = splitter
        self.n_experts = 0  #: of a layer, once the cache is made
        self.windows = declared_windows(model.config)
        self.recurrent = keeps_state(model.config)  #: whether sequences have a state beside their KV
        self.unpacked = bool(unpacked_layers(model.config))  #: whether attention is called for each sequence alone
        self.latent = keeps_latents(model)  #: whether layers keep latents of keys and values
        self.max_positions = max_positions(model.config)
        self._run_ahead = RunAhead(self.device)
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    def make_cache(self) -> None:
        """Make the KV of all layers, in a pass over one token. Raises what PyTorch raises where memory ends."""
        with torch.inference_mode():
            running = self.begin([(Sequence([0], [0], ring=self.cache.ring_of(1)), 1)])
            run_to_end(running)
        self.n_experts = max(map(len, running.routing), default=0)

    def begin(
        self,
        entries: Iterable[tuple[Sequence, int]],
        split: Split | None = None,
        partners: Iterable[RunningPass] = (),
        then: Callable[[RunningPass, torch.Tensor], None] | None = None,
        queues: bool = False,
    ) -> RunningPass:
        """A pass over the next n tokens of each sequence; nothing runs before its first `advance()`. Raises PassError.

        Args:
            entries: (sequence, new tokens) of each.
            split: replaces the splitter's.
            partners: suspended passes, looked at anew at each expert, whose waiting rows may be merged.
            then: called with the logits, as the pass's last part, which may stop at points too.
            queues: whether `RunningPass.queues` is asked for; with partners it is.
        """
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # of this thread: where Triton launches
        batch = Batch(entries, self.cache, max_positions=self.max_positions)
        split = self.splitter(batch) if split is None else split
        if self.recurrent:
            for entry in batch.entries:
                if not entry.start:
                    entry.seq.recurrent = new_state(self.model)
        queues = queues or partners != ()
        forward = self.place(batch, split, queues=queues)
        return RunningPass(batch, split, forward, self._run_ahead, self.windows, partners, then, queues)

    def place(self, batch: Batch, split: Split, *, queues: bool) -> Callable[[RunningPass], torch.Tensor]:
        """Bring a batch to the device; what computes it. `queues`: whether somebody asks for `RunningPass.queues`."""
        if self.kernels:
            place_for_kernels(batch, split.query_blocks)
        else:
            batch.place()
        return self.forward

    def forward(self, running: RunningPass) -> torch.Tensor:
        """Logits `[len(batch.sampled), vocab]`; where the model can, only these rows go through the LM head."""
        batch = running.batch
        keep = {"logits_to_keep": batch.sample_rows} if self._keeps_logits else {}
        out = self.model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **keep)
        logits: torch.Tensor = out.logits[0]
        return logits if keep else logits.index_select(0, batch.sample_rows)


def has_kernels(device: torch.device) -> bool:
    """Whether Triton's kernels run on `device`."""
    return device.type == "cuda" and find_spec("triton") is not None


def run_to_end(running: RunningPass) -> torch.Tensor:
    """Advance a pass through all its points; its logits `[len(sampled), vocab]`."""
    while running.advance() is not None:
        pass
    return running.logits


def declared_windows(config: PreTrainedConfig) -> list[int | None]:
    """Sliding window of each attention layer by configuration (tokens, the token itself included), None without."""
    layers = DynamicCache(config=config).layers
    return [getattr(layer, "sliding_window", None) for layer in layers if isinstance(layer, DynamicLayer)]


def window_of(model: PreTrainedModel) -> int | None:
    """The largest sliding window (tokens) of a model in which some layers have one and others attend to all tokens.

    Its windows may be kept in rings. None for any other model, and where attention is not packed or keeps latents.
    """
    windows = declared_windows(model.config)
    found = [window for window in windows if window is not None]
    plain = not unpacked_layers(model.config) and not keeps_latents(model)
    return max(found) if plain and found and len(found) < len(windows) else None


def max_positions(config: PreTrainedConfig) -> int | None:
    """Longest sequence (tokens) that can be served, None where the configuration does not say."""
    # "dynamic" and "longrope" embeddings change with the longest sequence in the batch: beyond their original length a
    # sequence's output would depend on its neighbours, so they are served up to that length.
    text = config.get_text_config(decoder=True)
    limit = getattr(text, "max_position_embeddings", None)
    rope = getattr(text, "rope_parameters", None) or {}
    for parameters in (rope, *(p for p in rope.values() if isinstance(p, dict))):
        if parameters.get("rope_type") in ("dynamic", "longrope"):
            original = parameters.get("original_max_position_embeddings") or getattr(
                text, "original_max_position_embeddings", None
            )
            limit = min(filter(None, (limit, original)), default=None)
    return limit
