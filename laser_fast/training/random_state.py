"""The random generators a training step may draw from, all of them at once: read, put back, kept as tensors."""

import random
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomState:
    """Where the generators of torch (host and the device that computes) and of Python stand; numpy's is never used.

    Attributes:
        device: whose generator is meant beside that of the host.
        tensors: their states, by name.
    """

    device: torch.device
    tensors: dict[str, Tensor]

    @classmethod
    def now(cls, device: torch.device) -> "RandomState":
        """The state at this moment, as a copy."""
        version, words, gauss = random.getstate()
        tensors = {
            "host": torch.get_rng_state(),
            "python": torch.tensor([version, *words]),
            "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        }
        if device.type == "cuda":
            tensors["device"] = torch.cuda.get_rng_state(device)
        return cls(device, tensors)

    def of_torch(self) -> "RandomState":
        """That of torch's generators alone; to put it back leaves Python's where it is."""
        python = ("python", "python_gauss")
        return RandomState(self.device, {name: state for name, state in self.tensors.items() if name not in python})

    def put_back(self) -> None:
        """Let the generators go on from here."""
        torch.set_rng_state(self.tensors["host"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(self.tensors["device"], self.device)
        if "python" in self.tensors:
            version, *words = self.tensors["python"].tolist()
            gauss = self.tensors["python_gauss"].tolist()
            random.setstate((version, tuple(words), gauss[0] if gauss else None))
