"""Random calls of every public operation, good and bad, on the CPU: each is answered rightly or refused by name.

Run in a process of its own, so that whatever reads or writes outside its tensors ends no other test:

    python tests/ops/fuzz_operations.py --calls 10000 --seed 0

prints one line of JSON, {"calls": ..., "answered": ..., "refused": ..., "wrong": ...}. What was wrong goes to stderr;
`--calls 1 --seed` with the number that is named there repeats it.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections import Counter
from collections.abc import Sequence

import torch
from fuzz_calls import KINDS
from fuzz_drawing import Call, Draw
from torch import Tensor

_REFUSALS = (ValueError, TypeError, RuntimeError)


def fuzz(calls: int, seed: int) -> dict[str, int]:
    """Counts of calls, by outcome: "answered", "refused" and "wrong"."""
    counts = Counter({"calls": calls, "answered": 0, "refused": 0, "wrong": 0})
    for number in range(seed, seed + calls):
        draw = Draw(number)
        call = KINDS[number % len(KINDS)](draw)
        draw.spoil(call)
        outcome = _outcome(call, draw)
        if outcome not in counts:
            print(f"call {number}: {call.name}: {outcome}", file=sys.stderr)
            outcome = "wrong"
        counts[outcome] += 1
    return dict(counts)


def _outcome(call: Call, draw: Draw) -> str:
    """ "answered", "refused", or what is wrong."""
    leaves = [leaf.detach().requires_grad_(leaf.is_floating_point() and not draw.rarely(0.2)) for leaf in call.leaves]
    if call.name in ("gated_product", "rms_norm"):  # without a gradient of their own
        leaves = [leaf.detach() for leaf in leaves]
    try:
        results = list(call.run(*leaves))
    except _REFUSALS as error:
        if call.fits:
            return f"refused: {error}"
        rule = str(error).partition(": ")[0].split()[0]
        return "refused" if rule.startswith(call.name) and rule.isidentifier() else f"refused without its name: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if not call.fits:
        return "answered, but it does not fit"
    try:
        return _compare(call, leaves, results, draw)
    except Exception as error:
        return f"{type(error).__name__} behind the answer: {error}"


def _compare(call: Call, leaves: list[Tensor], results: list[Tensor], draw: Draw) -> str:
    wide = [leaf.detach().double().requires_grad_(leaf.requires_grad) for leaf in leaves]
    expected = list(call.exact(*wide))
    coarsest = max((torch.finfo(leaf.dtype).eps for leaf in leaves), default=0.0)
    for index, (result, exact) in enumerate(zip(results, expected, strict=True)):
        if fault := _difference(result, exact, coarsest):
            return f"result {index} {fault}"
    # a result that depends on no leaf that wants a gradient may say otherwise: it is differentiable as a whole
    both = zip(results, expected, strict=True)
    pairs = [(result, exact) for result, exact in both if result.requires_grad and exact.requires_grad]
    wanted = [index for index, leaf in enumerate(leaves) if leaf.requires_grad]
    if not pairs or not wanted:
        return "answered"
    given = [
        draw.floats(*result.shape, dtype=result.dtype) if result.dim() else torch.ones_like(result)
        for result, _ in pairs
    ]
    own = torch.autograd.grad([one for one, _ in pairs], [leaves[i] for i in wanted], given, allow_unused=True)
    true = torch.autograd.grad(
        [one for _, one in pairs], [wide[i] for i in wanted], [grad.double() for grad in given], allow_unused=True
    )
    for index, grad, exact in zip(wanted, own, true, strict=True):
        grad, exact = (torch.zeros_like(wide[index]) if one is None else one for one in (grad, exact))
        if fault := _difference(grad, exact, coarsest):
            return f"gradient {index} {fault}"
    return "answered"


def _difference(found: Tensor, exact: Tensor, eps: float) -> str:
    """Empty where both are the same up to rounding: within 32 eps of the largest number, and NaN in the same places."""
    if found.shape != exact.shape:
        return f"has shape {tuple(found.shape)} instead of {tuple(exact.shape)}"
    found, exact = found.detach().double(), exact.detach().double()
    finite = exact[exact.isfinite()].abs()
    bound = 32 * eps * max(1.0, float(finite.max()) if finite.numel() else 0.0)
    if torch.allclose(found, exact, rtol=0.0, atol=bound, equal_nan=True):
        return ""
    return f"is {found.flatten()[:8].tolist()} instead of {exact.flatten()[:8].tolist()}, within {bound:.1e}"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    counts = fuzz(chosen.calls, chosen.seed)
    print(json.dumps(counts))
    return 1 if counts["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
