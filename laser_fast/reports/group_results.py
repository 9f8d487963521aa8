"""Whom the recommender serves well: metrics by popularity of the target, by length of the history, for cold items."""

from laser_fast.evaluation.comparison import LASER, Comparison
from laser_fast.evaluation.groups import Group, group_metric, group_table, popularity_groups, quantile_groups
from laser_fast.evaluation.metrics import paired_difference
from laser_fast.reports.document import Block, Heading, Paragraph, Picture, Section, Table
from laser_fast.reports.plots import dots
from laser_fast.reports.subject import Subject, rival, shown_systems, verdict, written

_METRIC = "NDCG@10"
_FEW = 30


def groups_section(subject: Subject | None, comparison: Comparison | None) -> Section:
    """Section 4."""
    title = "Who is served well"
    if subject is None or comparison is None:
        return Section(title, (Paragraph("There is no model to measure yet.", "note"),))
    test = subject.split.test
    warm, cold = popularity_groups(test.targets, subject.counts.numpy())
    lengths = quantile_groups(test.histories.lengths, "items")
    other = rival(subject, comparison)
    text = (
        f"Test users in groups of about equal size, Laser beside {other}. Dots are means, lines 95% intervals over "
        f"users (normal approximation: do not trust them under {_FEW} users, nor where nobody is served: of n users "
        "without a hit a share of up to 3 / n may be hits elsewhere)."
    )
    blocks: list[Block] = [Paragraph(text)]
    if subject.recommender is None:
        blocks.append(
            Paragraph("This run has no ID-based recommender to stand beside; ItemKNN takes its place.", "note")
        )
    blocks += _part(
        "By how often the item that came next was seen in training", "popularity", warm, subject, comparison
    )
    blocks += _cold(cold, subject, comparison)
    blocks += _part("By length of the history", "length", lengths, subject, comparison)
    return Section(title, tuple(blocks))


def _part(title: str, name: str, groups: list[Group], subject: Subject, comparison: Comparison) -> list[Block]:
    if not groups:
        return [Heading(title), Paragraph("No test user is in any of these groups.", "note")]
    other = rival(subject, comparison)
    pair = {system: comparison.metrics[system] for system in (LASER, other)}
    cells = group_table(groups, pair, _METRIC)
    labels = [f"{group.label}\n({len(group):,} users)" for group in groups]
    series = [
        (system, [row[place].mean for row in cells], [row[place].ci95 for row in cells])
        for place, system in enumerate(pair)
    ]
    best = max(range(len(groups)), key=lambda place: cells[place][0].mean)
    worst = min(range(len(groups)), key=lambda place: cells[place][0].mean)
    caption = f"{title}: Laser does best at {groups[best].label}, worst at {groups[worst].label}."
    if len(groups) == 1:
        caption = f"{title}: all users fall into one group."
    svg = dots(labels, series, f"{_METRIC}, test users")
    picture = Picture(f"by-{name}", svg, f"{_METRIC} {title[0].lower()}{title[1:]}", caption)
    return [Heading(title), picture, _table(groups, subject, comparison)]


def _table(groups: list[Group], subject: Subject, comparison: Comparison) -> Table:
    systems, other = shown_systems(subject, comparison), rival(subject, comparison)
    rows = []
    for group in groups:
        values = [written(group_metric(comparison.metrics[system], group, _METRIC)) for system in systems]
        difference = paired_difference(
            comparison.metrics[LASER].ranks[group.rows], comparison.metrics[other].ranks[group.rows], _METRIC
        )
        hits = written(group_metric(comparison.metrics[LASER], group, "HR@10"))
        rows.append((group.label, f"{len(group):,}", *values, written(difference), hits))
    header = ("group", "users", *(f"{_METRIC}, {system}" for system in systems), f"Laser minus {other}", "HR@10, Laser")
    return Table(header, tuple(rows))


def _cold(cold: Group, subject: Subject, comparison: Comparison) -> list[Block]:
    title = "Cold items: never seen in training"
    if not len(cold):
        text = "Every test user's next item was seen in training, so nothing can be said about cold items."
        return [Heading(title), Paragraph(text, "note")]
    other = rival(subject, comparison)
    difference = paired_difference(
        comparison.metrics[LASER].ranks[cold.rows], comparison.metrics[other].ranks[cold.rows], _METRIC
    )
    few = f" With {len(cold)} users this says little." if len(cold) < _FEW else ""
    text = (
        f"For {len(cold):,} test users the next item occurs in nobody's training part; an ID-based recommender knows "
        f"nothing of it, a language model has its text. Against {other} Laser is here {verdict(difference)}.{few}"
    )
    return [Heading(title), Paragraph(text), _table([cold], subject, comparison)]
