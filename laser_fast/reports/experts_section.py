"""What the experts do, in words: their load, their users, and what these have more of than chance gives."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from laser_fast.reports.document import Block, Bullets, Heading, Paragraph, Picture, Table
from laser_fast.reports.experts import (
    LEAST_USERS,
    Categories,
    Contrast,
    Features,
    Typical,
    UserRouting,
    category_features,
    contrast,
    find_categories,
    item_features,
    item_titles,
)
from laser_fast.reports.plots import over_epochs, paired_bars, ratios
from laser_fast.reports.subject import RunRecord, Subject

_SIGNIFICANT = 0.05
_HARDLY = 0.01  # share of the variance above chance
_CLEARLY = 0.2  # a median that is so much higher or lower
_MOST_KINDS = 20


def expert_blocks(record: RunRecord, subject: Subject | None, routing: UserRouting | None) -> Iterator[Block]:
    """Who goes to which expert, and what sets these users apart."""
    if record.prefix != "mformer":
        text = f"This run has no M-Former (bituning.prefix is {record.prefix}), so there are no experts."
        yield Paragraph(text, "note")
        return
    num_experts, top_k = (int(record.config["mformer"][name]) for name in ("num_experts", "top_k"))
    if num_experts == 1:
        text = "M-Former has a single expert here, which serves everybody: there is nothing to route or to compare."
        yield Paragraph(text, "note")
        return
    yield Paragraph(
        f"M-Former has {num_experts} experts, sets of query tokens that ask about a user. A router reads what the "
        f"recommender knows of the user's newest items and picks {top_k} of them; their answers are added up by weight "
        "and become the words in front of the history. The numbers of the experts mean nothing."
    )
    if subject is None or routing is None:
        yield _load(record, num_experts)
        yield Paragraph("There is no model yet that could route the test users.", "note")
        return
    found = _contrasts(subject, routing)
    yield Paragraph(conclusion(found, routing), "lead")
    yield _load(record, num_experts)
    yield _routing(routing)
    yield Heading("Each expert in a sentence")
    yield Bullets(tuple(_sentence(expert, routing, found, subject) for expert in range(num_experts)))
    for categories, result in found.kinds:
        yield from _kinds(categories, result, routing)
    if found.items is not None:
        yield from _items(found.items, routing)
    yield Paragraph(_method(found), "note")


@dataclass(frozen=True)
class Contrasts:
    """What was held against chance: single items, and each field of kinds."""

    items: Contrast | None
    kinds: list[tuple[Categories, Contrast]]

    @property
    def named(self) -> list[tuple[str, Contrast]]:
        """All of them, with the word for what differs; fields first."""
        kinds = [(categories.word, result) for categories, result in self.kinds]
        return kinds if self.items is None else [*kinds, ("single items", self.items)]


def _contrasts(subject: Subject, routing: UserRouting) -> Contrasts:
    def held(features: Features) -> Contrast | None:
        return contrast(features, routing.first, routing.num_experts)

    least = max(10, round(0.01 * len(routing.histories)))
    items = held(item_features(routing.histories, item_titles(subject.dataset.items), least))
    fields = find_categories(subject.dataset.items)
    kinds = [(field, held(category_features(routing.histories, field))) for field in fields]
    return Contrasts(items, [(field, result) for field, result in kinds if result is not None])


def conclusion(found: Contrasts, routing: UserRouting) -> str:
    """Whether the experts serve different users."""
    if not found.named:
        largest = int(np.argmax(routing.first_share))
        share = routing.first_share[largest]
        if share > 0.9:
            return f"Expert {largest + 1} is the first choice of {share:.0%} of the users: the others hardly take part."
        return "There are too few users, or too few common items, to say what tells the experts apart."
    clear = [(what, result) for what, result in found.named if result.p_value < _SIGNIFICANT]
    if not clear:
        what, result = found.named[0]
        return (
            "The experts do not differ in whom they serve: knowing a user's first expert explains "
            f"{result.explained:.1%} of the differences between users in {what}, and dealing users to experts at "
            f"random explains {result.by_chance:.1%} (p = {result.p_value:.2f}). "
            "Any story about single experts would be made up."
        )
    told = []
    for what, result in clear:
        p = f"= {result.p_value:.3f}" if result.p_value > 0.0051 else "≤ 0.005"
        told.append(f"{result.explained:.1%} in {what} (random deals: {result.by_chance:.1%}, p {p})")
    hardly = max(result.explained - result.by_chance for _, result in clear) < _HARDLY
    start = "The experts differ in whom they serve, but hardly" if hardly else "The experts serve different users"
    figures = f"Of the differences between users, knowing a user's first expert explains {', '.join(told)}."
    leanings = []
    for expert in range(routing.num_experts):
        kinds = [one for _, result in found.kinds for one in result.typical(expert, 2)]
        if clearest := sorted(kinds, key=lambda one: -one.z)[:2]:
            leanings.append(f"those of expert {expert + 1} lean to {' and '.join(one.name for one in clearest)}")
    gist = f" In short, histories: {', '.join(leanings)}." if leanings else ""
    return f"{start}. {figures}{gist}"


def _load(record: RunRecord, num_experts: int) -> Paragraph | Picture:
    epochs = [epoch for epoch in record.epochs if len(epoch.values.get("load") or ()) == num_experts]
    if not epochs:
        return Paragraph("The log holds no epoch with the load of the experts.", "note")
    shares = np.array([epoch.values["load"] for epoch in epochs], dtype=np.float64)
    shares /= np.maximum(shares.sum(axis=1, keepdims=True), 1e-12)
    lines = [(f"expert {number + 1}", (100 * shares[:, number]).tolist()) for number in range(num_experts)]
    level = (100 / num_experts, f"balanced, {100 / num_experts:.3g}%")
    svg = over_epochs([epoch.short for epoch in epochs], lines, "share of the load (%)", level=level)
    low, high = shares[-1].min(), shares[-1].max()
    caption = (
        "Load in training: share of the history items that each expert gets (P: stage 1, A and B: the phases of stage "
        f"2). In the last epoch from {low:.0%} to {high:.0%}; {1 / num_experts:.0%} each would be balanced."
    )
    return Picture("expert-load", svg, "Load of each expert over the epochs", caption)


def _routing(routing: UserRouting) -> Picture:
    labels = [f"expert {number + 1}" for number in range(routing.num_experts)]
    series = [("first choice", routing.first_share.tolist()), ("weight in the prefix", routing.weight_share.tolist())]
    level = (1 / routing.num_experts, f"balanced, {1 / routing.num_experts:.0%}")
    svg = paired_bars(labels, series, "share of the test users (%)", level)
    first_weight, top_k = float(routing.weight[:, 0].mean()), routing.weight.shape[1]
    caption = f"Routing of {len(routing.expert):,} test users by the model that was kept."
    if top_k > 1:
        caption += (
            f" The first choice has a weight of {first_weight:.2f} on average; {1 / top_k:.2f} would be no preference "
            f"among the {top_k} chosen."
        )
    return Picture("expert-users", svg, "Share of the test users per expert", caption)


def _sentence(expert: int, routing: UserRouting, found: Contrasts, subject: Subject) -> str:
    users = np.flatnonzero(routing.first == expert)
    name, total = f"Expert {expert + 1}", len(routing.first)
    if not len(users):
        weight = routing.weight_share[expert]
        return f"{name} is nobody's first choice; as a further choice it has {weight:.0%} of the weight."
    start = f"{name}, first choice of {len(users):,} of {total:,} users ({len(users) / total:.0%})"
    if len(users) < LEAST_USERS:
        return f"{start}: too few to describe them."
    parts = []
    for categories, result in found.kinds:
        signs = (("more", result.typical(expert, 3)), ("less", result.typical(expert, 2, more=False)))
        if words := [f"{sign} {_list(some)}" for sign, some in signs if some]:
            parts.append(f"by {categories.word} {', '.join(words)}")
    if found.items is not None and (liked := found.items.typical(expert, 3)):
        parts.append(f"typical items are {', '.join(one.name for one in liked)}")
    parts = parts or ["nothing in their histories stands out from chance"]
    return f"{start}. Beside the average user: {'; '.join([*parts, *_fame(users, routing, subject)])}."


def _list(found: list[Typical]) -> str:
    words = [f"{one.name} ({one.lift:.1f} times)" for one in found]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _fame(users: np.ndarray, routing: UserRouting, subject: Subject) -> list[str]:
    """How well known the items of these users are, where that sets them apart."""
    counts = subject.counts.numpy()

    def median(rows: np.ndarray) -> float:
        items = routing.histories.select(rows).items
        return float(np.median(counts[items])) if len(items) else 0.0

    mine, everyone = median(users), median(np.arange(len(routing.first)))
    if abs(mine - everyone) < _CLEARLY * everyone:
        return []
    known = f"{'less' if mine < everyone else 'better'} known items (seen {mine:,.0f} times in training, "
    return [f"{known}those of all users {everyone:,.0f} times; medians)"]


def _kinds(categories: Categories, result: Contrast, routing: UserRouting) -> Iterator[Block]:
    yield Heading(f"Kinds of items, by {categories.word}")
    columns = np.arange(min(len(result.names), _MOST_KINDS))
    columns = columns[result.overall[columns] > 0.005]  # the ratio of what hardly occurs says nothing
    if not len(columns):
        yield Paragraph("No kind makes up more than half a percent of the histories.", "note")
        return
    if all(name.endswith("0s") and name[:-1].isdigit() for name in result.names):  # decades
        columns = columns[np.argsort([result.names[column] for column in columns.tolist()])]
    names = [result.names[column][:24] for column in columns.tolist()]
    described = np.flatnonzero(routing.group_sizes >= LEAST_USERS)
    shown = np.ix_(described, columns)
    clear = np.abs(result.z[shown]) >= result.threshold
    experts = [str(expert + 1) for expert in described.tolist()]
    svg = ratios(names, experts, result.lift[shown].T, clear.T, "expert of first choice")
    caption = (
        f"How often items of each {categories.word} are in the histories of an expert's users, as a multiple of the "
        "average user (1.0 = as often, 2.0 = twice as often). Bold on orange: more, bold on blue: less, both beyond "
        f"chance; pale: no more than random deals show. The most frequent {len(columns)} are shown."
    )
    name = "".join(c if c.isascii() and c.isalnum() else "-" for c in categories.field.lower()) or "field"
    yield Picture(f"expert-{name}", svg, f"Items by {categories.word} and expert", caption)


def _items(result: Contrast, routing: UserRouting) -> Iterator[Block]:
    yield Heading("Items most typical of each expert's users")
    lines = tuple(
        (str(expert + 1), one.name, f"{one.users} ({one.users / size:.0%})", f"{one.lift:.1f}")
        for expert, size in enumerate(routing.group_sizes.tolist())
        for one in result.typical(expert)
    )
    if lines:
        header = ("expert", "item", "users with it (share of the expert's)", "times the average")
        yield Table(header, lines, wide=frozenset({0, 1}))
    else:
        yield Paragraph("No item stands out beyond chance for any expert.", "note")


def _method(found: Contrasts) -> str:
    text = (
        "How this was found: each test user counts for the expert of first choice, with the newest items that the "
        f"router reads. Experts that are first choice of at least {LEAST_USERS} users are described. What counts as "
        "more or less deviates further than anything does in 19 of 20 random deals of the same users to groups of the "
        "same sizes (200 deals)"
    )
    if found.items is not None:
        text += f"; {len(found.items.names):,} items that enough users have were looked at"
    return text + ". The router was trained to recommend, not to sort users: these are tendencies, not rules."
