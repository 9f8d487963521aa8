"""How the language model runs for requests: plain, compiled, or as CUDA graphs."""

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from laser_fast.data.sequences import PackedSequences
from laser_fast.lm.execution.compiled_layers import Backend, compile_layers, plain_layers
from laser_fast.lm.execution.fixed_shapes import FixedShapes
from laser_fast.lm.frozen_lm import FrozenLM

MODES = ("none", "compile", "graphs")


class Serving:
    """The choice for calls without gradient: `recommend`, `score`, `encode_users`, `encode_items`.

    Attributes:
        mode: "none"; "compile": layers compiled once for all batches; "graphs": one CUDA graph for each of the few
            shapes that batches are padded to.
    """

    def __init__(self, lm: FrozenLM, encode_users: Callable[[PackedSequences], Tensor]) -> None:
        self.mode = "none"
        self._lm = lm
        self._encode_users = encode_users

    def use(self, mode: str, *, backend: Backend = "inductor", capacity: int = 64, max_tokens: int = 2048) -> None:
        """Choose the mode; nothing is compiled or captured before `warmup` or the first call.

        Args:
            backend: of torch.compile, with "compile".
            capacity: graphs kept with "graphs"; the least recently used one is dropped.
            max_tokens: packed tokens of the largest batch that gets a graph; larger ones run as with "none".

        Raises:
            ValueError: another mode, or "compile" for a model whose layers transformers does not mark as such.
            RuntimeError: "graphs" without a GPU.
        """
        lm = self._lm
        if mode not in MODES:
            raise ValueError(f"Serving: mode must be one of {MODES}, got {mode!r}")
        if mode == "graphs" and lm.device.type != "cuda":
            raise RuntimeError(f'Serving: mode "graphs" needs a language model on a CUDA device, got {lm.device}')
        plain_layers(lm.model)
        if isinstance(lm.fixed_shapes, FixedShapes):
            lm.fixed_shapes.clear()
        lm.fixed_shapes = None
        self.mode = "none"
        if mode != "none":
            assert lm.layers  # this property runs a plain call, which finds the order of the attention modules
        if mode == "compile" and not compile_layers(lm.model, backend):
            raise ValueError(
                f'Serving: mode "compile" needs layers that can be compiled, got none in {type(lm.model).__name__}'
            )
        if mode == "graphs":
            lm.fixed_shapes = FixedShapes(lm, capacity=capacity, max_tokens=max_tokens)
        self.mode = mode

    def warmup(self, shapes: Sequence[tuple[int, int]] | None = None) -> None:
        """Compile or capture what requests would wait for.

        Args:
            shapes: (users, tokens of each in the language model) to capture with "graphs"; None = a single user with
                any number of tokens. Batches that are padded to the same shape are served as well.

        Raises:
            ValueError: numbers below 1, or more shapes than are kept.
        """
        wanted = list(shapes or ())
        if any(users < 1 or tokens < 1 for users, tokens in wanted):
            raise ValueError(f"Serving.warmup: shapes must be pairs of at least 1, got {wanted}")
        graphs = self._lm.fixed_shapes
        if isinstance(graphs, FixedShapes) and shapes is None:
            wanted = [(1, tokens) for tokens in range(1, graphs.max_tokens + 1)]
        for users in (1, 2):  # one user and several differ in form where each has a prefix
            encode = partial(self._encode_users, PackedSequences.from_lists([[0]] * users))
            alike = [pair for pair in wanted if min(pair[0], 2) == users]
            if not isinstance(graphs, FixedShapes):
                encode()
            elif alike:
                graphs.prepare(alike, encode)
