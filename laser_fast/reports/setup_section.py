"""What a reader needs to do the run again: data, split, score, the recommender's states, environment, configuration."""

from typing import Any

from laser_fast.reports.document import Block, Heading, Listing, Paragraph, Section, Table
from laser_fast.reports.run_record import RunRecord
from laser_fast.reports.score_terms import score_blocks
from laser_fast.reports.states import state_blocks
from laser_fast.reports.subject import Subject


def setup_section(record: RunRecord, subject: Subject | None) -> Section:
    """Section 6."""
    blocks: list[Block] = [Heading("Data")]
    if subject is None:
        blocks.append(Paragraph("The data set was not read, as there is no model to measure on it.", "note"))
    else:
        manifest = subject.dataset.manifest
        facts: list[tuple[str, Any]] = [("format", manifest.format)]
        facts += [("source", f"{source.name}, SHA-256 {source.sha256[:16]}…") for source in manifest.sources]
        facts += [(name.replace("_", " "), f"{count:,}") for name, count in sorted(manifest.counts.items())]
        facts += [(name.replace("_", " "), value) for name, value in sorted(manifest.filters.items())]
        facts += [
            ("tie rule", manifest.tie_rule),
            ("split", subject.split.rule),
            ("split hash", subject.split.hash),
            ("data set hash", manifest.dataset_hash),
            ("training / validation / test rows", _rows(subject)),
        ]
        blocks.append(_facts(facts))
    blocks += score_blocks(subject)
    blocks += state_blocks(record, subject)
    blocks.append(Heading("Environment of the training"))
    environment = dict(record.environment)
    if environment:
        versions = environment.pop("versions", {})
        commit = environment.pop("commit", None)
        facts = [("commit", commit or "not known (installed package)"), *environment.items(), *sorted(versions.items())]
        facts.append(("finished", record.finished or "no"))
        blocks.append(_facts(facts))
    else:
        blocks.append(Paragraph("The run has no environment.json.", "note"))
    blocks += [Heading("Effective configuration"), Listing(record.config_text)]
    return Section("Configuration, data, environment", tuple(blocks))


def _rows(subject: Subject) -> str:
    split = subject.split
    return f"{len(split.train.items):,} events / {len(split.valid):,} users / {len(split.test):,} users"


def _facts(facts: list[tuple[str, Any]]) -> Table:
    return Table(
        ("", ""), tuple((name, "-" if value is None else str(value)) for name, value in facts), wide=frozenset({0, 1})
    )
