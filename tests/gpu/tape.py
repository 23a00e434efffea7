"""Records passes without a GPU as a CUDA graph does: operators and kernels on fixed memory, played again in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten

from qllm.executor.gpu import launch as launches


def storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Tape:
    """What one piece did: each operator with its arguments, and the memory that its results lie in."""

    def __init__(self) -> None:
        self.steps: list[Callable[[], None]] = []
        self.made: list[torch.Tensor] = []
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        for step in self.steps:
            step()


class Operators(TorchDispatchMode):
    """Puts each operator on the tape."""

    def __init__(self, tape: Tape):
        super().__init__()
        self._tape = tape

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if any(not isinstance(x, torch.Tensor) for x in tree_flatten(out)[0]) and "item" in str(function):
            raise RuntimeError(f"{function} waits for the device, which a graph cannot record")
        given = {storage(x) for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)}
        made = [x for x in tree_flatten(out)[0] if isinstance(x, torch.Tensor)]
        writes = any(a.alias_info is not None and a.alias_info.is_write for a in function._schema.arguments)
        # By where results lie: whether a reshape is a view does not show in its schema.
        if "empty" in str(function) or (not writes and all(storage(x) in given for x in made)):
            return out

        def again() -> None:
            results = [x for x in tree_flatten(function(*args, **(kwargs or {})))[0] if isinstance(x, torch.Tensor)]
            for old, result in zip(made, results, strict=True):
                if storage(old) not in given:
                    old.copy_(result)

        self._tape.steps.append(again)
        self._tape.made += [x for x in made if storage(x) not in given and x.is_floating_point()]
        return out


class TapeRecorder:
    """Records pieces on tapes. As a graph, a tape is recorded without regard to what its inputs hold."""

    def __init__(self) -> None:
        self.tapes: list[Tape] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        yield

    def record(self, run: Callable[[], Any]) -> tuple[Tape, Any]:
        tape = Tape()
        self.tapes.append(tape)

        def kernel(function: Any, grid: Any, arguments: Any, constants: Any) -> None:
            launches.recorders.pop()
            try:
                with _disable_current_modes():
                    launches.launch(function, grid, *arguments, **constants)
            finally:
                launches.recorders.append(kernel)
            tape.steps.append(lambda: launches.launch(function, grid, *arguments, **constants))

        launches.recorders.append(kernel)
        try:
            with Operators(tape):
                result = run()
        finally:
            launches.recorders.pop()
        for tensor in tape.made:  # a graph computes nothing while it is recorded
            tensor.fill_(float("nan"))
        return tape, result
