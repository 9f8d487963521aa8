"""Recommendations for a few users, beside what came next."""

from collections.abc import Sequence

import numpy as np
import torch

from laser_fast.evaluation.evaluate import row_batches
from laser_fast.evaluation.metrics import target_ranks
from laser_fast.reports.categories import item_titles
from laser_fast.reports.document import Block, Heading, Paragraph, Section, Table
from laser_fast.reports.experts import UserRouting
from laser_fast.reports.subject import Subject

_SHOWN = 5  # items recommended
_NEWEST = 8  # items of the history


def samples_section(subject: Subject | None, routing: UserRouting | None, num_users: int = 5) -> Section:
    """Section 5: users evenly spaced among the test users, not chosen for their results."""
    title = "Recommendations of sample users"
    if subject is None or not len(subject.split.test):
        return Section(title, (Paragraph("There is no model, or no test user, to show.", "note"),))
    test, titles = subject.split.test, item_titles(subject.dataset.items)
    chosen = np.unique(np.linspace(0, len(test) - 1, min(num_users, len(test))).round().astype(np.int64))
    rows = test.select(chosen)
    items, cu_seqlens, targets = next(row_batches(rows, len(rows), subject.model.device))
    with torch.no_grad():
        scores = subject.scorer.score(items, cu_seqlens).cpu()
    ranks = target_ranks(scores, targets.cpu())
    best = scores.sort(dim=1, descending=True, stable=True)
    text = (
        "Users at even distances in the list of test users, not picked for their results. The score is that of the "
        "metrics, so items of the history are not filtered."
    )
    blocks: list[Block] = [Paragraph(text)]
    for place in range(len(rows)):
        user = subject.dataset.user_ids[int(rows.users[place])]
        history = rows.histories[place].tolist()
        target = int(rows.targets[place])
        blocks.append(Heading(f"User {user}"))
        blocks.append(Paragraph(_history(history, titles)))
        rank, total = int(ranks[place]), scores.shape[1]
        where = "a hit" if rank <= _SHOWN else f"place {rank:,} of {total:,}"
        routed = "" if routing is None else f" {_routed(routing, int(chosen[place]))}"
        blocks.append(Paragraph(f"What came next: {titles[target]} ({where}).{routed}"))
        lines = []
        for number, (value, item) in enumerate(
            zip(best.values[place, :_SHOWN].tolist(), best.indices[place, :_SHOWN].tolist(), strict=True), start=1
        ):
            mark = "✓ came next" if item == target else "in the history" if item in history else ""
            lines.append((str(number), titles[item], f"{value:.2f}", mark))
        hit = frozenset(number for number, line in enumerate(lines) if line[3].startswith("✓"))
        header = ("place", "recommended", "score", "")
        blocks.append(Table(header, tuple(lines), wide=frozenset({0, 1, 3}), strong=hit))
    return Section(title, tuple(blocks))


def _history(history: Sequence[int], titles: Sequence[str]) -> str:
    if not history:
        return "History: empty."
    older = len(history) - _NEWEST
    shown = "; ".join(titles[item] for item in history[-_NEWEST:])
    return f"History, newest last: {f'{older:,} older items, then ' if older > 0 else ''}{shown}."


def _routed(routing: UserRouting, row: int) -> str:
    pairs = zip(routing.expert[row].tolist(), routing.weight[row].tolist(), strict=True)
    return "Experts: " + ", ".join(f"{expert + 1} (weight {weight:.2f})" for expert, weight in pairs) + "."
