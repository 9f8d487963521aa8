"""The report of a run: whole, self-contained, safe with any text, and a sentence where something is missing."""

import importlib.util
import json
import re
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from laser_fast.config import LaserConfig, build_config
from laser_fast.data.items import ItemTable
from laser_fast.evaluation import evaluate
from laser_fast.evaluation.comparison import compare
from laser_fast.reports import Subject, check_report_folder, read_run, write_report
from laser_fast.reports.document import Paragraph, Table
from laser_fast.reports.experts import route_users
from laser_fast.reports.experts_section import expert_blocks
from laser_fast.reports.subject import Epoch, RunRecord
from laser_fast.reports.training_section import loss_terms, training_blocks

pytest.importorskip("matplotlib")

_EMPTY_TAGS = {"meta", "img", "br", "link"}
_EVIL = '<script>alert("1 & 2")</script> | **x**'
DATE = "2026-01-01 00:00 UTC"


class Page(HTMLParser):
    """Tags, sources and text of a page; refuses what is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in _EMPTY_TAGS:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data + "\n"


def train(settings: dict[str, Any], output: Path) -> Subject:
    from laser_fast.laser.build import training_counts
    from laser_fast.training.train import train_laser

    config = build_config(LaserConfig, settings | {"output": str(output)})
    model, inputs = train_laser(config, progress=False)
    counts = torch.from_numpy(training_counts(inputs.split, model.num_items))
    tables = inputs.tables(config.evaluation)
    return Subject(model, inputs.dataset, inputs.split, counts, inputs.recommender, tables, 16)


@pytest.fixture(scope="module")
def run(
    tiny_lm: Path, tiny_data: Path, tiny_recommender: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Subject]:
    """A run in all stages, and what a report of it is about."""
    settings: dict[str, Any] = {
        "data": str(tiny_data),
        "recommender": str(tiny_recommender),
        "lm": {"path": str(tiny_lm)},
        "prompt": {"user_template": "{history}", "separator": ",", "max_items": 4},
        "mformer": {"width": 16, "num_layers": 1, "num_heads": 2, "num_experts": 3, "num_queries": 2, "max_history": 4},
        "text": {"residual": False},
        "training": {
            "batch_size": 16,
            "pretrain": {"epochs": 1, "rows_per_epoch": 32},
            "phase_a": {"epochs": 2, "rows_per_epoch": 32},
            "phase_b": {"epochs": 1, "rows_per_epoch": 32},
        },
    }
    folder = tmp_path_factory.mktemp("reported") / "run"
    return folder, train(settings, folder)


@pytest.fixture(scope="module")
def evil(run: tuple[Path, Subject]) -> Subject:
    """The same with titles that would do harm."""
    items = run[1].dataset.items
    titles = [f"{_EVIL} {index}" for index in range(len(items))]
    table = ItemTable(items.ids, {"title": titles, "kind": ["a|<b>", "c"] * 12 + ["a"]})
    return replace(run[1], dataset=replace(run[1].dataset, items=table))


@pytest.fixture(scope="module")
def report(run: tuple[Path, Subject], evil: Subject, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its report."""
    target = tmp_path_factory.mktemp("report") / "report"
    write_report(read_run(run[0]), evil, target, date=DATE)
    return target


def test_one_file_holds_everything_and_fetches_nothing(report: Path) -> None:
    page = Page((report / "report.html").read_text(encoding="utf-8"))
    assert "script" not in page.tags and "link" not in page.tags and "iframe" not in page.tags
    assert page.sources and all(source.startswith(("data:image/svg+xml;base64,", "#s")) for source in page.sources)
    assert "url(" not in (report / "report.html").read_text(encoding="utf-8")
    assert page.tags.count("h2") == 6
    assert page.tags.count("img") == len(list(report.glob("*.svg"))) >= 7


def test_titles_are_text_and_nothing_else(report: Path) -> None:
    page = Page((report / "report.html").read_text(encoding="utf-8"))
    assert _EVIL in page.text
    markdown = (report / "report.md").read_text(encoding="utf-8")
    assert "<script" not in markdown and "<b>" not in markdown
    assert r"&lt;script&gt;alert(" in markdown and r"\| \*\*x\*\*" in markdown


def test_pictures_of_the_markdown_lie_beside_it(report: Path) -> None:
    names = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", (report / "report.md").read_text(encoding="utf-8"))
    assert sorted(names) == sorted(file.name for file in report.glob("*.svg"))
    assert {"loss-pretrain.svg", "loss-phase-a.svg", "validation.svg", "expert-load.svg", "expert-users.svg"} <= set(
        names
    )


def test_figures_are_those_of_the_evaluation(run: tuple[Path, Subject], report: Path) -> None:
    folder, subject = run
    text = Page((report / "report.html").read_text(encoding="utf-8")).text
    value = evaluate(subject.scorer, subject.split.test)["NDCG@10"]
    assert f"{value.mean:.4f} ± {value.ci95:.4f}" in text
    kept = json.loads((folder / "checkpoint" / "laser.json").read_text())["facts"]
    assert f"validation NDCG@10 {kept['validation']['NDCG@10']:.4f}" in text
    assert "SASRec, calibrated" in text and "zero-shot LM" in text
    assert subject.model.calibration is not None
    for term, weight in subject.model.calibration.calibration.weights.items():
        assert re.search(rf"{term}\s+{re.escape(f'{weight:.3g}')}\s", text)
    for fact in (
        subject.split.hash,
        subject.split.rule,
        "temperature: 0.05",
        "30",
        f"{len(subject.split.test)} test users",
    ):
        assert fact in text


def test_the_lines_beside_laser_are_those_of_compare(run: tuple[Path, Subject], report: Path) -> None:
    _, subject = run
    arguments = (subject.model, subject.split, subject.counts, subject.recommender)
    assert set(subject.tables) == {"rules", "neighbors"}
    (line,) = re.findall(
        r"^\| no-training fusion \|.*$", (report / "report.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    fused = compare(*arguments, tables=subject.tables, batch_size=16).metrics["no-training fusion"]["NDCG@10"]
    without = compare(*arguments, tables={}, batch_size=16).metrics["no-training fusion"]["NDCG@10"]
    assert f"{fused.mean:.4f} ± {fused.ci95:.4f}" in line
    assert f"{without.mean:.4f} ± {without.ci95:.4f}" not in line


def test_the_same_run_gives_the_same_bytes_but_the_date(
    run: tuple[Path, Subject], evil: Subject, report: Path, tmp_path: Path
) -> None:
    again = tmp_path / "again"
    shutil.copytree(report, again)
    (again / "old.svg").write_text("of an earlier report, which is replaced")
    write_report(read_run(run[0]), evil, again, date="another day")
    assert sorted(file.name for file in again.iterdir()) == sorted(file.name for file in report.iterdir())
    for file in report.iterdir():
        assert (again / file.name).read_bytes() == file.read_bytes().replace(DATE.encode(), b"another day")


def test_a_run_that_stopped_early_has_a_report(run: tuple[Path, Subject], tmp_path: Path) -> None:
    broken = tmp_path / "run"
    shutil.copytree(run[0], broken)
    for name in ("finished.json", "environment.json"):
        (broken / name).unlink()
    log = (broken / "metrics.jsonl").read_text().splitlines()
    (broken / "metrics.jsonl").write_text(log[0] + "\n" + log[1][:20])  # killed while it wrote
    text = written(read_run(broken), run[1], tmp_path / "a")
    assert "The run did not come to its end" in text and "no environment.json" in text
    assert "Stage 2, phase A: this run has no epoch of it" in text
    shutil.rmtree(broken / "checkpoint")
    (broken / "metrics.jsonl").unlink()
    text = written(read_run(broken), None, tmp_path / "b")
    for sentence in (
        "stopped before its first checkpoint",
        "no finished epoch",
        "There is no model to measure",
        "no epoch with",
    ):
        assert sentence in text


def test_a_run_with_little_in_it_has_a_report(
    tiny_settings: dict[str, Any], run: tuple[Path, Subject], tmp_path: Path
) -> None:
    stages = {"pretrain": {"epochs": 0}, "phase_a": {"epochs": 1, "rows_per_epoch": 16}, "phase_b": {"epochs": 0}}
    settings = tiny_settings | {
        "recommender": None,
        "bituning": {"prefix": "shared"},
        "evaluation": {"calibrate": False},
    }
    settings["training"] = {"batch_size": 16, **stages}
    subject = train(settings, tmp_path / "run")
    text = written(read_run(tmp_path / "run"), subject, tmp_path / "report")
    for sentence in (
        "This run has no M-Former (bituning.prefix is shared)",
        "Stage 1: this run has no epoch of it",
        "a single epoch, so a single point",
        "this run fitted no calibrated score",
        "This run has no ID-based recommender to stand beside; ItemKNN takes its place",
    ):
        assert sentence in text


def test_users_are_routed_as_the_model_routes_them(run: tuple[Path, Subject]) -> None:
    model, histories = run[1].model, run[1].split.test.histories
    routing = route_users(model, histories, batch_size=7)
    _, _, expected = model.write_prefix(model.builder.histories(histories))
    assert expected is not None
    assert routing.expert.tolist() == expected.expert.tolist()
    assert torch.allclose(torch.from_numpy(routing.weight), expected.weight.double(), atol=1e-6)
    assert routing.histories.to_lists() == [row[-4:] for row in histories.to_lists()]  # mformer.max_history
    assert routing.weight_share.sum() == pytest.approx(1.0)
    without = SimpleNamespace(mformer=None, recommender=None)
    with pytest.raises(ValueError, match="route_users: the model must have an M-Former, got none"):
        route_users(without, histories, batch_size=7)  # type: ignore[arg-type]


def test_a_single_expert_is_not_compared(run: tuple[Path, Subject]) -> None:
    record = read_run(run[0])
    single = replace(record, config={**record.config, "mformer": {**record.config["mformer"], "num_experts": 1}})
    (said,) = expert_blocks(single, run[1], None)
    assert isinstance(said, Paragraph) and "a single expert" in said.text


def test_only_a_report_is_replaced(
    run: tuple[Path, Subject],
    claimed_elsewhere: Callable[[Path], AbstractContextManager[None]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(
        FileExistsError, match=r"must be a new folder or one with an earlier report, got .*'thesis.tex'"
    ):
        write_report(read_run(run[0]), None, tmp_path)
    with pytest.raises(FileExistsError, match="earlier report"):
        check_report_folder(tmp_path / "thesis.tex")
    (tmp_path / "report").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError, match=r"the output must be a folder, got the link '.*/report'; remove it"):
        write_report(read_run(run[0]), None, tmp_path / "report")
    with claimed_elsewhere(tmp_path / "new"), pytest.raises(ValueError, match="one process at a time, got '.*/new'"):
        write_report(read_run(run[0]), None, tmp_path / "new")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    assert not (tmp_path / "elsewhere").exists() and not (tmp_path / "new").exists()
    found = importlib.util.find_spec
    for package in ("matplotlib", "jinja2"):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else found(name))
        with pytest.raises(ImportError, match=rf'needs the package {package}, got none; pip install "laser-fast\[rep'):
            check_report_folder(tmp_path / "new")


def test_the_command(run: tuple[Path, Subject], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from laser_fast.cli import main

    assert main(["report", str(run[0])]) == 0
    assert (run[0] / "report" / "report.html").is_file()
    assert f"written to {run[0] / 'report' / 'report.html'}" in capsys.readouterr().out
    assert main(["report", str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    assert "a run of `laser-fast train` must be given" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_losses_of_any_stage_are_found(run: tuple[Path, Subject]) -> None:
    record: RunRecord = read_run(run[0])
    assert loss_terms(record.of_stage("pretrain"))[0] == "loss"
    assert "contrastive" in loss_terms(record.of_stage("pretrain"))
    line = {"loss": 3.0, "terms": 2.9, "matching": 0.6, "matching_accuracy": 0.5, "validation_matching": 0.7, "step": 4}
    assert loss_terms([Epoch("pretrain", 1, line)]) == ["loss", "matching"]
    assert "cross_entropy" in loss_terms(record.of_stage("phase_a"))
    assert not {"load", "step", "best", "epoch"} & set(loss_terms(record.of_stage("phase_a")))


def written(record: RunRecord, subject: Subject | None, folder: Path) -> str:
    """Text of the page."""
    return Page(write_report(record, subject, folder, date=DATE).read_text(encoding="utf-8")).text


def test_the_text_stage_has_its_curve_and_stays_out_of_the_validation(run: tuple[Path, Subject]) -> None:
    record = read_run(run[0])
    quality = "validation_NDCG@10_without_history"
    steps = [{"loss": 2.0 - number, "step": 4 * number, quality: 0.9, "text_tokens_per_s": 1e9} for number in (1, 2)]
    stage = tuple(Epoch("text", number, values) for number, values in enumerate(steps, start=1))
    with_text = replace(record, epochs=stage + record.epochs, config={**record.config, "text": {"residual": True}})
    *_, table = told = list(training_blocks(with_text))
    blocks = {getattr(block, "name", ""): block for block in told}
    assert "Text stage: the text residual alone" in blocks["loss-text"].caption
    assert "Loss from 1.000 to 0.000." in blocks["loss-text"].caption
    assert "the text residual makes anew in every step" in blocks["loss-phase-a"].caption
    before = {getattr(block, "name", ""): block for block in training_blocks(record)}
    assert "loss-text" not in before and "encoded anew for every epoch" in before["loss-phase-a"].caption
    assert blocks["validation"] == before["validation"] and blocks["speed"] == before["speed"]
    assert isinstance(table, Table) and [row[0] for row in table.rows[:2]] == ["T1", "T2"]
    assert table.caption.startswith("T: the text stage, P: stage 1")
