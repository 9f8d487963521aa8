"""The head of a report: what was trained on what, and how good it is, in plain words and one table."""

from laser_fast.evaluation.comparison import LASER, ZERO_SHOT, Comparison
from laser_fast.evaluation.metrics import paired_difference
from laser_fast.reports.document import Block, Paragraph, Section, Table
from laser_fast.reports.run_record import RunRecord, stage_name
from laser_fast.reports.subject import Subject, rival, verdict, written

_METRIC = "NDCG@10"
_COLUMNS = ("HR@10", "NDCG@10", "MRR")


def summary(record: RunRecord, subject: Subject | None, comparison: Comparison | None) -> Section:
    """Section 1."""
    blocks: list[Block] = []
    if subject is None or comparison is None:
        blocks.append(Paragraph(_what_was_trained(record, None)))
        text = "No model is there to be measured: the run stopped before its first checkpoint. Only its log is shown."
        blocks.append(Paragraph(text, "lead"))
        return Section("In short", tuple(blocks))
    blocks.append(Paragraph(f"{_what_was_trained(record, subject)} {_kept(record)}"))
    blocks.append(Paragraph(_how_good(subject, comparison), "lead"))
    if record.finished is None:
        text = (
            "The run did not come to its end (it has no finished.json): the figures are those of its best model so far."
        )
        blocks.append(Paragraph(text, "note"))
    blocks.append(_systems(subject, comparison))
    blocks.append(Paragraph(_how_to_read(subject), "note"))
    return Section("In short", tuple(blocks))


def _what_was_trained(record: RunRecord, subject: Subject | None) -> str:
    config = record.config
    base = str(config["lm"]["path"]).rstrip("/").split(":")[-1]
    name = next((part for part in base.split("/") if part != "model"), base)
    prefix = config.get("bituning", {}).get("prefix", "mformer")
    mformer = config.get("mformer", {})
    who = {
        "mformer": f"M-Former ({mformer.get('num_experts')} experts, {mformer.get('top_k')} for each user, "
        f"{mformer.get('num_queries')} virtual tokens) writes what an ID-based recommender knows about the user",
        "linear": "a linear map writes what an ID-based recommender knows about the user",
        "shared": "one learned text of virtual tokens, the same for everybody, stands",
        "none": "nothing stands",
    }[prefix]
    place = "in front of the text of the history"
    if subject is None:
        return f"Laser, a recommender around the frozen language model {name}; {who} {place}."
    lm, data = subject.model.lm, subject.dataset
    trained = sum(parameter.numel() for parameter in subject.model.parameters() if parameter.requires_grad)
    recommender = "" if subject.recommender is None else f" ({type(subject.recommender).__name__})"
    who = who.replace("recommender knows", f"recommender{recommender} knows")
    return (
        f"Laser learned to say what a user takes next, from {len(data.item_index):,} interactions of "
        f"{data.num_users:,} users with {data.num_items:,} items. Histories are read as text by the frozen language "
        f"model {name} ({type(lm.model).__name__}, width {lm.hidden_size:,}); {who} {place}. {trained:,} parameters "
        "were trained."
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
    laser = comparison.metrics[LASER]
    hits, other = laser["HR@10"], rival(subject, comparison)
    best = max(
        (name for name in comparison.metrics if not name.startswith(LASER)),
        key=lambda n: comparison.metrics[n][_METRIC].mean,
    )
    parts = [
        f"For {hits.mean:.1%} ± {hits.ci95:.1%} of the {len(laser):,} test users the item that came next is among the "
        f"first ten of {subject.dataset.num_items:,} (HR@10); {_METRIC}, which rewards early places, is "
        f"{written(laser[_METRIC])}."
    ]
    zero = f"{ZERO_SHOT}, calibrated" if subject.model.calibration is not None else ZERO_SHOT
    for name, said in (
        (other, other),
        (zero, f"the untrained language model ({zero})"),
        (best, f"the best other line ({best})"),
    ):
        if name in comparison.metrics and (name != best or best not in (other, zero)):
            difference = paired_difference(laser.ranks, comparison.metrics[name].ranks, _METRIC)
            parts.append(f"Against {said} it is {verdict(difference)}.")
    return " ".join(parts)


def _systems(subject: Subject, comparison: Comparison) -> Table:
    rows = tuple(
        (name, *(written(metrics[column]) for column in _COLUMNS)) for name, metrics in comparison.metrics.items()
    )
    place = list(comparison.metrics).index(LASER)
    caption = (
        f"{len(subject.split.test):,} test users; the whole catalogue is ranked, items of the history not filtered; "
        f"{comparison.rule}; ± are 95% intervals over users."
    )
    return Table(("system", *_COLUMNS), rows, caption, strong=frozenset({place}))


def _how_to_read(subject: Subject) -> str:
    if subject.model.calibration is None:
        return "Laser's score is the cosine of the paper: this run fitted no calibrated score (evaluation.calibrate)."
    return (
        "“calibrated” adds scalars fitted on validation: for items of the history, for the last item, for popularity "
        "and, in Laser's case, the recommender's score, sequential rules and item neighbours. “no-training fusion” is "
        "such a sum without any training of Laser."
    )
