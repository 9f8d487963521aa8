"""What training loops of other libraries call on a model beside `forward`: checkpointing, moves of device and dtype."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor, nn

from laser_fast.lm.frozen_lm import FrozenLM
from laser_fast.nn.dtypes import refuse_dtypes

Self = TypeVar("Self", bound="TrainerCalls")


class TrainerCalls(nn.Module):
    """Calls of transformers' Trainer and of `nn.Module`, as they are meant for a frozen language model."""

    lm: FrozenLM

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Compute the layers of the language model again in backward: `execution.checkpointing` "full".

        `TrainingArguments(gradient_checkpointing=True)` calls this (`activation_checkpointing` in newer releases).

        Args:
            gradient_checkpointing_kwargs: of `torch.utils.checkpoint`; of these `use_reentrant` alone, which changes
                neither loss nor gradient (ours is never reentrant).
            every_n_layers: 1.
            offload: keep the inputs of the layers in host memory meanwhile: "offload".

        Raises:
            ValueError: another option, or a model whose layers transformers does not mark as such.
            RuntimeError: its layers are compiled.
        """
        others = dict(gradient_checkpointing_kwargs or {})
        others.pop("use_reentrant", None)
        if every_n_layers != 1:
            others["every_n_layers"] = every_n_layers
        if others:
            raise ValueError(
                f"gradient_checkpointing_enable: use_reentrant and offload alone are known, got {others}; leave the "
                "others out"
            )
        self._checkpoint("offload" if offload else "full")

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """`gradient_checkpointing_enable` under its newer name."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, every_n_layers, offload)

    def gradient_checkpointing_disable(self) -> None:
        """Keep what backward needs: `execution.checkpointing` "none"."""
        self._checkpoint("none")

    def activation_checkpointing_disable(self) -> None:
        """`gradient_checkpointing_disable` under its newer name."""
        self.gradient_checkpointing_disable()

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether backward computes layers of the language model, or parts of them, again."""
        return self.lm.execution.checkpointing != "none"

    def _checkpoint(self, how: str) -> None:
        self.lm.run_as(replace(self.lm.execution, checkpointing=how))

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """To another device, but not to another dtype: what is trained is float32, what is frozen as it was loaded."""
        refuse_dtypes(
            self,
            fn,
            "choose the dtype of the frozen language model where it is loaded (dtype=), and compute in half precision "
            "under torch.autocast (of TrainingArguments: bf16, not bf16_full_eval)",
        )
        super()._apply(fn, recurse)
        return self
