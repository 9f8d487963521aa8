"""How good the model is: beside other systems, for groups of users, and what it recommends to some of them."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from laser_fast.evaluation.comparison import LASER, ZERO_SHOT, Comparison
from laser_fast.evaluation.evaluate import row_batches
from laser_fast.evaluation.groups import Group, group_metric, popularity_groups, quantile_groups, seen_and_cold
from laser_fast.evaluation.metrics import MetricValue, paired_difference, target_ranks
from laser_fast.reports.document import Block, Heading, Paragraph, Picture, Table
from laser_fast.reports.experts import UserRouting, item_titles
from laser_fast.reports.plots import dots
from laser_fast.reports.subject import RunRecord, Subject, stage_name

_METRIC = "NDCG@10"
_COLUMNS = ("HR@10", "NDCG@10", "MRR")
_FEW = 30  # users of a group
_SHOWN = 5  # items recommended
_NEWEST = 8  # items of a sample user's history
_SAMPLE_USERS = 5


def summary_blocks(record: RunRecord, subject: Subject | None, comparison: Comparison | None) -> Iterator[Block]:
    """What was trained, on what, and how good it is: in words and one table."""
    if subject is None or comparison is None:
        yield Paragraph(what_was_trained(record, None))
        text = "No model is there to be measured: the run stopped before its first checkpoint. Only its log is shown."
        yield Paragraph(text, "lead")
        return
    yield Paragraph(f"{what_was_trained(record, subject)} {_kept(record)}")
    yield Paragraph(_how_good(subject, comparison), "lead")
    if record.finished is None:
        text = "The run did not come to its end (it has no finished.json): the figures are those of its best model so "
        yield Paragraph(f"{text}far.", "note")
    rows = tuple(
        (name, *(_written(metrics[column]) for column in _COLUMNS)) for name, metrics in comparison.metrics.items()
    )
    caption = (
        f"{len(subject.split.test):,} test users; the whole catalogue is ranked, items of the history not filtered; "
        f"{comparison.rule}; ± are 95% intervals over users."
    )
    laser = frozenset({list(comparison.metrics).index(LASER)})
    yield Table(("system", *_COLUMNS), rows, caption, strong=laser)
    text = "Laser's score is the cosine of the paper: this run fitted no calibrated score (evaluation.calibrate)."
    if subject.model.calibration is not None:
        text = (
            "“calibrated” adds scalars fitted on validation: for items of the history, for the last item, for "
            "popularity and, in Laser's case, the recommender's score, sequential rules and item neighbours. "
            "“no-training fusion” is such a sum without any training of Laser."
        )
    yield Paragraph(text, "note")


def what_was_trained(record: RunRecord, subject: Subject | None) -> str:
    """What a run trained, as a sentence."""
    base = str(record.config["lm"]["path"]).rstrip("/").split(":")[-1]
    name = next((part for part in base.split("/") if part != "model"), base)
    mformer = record.config.get("mformer", {})
    recommender = None if subject is None else subject.recommender
    kind = "" if recommender is None else f" ({type(recommender).__name__})"
    writes = f"writes what an ID-based recommender{kind} knows about the user"
    who = {
        "mformer": f"M-Former ({mformer.get('num_experts')} experts, {mformer.get('top_k')} for each user, "
        f"{mformer.get('num_queries')} virtual tokens) {writes}",
        "linear": f"a linear map {writes}",
        "shared": "one learned text of virtual tokens, the same for everybody, stands",
        "none": "nothing stands",
    }[record.prefix]
    prefix = f"{who} in front of the text of the history."
    if subject is None:
        return f"Laser, a recommender around the frozen language model {name}; {prefix}"
    lm, data = subject.model.lm, subject.dataset
    trained = sum(parameter.numel() for parameter in subject.model.parameters() if parameter.requires_grad)
    return (
        f"Laser learned to say what a user takes next, from {len(data.item_index):,} interactions of "
        f"{data.num_users:,} users with {data.num_items:,} items. Histories are read as text by the frozen language "
        f"model {name} ({type(lm.model).__name__}, width {lm.hidden_size:,}); {prefix} {trained:,} parameters were "
        "trained."
    )


def _kept(record: RunRecord) -> str:
    kept = record.kept or {}
    value = (kept.get("validation") or {}).get(_METRIC)
    figure = "" if value is None else f" (validation {_METRIC} {value:.4f})"
    if kept.get("epoch", 0) < 0:
        where = f"from before the first step of {stage_name(kept['stage'])}"
        return f"The model kept is that {where}{figure}: no epoch of it was better."
    return f"The model kept is that of {stage_name(kept['stage'])}, epoch {kept['epoch'] + 1}{figure}."


def _how_good(subject: Subject, comparison: Comparison) -> str:
    laser, rival = comparison.metrics[LASER], _rival(subject, comparison)
    hits = laser["HR@10"]
    others = {name: metrics[_METRIC].mean for name, metrics in comparison.metrics.items() if not name.startswith(LASER)}
    best = max(others, key=others.__getitem__)
    parts = [
        f"For {hits.mean:.1%} ± {hits.ci95:.1%} of the {len(laser):,} test users the item that came next is among the "
        f"first ten of {subject.dataset.num_items:,} (HR@10); {_METRIC}, which rewards early places, is "
        f"{_written(laser[_METRIC])}."
    ]
    zero = f"{ZERO_SHOT}, calibrated" if subject.model.calibration is not None else ZERO_SHOT
    said = {best: f"the best other line ({best})", zero: f"the untrained language model ({zero})", rival: rival}
    for name in dict.fromkeys((rival, zero, best)):
        if name in comparison.metrics:
            difference = paired_difference(laser.ranks, comparison.metrics[name].ranks, _METRIC)
            parts.append(f"Against {said[name]} it is {_verdict(difference)}.")
    return " ".join(parts)


def group_blocks(subject: Subject | None, comparison: Comparison | None) -> Iterator[Block]:
    """Metrics by popularity of the target, by length of the history, and for cold items."""
    if subject is None or comparison is None:
        yield Paragraph("There is no model to measure yet.", "note")
        return
    rival, test, counts = _rival(subject, comparison), subject.split.test, subject.counts.numpy()
    warm, cold = popularity_groups(test, counts), seen_and_cold(test, counts)[1]
    lengths = quantile_groups(test.histories.lengths, "items")
    yield Paragraph(
        f"Test users in groups of about equal size, Laser beside {rival}. Dots are means, lines "
        f"95% intervals over users (normal approximation: do not trust them under {_FEW} users, nor where nobody is "
        "served: of n users without a hit a share of up to 3 / n may be hits elsewhere)."
    )
    if subject.recommender is None:
        text = "This run has no ID-based recommender to stand beside; ItemKNN takes its place."
        yield Paragraph(text, "note")
    title = "By how often the item that came next was seen in training"
    yield from _grouped(title, "popularity", warm, rival, comparison)
    yield from _cold(cold, rival, comparison)
    yield from _grouped("By length of the history", "length", lengths, rival, comparison)


def _grouped(title: str, name: str, groups: list[Group], rival: str, comparison: Comparison) -> Iterator[Block]:
    yield Heading(title)
    if not groups:
        yield Paragraph("No test user is in any of these groups.", "note")
        return
    series = []
    for system in (LASER, rival):
        values = [group_metric(comparison.metrics[system], group, _METRIC) for group in groups]
        series.append((system, [value.mean for value in values], [value.ci95 for value in values]))
    means = series[0][1]
    best, worst = (groups[pick(range(len(groups)), key=means.__getitem__)].label for pick in (max, min))
    caption = f"{title}: Laser does best at {best}, worst at {worst}."
    if len(groups) == 1:
        caption = f"{title}: all users fall into one group."
    svg = dots([f"{group.label}\n({len(group):,} users)" for group in groups], series, f"{_METRIC}, test users")
    yield Picture(f"by-{name}", svg, f"{_METRIC} {title[0].lower()}{title[1:]}", caption)
    yield _group_table(groups, rival, comparison)


def _group_table(groups: list[Group], rival: str, comparison: Comparison) -> Table:
    systems = list(dict.fromkeys([LASER, rival, rival.partition(",")[0]]))  # with the plain score of the rival
    rows = []
    for group in groups:
        values = [group_metric(comparison.metrics[system], group, _METRIC) for system in systems]
        values += [_lead(group, rival, comparison), group_metric(comparison.metrics[LASER], group, "HR@10")]
        rows.append((group.label, f"{len(group):,}", *map(_written, values)))
    header = ("group", "users", *(f"{_METRIC}, {system}" for system in systems), f"Laser minus {rival}", "HR@10, Laser")
    return Table(header, tuple(rows))


def _cold(cold: Group, rival: str, comparison: Comparison) -> Iterator[Block]:
    yield Heading("Cold items: never seen in training")
    if not len(cold):
        text = "Every test user's next item was seen in training, so nothing can be said about cold items."
        yield Paragraph(text, "note")
        return
    few = f" With {len(cold)} users this says little." if len(cold) < _FEW else ""
    yield Paragraph(
        f"For {len(cold):,} test users the next item occurs in nobody's training part; an ID-based recommender knows "
        f"nothing of it, a language model has its text. Against {rival} Laser is here "
        f"{_verdict(_lead(cold, rival, comparison))}.{few}"
    )
    yield _group_table([cold], rival, comparison)


def _lead(group: Group, rival: str, comparison: Comparison) -> MetricValue:
    """Laser minus its rival, over the users of a group."""
    laser, other = (comparison.metrics[system].ranks[group.rows] for system in (LASER, rival))
    return paired_difference(laser, other, _METRIC)


def _rival(subject: Subject, comparison: Comparison) -> str:
    """What stands beside Laser: the recommender, calibrated where Laser is; without a recommender, ItemKNN."""
    if subject.recommender is None:
        return "ItemKNN"
    name = type(subject.recommender).__name__
    calibrated = f"{name}, calibrated"
    return calibrated if subject.model.calibration is not None and calibrated in comparison.metrics else name


def _written(value: MetricValue) -> str:
    """`0.0904 ± 0.0144`, without an interval for a single row; a dash for no row."""
    if value.mean != value.mean:
        return "-"
    return f"{value.mean:.4f}" if value.ci95 != value.ci95 else f"{value.mean:.4f} ± {value.ci95:.4f}"


def _verdict(difference: MetricValue) -> str:
    amount = f"{difference.mean:+.4f} ± {difference.ci95:.4f}"
    if difference.mean == 0.0 == difference.ci95:
        return "the same"
    if abs(difference.mean) <= difference.ci95 or difference.ci95 != difference.ci95:
        return f"level within the noise ({amount})"
    return f"{'better' if difference.mean > 0 else 'worse'} ({amount})"


def sample_blocks(subject: Subject | None, routing: UserRouting | None) -> Iterator[Block]:
    """Recommendations beside what came next, for users evenly spaced among the test users."""
    if subject is None or not len(subject.split.test):
        yield Paragraph("There is no model, or no test user, to show.", "note")
        return
    test, titles = subject.split.test, item_titles(subject.dataset.items)
    chosen = np.unique(np.linspace(0, len(test) - 1, min(_SAMPLE_USERS, len(test))).round().astype(np.int64))
    rows = test.select(chosen)
    items, cu_seqlens, targets = next(row_batches(rows, len(rows), subject.model.device))
    with torch.no_grad():
        scores = subject.scorer.score(items, cu_seqlens).cpu()
    ranks = target_ranks(scores, targets.cpu())
    best = scores.sort(dim=1, descending=True, stable=True)
    yield Paragraph(
        "Users at even distances in the list of test users, not picked for their results. The score is that of the "
        "metrics, so items of the history are not filtered."
    )
    for place in range(len(rows)):
        history, target = rows.histories[place].tolist(), int(rows.targets[place])
        yield Heading(f"User {subject.dataset.user_ids[int(rows.users[place])]}")
        yield Paragraph(_history(history, titles))
        rank = int(ranks[place])
        where = "a hit" if rank <= _SHOWN else f"place {rank:,} of {scores.shape[1]:,}"
        routed = "" if routing is None else f" {_routed(routing, int(chosen[place]))}"
        yield Paragraph(f"What came next: {titles[target]} ({where}).{routed}")
        values, shown = (found[place, :_SHOWN].tolist() for found in (best.values, best.indices))
        lines = []
        for number, (value, item) in enumerate(zip(values, shown, strict=True), start=1):
            mark = "✓ came next" if item == target else "in the history" if item in history else ""
            lines.append((str(number), titles[item], f"{value:.2f}", mark))
        hit = frozenset({shown.index(target)} if target in shown else ())
        yield Table(("place", "recommended", "score", ""), tuple(lines), wide=frozenset({0, 1, 3}), strong=hit)


def _history(history: Sequence[int], titles: Sequence[str]) -> str:
    if not history:
        return "History: empty."
    older = len(history) - _NEWEST
    shown = "; ".join(titles[item] for item in history[-_NEWEST:])
    return f"History, newest last: {f'{older:,} older items, then ' if older > 0 else ''}{shown}."


def _routed(routing: UserRouting, row: int) -> str:
    pairs = zip(routing.expert[row].tolist(), routing.weight[row].tolist(), strict=True)
    return "Experts: " + ", ".join(f"{expert + 1} (weight {weight:.2f})" for expert, weight in pairs) + "."
