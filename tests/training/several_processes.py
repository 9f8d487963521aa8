"""Jobs in one or several processes, forked from one that has done it all before: run as a script.

Reads one JSON object a line: `ranks` (0 = here, in this process), `folder` for what the processes print and measure,
`arguments` of the command or `numbers` for `measure`; `disturb` = what happens to which rank at which call of the loss;
`end` = a signal `number`, sent `after_s` s after `wait_for` is there, or after that folder has an entry with a name
`beyond` the one given. Answers with the exit statuses, by rank.
"""

import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from laser_fast.cli import main
from laser_fast.data.batches import PackedBatch
from laser_fast.models.objective import gather_candidates
from laser_fast.nn.mformer import balance_across
from laser_fast.ops import route_experts
from laser_fast.processes import OtherProcessFailed, Processes
from laser_fast.runs.resume import StateFolder
from laser_fast.training.loop import StageTrainer
from laser_fast.training.train import train_laser  # noqa: F401  so that no fork imports it


def serve() -> None:
    tqdm.set_lock(threading.RLock())  # its own is shared by all forks: one that is killed holding it stops the others
    torch.set_num_threads(1)  # no pool of threads that a fork would lose
    StateFolder.clear = lambda self: None  # type: ignore[method-assign]  # they are compared
    answers = sys.stdout
    for line in sys.stdin:
        request = json.loads(line)
        if not request["ranks"]:
            print(json.dumps([_run(request, 0)]), file=answers, flush=True)
            AcceleratorState._reset_state(reset_partial_state=True)  # a fork is to find out by itself what it is
            continue
        port = _free_port()
        children = [_fork(request, rank, port) for rank in range(request["ranks"])]
        if "end" in request:
            _end(children[0], **request["end"])
        statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps(statuses), file=answers, flush=True)


def _end(child: int, number: int, after_s: float, wait_for: str, beyond: str | None) -> None:
    """Send the signal at its moment, unless the child has ended by then; it is still to be waited for."""

    def ready() -> bool:
        if beyond is None or not os.path.exists(wait_for):
            return beyond is None and os.path.exists(wait_for)
        return any(name > beyond for name in os.listdir(wait_for) if name[0].isdigit())

    while not ready():
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return
        time.sleep(0.005)
    time.sleep(after_s)
    os.kill(child, number)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _fork(request: dict[str, Any], rank: int, port: int) -> int:
    child = os.fork()
    if child:
        return child
    if request["ranks"] > 1:
        told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": request["ranks"], "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in told.items()}, MASTER_ADDR="127.0.0.1")
    os._exit(_run(request, rank))  # to take down an interpreter of this size takes longer than most jobs


def _run(request: dict[str, Any], rank: int) -> int:
    folder = Path(request["folder"])
    with (
        (folder / f"printed-{rank}").open("w", buffering=1) as printed,
        redirect_stdout(printed),
        redirect_stderr(printed),
    ):
        try:
            if "numbers" in request:
                dist.init_process_group("gloo")
                measure(folder / f"numbers-{rank}.safetensors")
                return 0
            _watch(folder / f"losses-{rank}", request.get("disturb"), rank)
            return main(request["arguments"])
        except Exception:
            traceback.print_exc()
            return 1
        finally:
            StageTrainer._train_step, StageTrainer._backward = _METHODS  # type: ignore[method-assign]


_METHODS = StageTrainer._train_step, StageTrainer._backward


def _watch(record: Path, disturb: dict[str, Any] | None, rank: int) -> None:
    """Write down the loss of every step; disturb one call of the loss."""
    (step, backward), calls = _METHODS, []

    def recorded(self: StageTrainer, *arguments: Any) -> Any:
        done = step(self, *arguments)
        with record.open("a") as file:
            file.write(f"{float(done[0]['loss'])!r}\n")
        return done

    def disturbed(self: StageTrainer, part: PackedBatch, share: float, loss_function: Any) -> Any:
        calls.append(1)
        if disturb is None or rank != disturb["rank"] or len(calls) != disturb["call"]:
            return backward(self, part, share, loss_function)
        if disturb["how"] == "raise":
            raise RuntimeError("this process broke")
        if disturb["how"] == "terminate":
            os.kill(os.getpid(), signal.SIGTERM)
        factor = float("nan") if disturb["how"] == "nan" else 1.0

        def loss(batch: PackedBatch) -> dict[str, Tensor]:
            values: dict[str, Tensor] = loss_function(batch)
            return values | {"loss": values["loss"] * factor}

        return backward(self, part, share, loss)

    StageTrainer._train_step = recorded  # type: ignore[method-assign]
    StageTrainer._backward = disturbed  # type: ignore[method-assign]


def inputs() -> dict[str, Tensor]:
    """What all processes, and the one they are compared with, compute on; float64."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return {
        "states": draw(9, 4),  # histories of 4, 0, 2 and 3 items
        "router": draw(3, 4),
        "bias": draw(3),
        "users": draw(4, 5),
        "table": draw(7, 5),
        "targets": torch.tensor([6, 2, 0, 6]),
    }


CUTS = {0: (0, 3), 1: (3, 4)}  # users of each of two processes
STARTS = torch.tensor([0, 4, 4, 6, 9])


def candidates_loss(users: Tensor, table: Tensor, targets: Tensor, processes: Processes) -> Tensor:
    """Mean cross-entropy of some users among the distinct targets of all."""
    distinct, places = torch.unique(targets, return_inverse=True)
    empty = torch.zeros(len(users) + 1, dtype=torch.int32)
    batch = PackedBatch(targets[:0], empty, targets[:0], empty, targets=targets, positive_targets=places)
    items, own = gather_candidates(table[distinct], batch, processes)
    return F.cross_entropy(users @ items.T, own)


def balance(values: dict[str, Tensor], first: int, end: int, processes: Processes) -> tuple[Tensor, Tensor]:
    """Balance loss and load of users `first` to `end`, together with those of the other processes."""
    starts = STARTS[first : end + 1]
    states = values["states"][starts[0] : starts[-1]]
    cu_seqlens = (starts - starts[0]).int()
    routing = route_experts(states, values["router"], values["bias"], cu_seqlens, 2)
    return balance_across(routing, cu_seqlens, processes)


def measure(file: Path) -> None:
    """Losses and gradients of two processes that have 3 and 1 users, then 4 and none; what errors do."""
    processes = Processes()
    found: dict[str, Tensor] = {}
    for name, (first, end) in {"uneven": CUTS[processes.rank], "empty": ((0, 4), (0, 1))[processes.rank]}.items():
        values = {key: tensor.clone().requires_grad_(tensor.is_floating_point()) for key, tensor in inputs().items()}
        stands_in = name == "empty" and processes.rank == 1
        share = 0.0 if stands_in else (end - first) / 4
        with processes.standing_in(stands_in):
            own = values["users"][first:end], values["table"], values["targets"][first:end], processes
            loss = candidates_loss(*own)
            balance_loss, load = balance(values, first, end, processes)
            ((loss + balance_loss) * share).backward()
        trained = [values[key] for key in ("users", "table", "router", "bias", "states")]
        idle = torch.zeros(1, requires_grad=True)
        processes.sum_gradients([*trained, idle])
        assert idle.grad is None
        sums = processes.sum_values({"loss": loss.detach() * share, "balance": balance_loss.detach() * share})
        found |= {f"{name}.{key}": value for key, value in sums.items()} | {f"{name}.load": load}
        found |= {f"{name}.grad_{key}": values[key].grad for key in ("users", "table", "router", "bias", "states")}  # type: ignore[misc]
    with processes.apart():
        found["apart"] = processes.gather(torch.tensor([processes.rank]))
    found["gathered"] = processes.gather(torch.tensor([processes.rank] * (processes.rank + 1)))
    try:
        with processes.together():
            if processes.rank:
                raise ValueError("no such folder")
    except (ValueError, OtherProcessFailed) as error:
        found["error"] = torch.tensor(list(f"{type(error).__name__}: {error}".encode()), dtype=torch.uint8)
    linear = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(linear.weight, float(processes.rank))
    processes.synchronize(linear)
    found["synchronized"] = linear.weight.detach()
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, file)


if __name__ == "__main__":
    serve()
    os._exit(0)
