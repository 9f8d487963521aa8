"""How a model runs its language model for users: as it stands, compiled, or as CUDA graphs."""

from collections.abc import Callable, Sequence

from torch import Tensor

from laser_fast.data.sequences import PackedSequences
from laser_fast.lm.execution.compiled_layers import Backend, compile_layers, plain_layers
from laser_fast.lm.execution.fixed_shapes import FixedShapes
from laser_fast.lm.frozen_lm import FrozenLM

MODES = ("none", "compile", "graphs")


class Serving:
    """The choice for calls without gradient: `recommend`, `score`, `encode_users`, `encode_items`.

    Attributes:
        mode: "none"; "compile": layers compiled once for all batches; "graphs": CUDA graphs, one for each of few shapes
            that batches are filled up to.
    """

    def __init__(self, lm: FrozenLM, encode_users: Callable[[PackedSequences], Tensor]) -> None:
        self.mode = "none"
        self._lm = lm
        self._encode_users = encode_users

    def use(self, mode: str, *, backend: Backend = "inductor", capacity: int = 64, max_tokens: int = 2048) -> None:
        """Choose; nothing is compiled or captured before `warmup` or the first call.

        Args:
            backend: of torch.compile, with "compile".
            capacity: graphs kept, with "graphs"; the one unused for longest is dropped.
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
            assert lm.layers  # a plain call brings the attention modules into their order
        if mode == "compile" and not compile_layers(lm.model, backend):
            raise ValueError(
                f'Serving: mode "compile" needs layers that can be compiled, got none in {type(lm.model).__name__}'
            )
        if mode == "graphs":
            lm.fixed_shapes = FixedShapes(lm, capacity=capacity, max_tokens=max_tokens)
        self.mode = mode

    def warmup(self, shapes: Sequence[tuple[int, int]] | None = None) -> None:
        """Compile or capture now what requests would wait for.

        Args:
            shapes: (users, tokens of each in the language model) to capture, with "graphs"; None = a single user with
                any number of tokens. Batches that fill up to the same shape are served as well.

        Raises:
            ValueError: numbers below 1, or more shapes than are kept.
        """
        wanted = list(shapes or ())
        if any(users < 1 or tokens < 1 for users, tokens in wanted):
            raise ValueError(f"Serving.warmup: shapes must be pairs of at least 1, got {wanted}")
        graphs = self._lm.fixed_shapes
        if not isinstance(graphs, FixedShapes):
            for users in (1, 2):
                self._encode(users)
            return
        if shapes is None:
            wanted = [(1, tokens) for tokens in range(1, graphs.max_tokens + 1)]
        # one user and several differ in form where each has a prefix
        single, several = [pair for pair in wanted if pair[0] == 1], [pair for pair in wanted if pair[0] > 1]
        if single:
            graphs.prepare(single, lambda: self._encode(1))
        if several:
            graphs.prepare(several, lambda: self._encode(2))

    def _encode(self, users: int) -> Tensor:
        """Users with a history of one item."""
        return self._encode_users(PackedSequences.from_lists([[0]] * users))
