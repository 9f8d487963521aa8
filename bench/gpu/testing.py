"""pytest in the process of an item: chosen tests or benchmarks, each named line sent when its last test has ended."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from gpu.work import Attention, Found, Work, first_line, recorded_attention

ROOT = Path(__file__).resolve().parents[2]
_OPTIONS = ("--import-mode=importlib", "-p", "no:cacheprovider", "-q")
_OPTIONS += ("--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"))
_EXTRA = "extra_info"


@dataclass
class Outcome:
    """How a test ended ("passed", "failed" or "skipped") and in a line why, where it did not pass."""

    test: str
    status: str = "passed"
    reason: str = ""
    extra: dict[str, Any] = field(default_factory=dict)  # what a benchmark recorded
    attention: Counter[str] = field(default_factory=Counter)  # calls of packed attention by backend


Group = Callable[[str], "str | None"]  # id of a test -> name of its line, None where the test is not wanted
Summary = Callable[[list[Outcome]], Found]  # the outcomes of a line's tests -> the line


class Lines:
    """A plugin that picks tests, in the order of their lines, and sends a line when all of its tests are done.

    Args:
        most: tests of a line; more are left out, evenly.
        attention: see `Work.measure`.
    """

    def __init__(self, work: Work, group: Group, summary: Summary, *, most: int | None, attention: Attention) -> None:
        self._work, self._group, self._summary = work, group, summary
        self._most, self._attention = most, attention
        self._expected: Counter[str] = Counter()
        self._outcomes: dict[str, Outcome] = {}
        self._done: dict[str, list[Outcome]] = {}
        self._start: dict[str, float] = {}
        self.unusable: dict[str, str] = {}  # files that cannot be collected

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Keep the tests of wanted lines."""
        by_name: dict[str, list[pytest.Item]] = {name: [] for name in self._work.wanted}
        for item in items:
            name = self._group(item.nodeid)
            if name in by_name:
                by_name[name].append(item)
        kept = [item for tests in by_name.values() for item in evenly(tests, self._most)]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
        items[:] = kept

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Count what a line is made of."""
        self._expect([item.nodeid for item in session.items])

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any, ids: Sequence[str]) -> None:
        """The same where other processes collect; all of them have the same tests."""
        if not self._expected:
            self._expect(ids)

    def _expect(self, tests: Sequence[str]) -> None:
        self._expected = Counter(name for test in tests if (name := self._group(test)) is not None)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be imported costs its own lines alone."""
        if report.failed:
            self.unusable[report.nodeid] = _last_line(report)

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Which attention runs inside a test."""
        with recorded_attention() as counts:
            self._outcome(item.nodeid).attention = counts
            yield

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item: Any, call: Any) -> Iterator[None]:
        """What a benchmark recorded goes along with its report."""
        result: Any = yield
        benchmark = getattr(item, "funcargs", {}).get("benchmark")
        if benchmark is not None and call.when == "call":
            result.get_result().user_properties.append((_EXTRA, dict(benchmark.extra_info)))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """A line begins with the first of its tests."""
        name = self._group(nodeid)
        if name is not None and name not in self._start:
            self._start[name] = self._work.start(name)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Put together what set-up, call and tear-down say; the line is sent after the last of them."""
        outcome, name = self._outcome(report.nodeid), self._group(report.nodeid)
        outcome.extra |= dict(report.user_properties).get(_EXTRA, {}) if report.when == "call" else {}
        if report.outcome != "passed" and outcome.status != "failed":
            outcome.status = report.outcome
            outcome.reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else _last_line(report)
        if report.when != "teardown" or name is None:
            return
        done = self._done.setdefault(name, [])
        done.append(outcome)
        if len(done) == self._expected[name] and name in self._work.wanted:
            self._send(name, done)

    def _outcome(self, test: str) -> Outcome:
        return self._outcomes.setdefault(test, Outcome(test))

    def _send(self, name: str, done: list[Outcome]) -> None:
        counts: Counter[str] = sum((outcome.attention for outcome in done), Counter())
        failed = [outcome for outcome in done if outcome.status == "failed"]
        skipped = [outcome for outcome in done if outcome.status == "skipped"]
        found, status = Found(None, ""), "ok"
        if failed:
            test = failed[0].test.rpartition("::")[2]
            found = Found(None, "", more={"failed": {outcome.test: outcome.reason for outcome in failed}})
            status = f"failed: {len(failed)} of {len(done)}: {test}: {failed[0].reason}"
        elif len(skipped) == len(done):
            status = f"skipped: {skipped[0].reason.removeprefix('Skipped: ')}"
        else:
            try:
                found = self._summary(done)
            except Exception as error:
                status = f"failed: {type(error).__name__}: {first_line(error)}"
        start = self._start.get(name) or self._work.start(name)
        self._work.finish(name, found, status, start, attention=self._attention, counts=counts)


def evenly(tests: Sequence[Any], most: int | None) -> list[Any]:
    """At most so many of them, from all over the list."""
    if most is None or len(tests) <= most:
        return list(tests)
    return [tests[index * len(tests) // most] for index in range(most)]


def _last_line(report: Any) -> str:
    """What went wrong: the message of the crash, or the end of the text."""
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash is not None else str(report.longrepr or "no message")
    said = [line for line in text.strip().splitlines() if line.strip()] or ["no message"]
    return first_line(Exception(said[0] if crash is not None else said[-1].removeprefix("E").strip()))


def run_tests(
    work: Work,
    files: Mapping[str, str],
    group: Group,
    summary: Summary,
    *,
    options: Sequence[str] = (),
    most: int | None = None,
    attention: Attention = "none",
) -> None:
    """Make lines from tests; one whose file is there and has no such test is a failed line.

    Args:
        files: where the tests of a line are, by its name, from the root of the checkout; not all are wanted.
        options: more words for pytest.
        most, attention: see `Lines`.
    """
    files = {name: file for name, file in files.items() if name in work.wanted}
    there = [file for file in dict.fromkeys(files.values()) if (ROOT / file).exists()]
    lines = Lines(work, group, summary, most=most, attention=attention)
    if there:
        pytest.main([*_OPTIONS, *options, *(str(ROOT / file) for file in there)], plugins=[lines])
    for name, file in files.items():
        if name in work.wanted:
            why = lines.unusable.get(file, "no such test")
            status = f"failed: {why}" if file in there else f"skipped: no {file}"
            work.finish(name, Found(None, ""), status, work.start(name), counts=Counter())
