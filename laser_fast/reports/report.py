"""The report of a run: measure, put into words, write one HTML file and one of Markdown with its plots beside it."""

from datetime import datetime, timezone
from pathlib import Path

from laser_fast.evaluation.comparison import compare
from laser_fast.files.claims import claim
from laser_fast.files.folders import replace_directory
from laser_fast.reports.document import Document
from laser_fast.reports.expert_words import experts_section
from laser_fast.reports.experts import UserRouting, route_users
from laser_fast.reports.group_results import groups_section
from laser_fast.reports.html_page import to_html
from laser_fast.reports.markdown_page import to_markdown
from laser_fast.reports.plots import require_matplotlib
from laser_fast.reports.run_record import RunRecord
from laser_fast.reports.samples import samples_section
from laser_fast.reports.setup_section import setup_section
from laser_fast.reports.subject import Subject
from laser_fast.reports.summary import summary
from laser_fast.reports.training_curves import training_section

HTML, MARKDOWN = "report.html", "report.md"


def write_report(record: RunRecord, subject: Subject | None, folder: str | Path, *, date: str | None = None) -> Path:
    """Write `report.html` (everything in one file), `report.md` and its plots into a folder, whole or not at all.

    Args:
        record: the run's own files.
        subject: the model that was kept, with its data; None where the run has none yet.
        folder: new or empty, or holding an earlier report, which is replaced.
        date: in the report; None = now. Nothing else differs between two reports of one run.

    Returns:
        The HTML file.

    Raises:
        FileExistsError: the folder holds something else, or is a link.
        ValueError: another process writes it.
        ImportError: matplotlib is missing.
    """
    target = Path(folder)
    with claim(target):
        check_report_folder(target)
        document = build_report(record, subject, date or datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"))
        _write(document, target)
    return target / HTML


def _write(document: Document, target: Path) -> None:
    with replace_directory(target) as fresh:
        (fresh / HTML).write_text(to_html(document), encoding="utf-8")
        (fresh / MARKDOWN).write_text(to_markdown(document), encoding="utf-8")
        for picture in document.pictures():
            (fresh / f"{picture.name}.svg").write_bytes(picture.svg)


def check_report_folder(folder: Path) -> None:
    """Refuse what cannot be written, before minutes of measuring.

    Raises:
        FileExistsError: the folder holds something that is no report, or is a link to one elsewhere.
        ImportError: matplotlib is missing.
    """
    require_matplotlib()
    if folder.is_symlink():
        raise FileExistsError(f"write_report: the output must be a folder, got the link {str(folder)!r}; remove it")
    if not folder.exists():
        return
    others = [] if folder.is_dir() else [folder.name]
    if folder.is_dir():
        others = sorted(f.name for f in folder.iterdir() if f.name not in (HTML, MARKDOWN) and f.suffix != ".svg")
    if others:
        raise FileExistsError(
            f"write_report: the output must be a new folder or one with an earlier report, got {str(folder)!r} "
            f"with {others[0]!r} in it"
        )


def build_report(record: RunRecord, subject: Subject | None, date: str) -> Document:
    """Measure the model on the test users and put everything into words and pictures."""
    comparison = routing = None
    if subject is not None and len(subject.split.test):
        comparison = compare(
            subject.model,
            subject.split,
            subject.counts,
            subject.recommender,
            tables=subject.tables,
            batch_size=subject.batch_size,
        )
        routing = _route(subject)
    sections = (
        summary(record, subject, comparison),
        training_section(record),
        experts_section(record, subject, routing),
        groups_section(subject, comparison),
        samples_section(subject, routing),
        setup_section(record, subject),
    )
    return Document(f"Laser: report of the run “{record.name}”", date, sections)


def _route(subject: Subject) -> UserRouting | None:
    if subject.model.mformer is None:
        return None
    return route_users(subject.model, subject.split.test.histories, batch_size=subject.batch_size)
