"""All random generators that a training step may draw from: read, put back, kept as tensors."""

import random
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomState:
    """State of the generators of torch (host and `device`) and of Python, by name; numpy's is never used."""

    device: torch.device
    tensors: dict[str, Tensor]

    @classmethod
    def now(cls, device: torch.device, *, python: bool = True) -> "RandomState":
        """A copy of the state; without `python`, `put_back` leaves Python's generator alone."""
        tensors = {"host": torch.get_rng_state()}
        if python:
            version, words, gauss = random.getstate()
            tensors["python"] = torch.tensor([version, *words])
            tensors["python_gauss"] = torch.tensor([] if gauss is None else [gauss], dtype=torch.float64)
        if device.type == "cuda":
            tensors["device"] = torch.cuda.get_rng_state(device)
        return cls(device, tensors)

    def put_back(self) -> None:
        """Let the generators go on from here."""
        torch.set_rng_state(self.tensors["host"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(self.tensors["device"], self.device)
        if "python" in self.tensors:
            version, *words = self.tensors["python"].tolist()
            gauss = self.tensors["python_gauss"].tolist()
            random.setstate((version, tuple(words), gauss[0] if gauss else None))


def forked_generators(device: torch.device) -> AbstractContextManager[None]:
    """Within, torch's generators (host and `device`) may be used; after it they are as they were."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
