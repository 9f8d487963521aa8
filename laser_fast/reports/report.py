"""The report of a run: measured, put into words, written as one HTML file and as Markdown with its plots beside it."""

import importlib.util
from datetime import datetime, timezone
from pathlib import Path

from laser_fast.evaluation.comparison import compare
from laser_fast.files.atomic import replace_directory
from laser_fast.files.locks import claim
from laser_fast.reports.document import Document, Section, to_html, to_markdown
from laser_fast.reports.experts import route_users
from laser_fast.reports.experts_section import expert_blocks
from laser_fast.reports.results_section import group_blocks, sample_blocks, summary_blocks
from laser_fast.reports.setup_section import setup_blocks
from laser_fast.reports.subject import RunRecord, Subject
from laser_fast.reports.training_section import training_blocks

HTML, MARKDOWN = "report.html", "report.md"
_PACKAGES = ("matplotlib", "jinja2")


def write_report(record: RunRecord, subject: Subject | None, folder: str | Path, *, date: str | None = None) -> Path:
    """Write `report.html`, which holds everything, and `report.md` with its plots into a folder, whole or not at all.

    Args:
        record: the run's own files.
        subject: the model that was kept, with its data; None where the run has none yet.
        folder: new or empty, or holding an earlier report, which is replaced.
        date: in the report; None: now. Nothing else differs between two reports of one run.

    Returns:
        The HTML file.

    Raises:
        FileExistsError, ImportError: As `check_report_folder`.
        ValueError: another process writes it.
    """
    target = Path(folder)
    with claim(target):
        check_report_folder(target)
        document = _measure(record, subject, date or datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"))
        with replace_directory(target) as fresh:
            (fresh / HTML).write_text(to_html(document), encoding="utf-8")
            (fresh / MARKDOWN).write_text(to_markdown(document), encoding="utf-8")
            for picture in document.pictures():
                (fresh / f"{picture.name}.svg").write_bytes(picture.svg)
    return target / HTML


def check_report_folder(folder: Path) -> None:
    """Refuse what cannot be written, before minutes of measuring.

    Raises:
        FileExistsError: the folder holds something that is no report, or is a link.
        ImportError: matplotlib or Jinja2 is missing.
    """
    for package in _PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise ImportError(
                f'write_report: a report needs the package {package}, got none; pip install "laser-fast[report]"'
            )
    if folder.is_symlink():
        raise FileExistsError(f"write_report: the output must be a folder, got the link {str(folder)!r}; remove it")
    if not folder.exists():
        return
    others = [folder.name]
    if folder.is_dir():
        others = sorted(f.name for f in folder.iterdir() if f.name not in (HTML, MARKDOWN) and f.suffix != ".svg")
    if others:
        raise FileExistsError(
            f"write_report: the output must be a new folder or one with an earlier report, got {str(folder)!r} "
            f"with {others[0]!r} in it"
        )


def _measure(record: RunRecord, subject: Subject | None, date: str) -> Document:
    comparison = routing = None
    if subject is not None and len(subject.split.test):
        model, split, batch_size = subject.model, subject.split, subject.batch_size
        comparison = compare(
            model, split, subject.counts, subject.recommender, tables=subject.tables, batch_size=batch_size
        )
        if model.mformer is not None:
            routing = route_users(model, split.test.histories, batch_size=batch_size)
    sections = {
        "In short": summary_blocks(record, subject, comparison),
        "Training": training_blocks(record),
        "What the experts do": expert_blocks(record, subject, routing),
        "Who is served well": group_blocks(subject, comparison),
        "Recommendations of sample users": sample_blocks(subject, routing),
        "Configuration, data, environment": setup_blocks(record, subject),
    }
    title = f"Laser: report of the run “{record.name}”"
    return Document(title, date, tuple(Section(name, tuple(blocks)) for name, blocks in sections.items()))
