"""What the benchmarks rest on: clocks that measure what they say, baselines that compute what the library computes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import bench_dispatch
import bench_mformer
import bench_routing
import pytest
import timing
import torch
from baselines.routing_loop import routing_loop
from baselines.routing_packed import mean_index_add, mean_segment_reduce, routing_rounds, routing_topk
from forms import PASSES, Form, assert_agreement, compile_forms, fresh_leaves, one_pass, relative_error
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from workloads import DISPATCH, ROUTING, Workload

from laser_fast.ops import cu_seqlens_from_lengths
from laser_fast.ops.routing import route_experts_reference


class Device:
    """Time passes where a test says so; every call is written down."""

    def __init__(self) -> None:
        self.now_ms = 0.0
        self.calls: list[str] = []

    def does(self, name: str, *durations_ms: float) -> timing.Run:
        durations = iter(durations_ms)

        def run() -> None:
            self.calls.append(name)
            self.now_ms += next(durations, 0.0)

        return run

    def new_event(self) -> timing.Event:
        event = SimpleNamespace(at_ms=None)

        def record() -> None:
            event.at_ms = self.now_ms

        def elapsed_time(end: SimpleNamespace) -> float:
            assert self.calls[-1] == "synchronize", "an event was read before the device had passed it"
            return end.at_ms - event.at_ms

        event.record, event.elapsed_time = record, elapsed_time
        return event


def test_cold_clock_flushes_before_every_run_and_does_not_count_it() -> None:
    device = Device()
    clock = timing.cold_clock(device.new_event, device.does("synchronize"), device.does("flush", 7, 7, 7), batch=3)
    assert clock(device.does("run", 1, 9, 2)) == pytest.approx(2e-3)  # the median
    assert device.calls == ["flush", "run"] * 3 + ["synchronize"]


def test_warm_clock_runs_back_to_back() -> None:
    device = Device()
    clock = timing.warm_clock(device.new_event, device.does("synchronize"), batch=3)
    assert clock(device.does("run", 1, 9, 2)) == pytest.approx(4e-3)  # the mean
    assert device.calls == ["run"] * 3 + ["synchronize"]


def test_wall_clock_starts_and_ends_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()
    monkeypatch.setattr(timing, "perf_counter", lambda: device.now_ms / 1e3)
    clock = timing.wall_clock(device.does("synchronize", 100, 3), device.does("flush", 7))
    assert clock(device.does("run", 2)) == pytest.approx(5e-3)
    assert device.calls == ["flush", "synchronize", "run", "synchronize"]


@pytest.mark.parametrize(("round_s", "expected"), [(1e-9, 50), (0.1, 10), (1.0, 5), (0.0, 50)])
def test_rounds_within(round_s: float, expected: int) -> None:
    assert timing.rounds_within(1.0, round_s) == expected


def test_interleaved_medians_take_turns() -> None:
    calls: list[str] = []
    durations = {"ours": iter([1.0, 5.0, 2.0, 2.0, 9.0]), "theirs": iter([4.0, 4.0, 4.0, 8.0, 8.0])}
    medians = timing.interleaved_medians(
        {name: lambda name=name: calls.append(name) or name for name in durations},
        lambda run: next(durations[str(run())]),
        budget_s=1.0,
    )
    assert medians == {"ours": 2.0, "theirs": 4.0}
    assert calls == ["ours", "theirs"] * 6  # a warm-up and five rounds


def test_capture_builds_warms_up_and_records_on_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    current = ["default"]

    @contextmanager
    def on(stream: SimpleNamespace, note: str) -> Iterator[None]:
        before, current[0] = current[0], stream.name
        log.append(note)
        yield
        current[0] = before

    names = iter(["side", "another"])

    def new_stream() -> SimpleNamespace:
        return SimpleNamespace(name=next(names), wait_stream=lambda other: log.append(f"wait for {other}"))

    monkeypatch.setattr(torch.cuda, "Stream", new_stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: on(stream, "enter"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: log.append("replay")))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: on(stream, "capture"))

    def build() -> timing.Run:
        log.append(f"build on {current[0]}")
        return lambda: log.append(f"run on {current[0]}")

    captured = timing.Captured(build)
    warm_up = ["wait for default", "enter", "build on side", *["run on side"] * 3, "synchronize"]
    assert log == [*warm_up, "capture", "run on side", "synchronize"]
    log.clear()
    captured()
    assert log == ["replay"]


def test_cases() -> None:
    for cases in (ROUTING, DISPATCH):
        names = [str(case) for case in cases]
        assert len(set(names)) == len(names)
        graphs = {"gpu-small-graph", "gpu-small-graph-warm", "gpu-large-graph"}
        assert {name for name in names if "graph" in name} == graphs
    large = next(case.workload for case in ROUTING if case.name == "gpu-large")
    assert large.users * large.items == 409_600


def test_relative_error_is_of_the_worst_row() -> None:
    exact = torch.ones(1000, 4)
    actual = exact.clone()
    actual[7] *= 1.5
    assert relative_error(actual, exact) == pytest.approx(0.5)
    assert relative_error(torch.tensor(3.0), torch.tensor(2.0)) == pytest.approx(0.5)


def _square(values: Tensor) -> Tensor:
    return values * values


def test_passes() -> None:
    leaf = torch.tensor([1.0, -2.0], requires_grad=True)
    forward, backward, both = (one_pass(name, _square, [leaf])() for name in PASSES)
    assert torch.equal(forward, leaf * leaf)
    assert torch.equal(backward[0], both[0]) and backward[0].norm() > 0


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        (lambda values: _square(values) * torch.tensor([[1.0], [1.01]]), "one: result 0 is off by 1.0e-02 in one row"),
        (lambda values: _square(values.detach()) + 0 * values, "one: gradient 0 is off"),
    ],
)
def test_forms_that_disagree_are_not_timed(wrong: Callable[[Tensor], Tensor], complaint: str) -> None:
    leaf = torch.tensor([[1.0, -2.0], [3.0, 4.0]], requires_grad=True)
    assert_agreement(Form(_square, [leaf]), {"one": Form(lambda values: values**2, [leaf])})
    with pytest.raises(AssertionError, match=complaint):
        assert_agreement(Form(_square, [leaf]), {"one": Form(wrong, [leaf])})


_FORMS = [bench_routing.routing_forms, bench_dispatch.dispatch_forms, bench_dispatch.combine_forms]
_FORMS += [bench_mformer.bookkeeping_forms]
_FormsOf = Callable[[Workload], tuple[Form, dict[str, Form], dict[str, Form]]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("forms", _FORMS, ids=lambda forms: forms.__name__)
def test_all_forms_agree(forms: _FormsOf, dtype: torch.dtype) -> None:
    candidate, others, strongest = forms(Workload("cpu", 6, 5, 16, 2, dtype, experts=5, top_k=2))
    assert_agreement(candidate, others | strongest)
    if forms is bench_routing.routing_forms:
        bench_routing.assert_choices(candidate, others | strongest)
    for form in (candidate, *others.values(), *strongest.values()):  # on inputs of its own, as it is timed
        for name in PASSES:
            one_pass(name, form.function, form.inputs)()


@pytest.mark.parametrize("forms", _FORMS, ids=lambda forms: forms.__name__)
def test_strongest_forms_compile_whole_and_run_in_every_pass(forms: _FormsOf) -> None:
    candidate, _, strongest = forms(Workload("cpu", 6, 5, 16, 2, torch.bfloat16, experts=5, top_k=2))
    compiled = compile_forms(strongest, backend="aot_eager")  # traces everything, generates no code
    assert [name.removeprefix("compiled_") for name in compiled] == list(strongest)
    assert_agreement(candidate, compiled)
    for form in compiled.values():
        for name in PASSES:
            run = one_pass(name, form.function, fresh_leaves(form.inputs))
            run(), run()


def test_routing_baselines_with_histories_of_different_length() -> None:
    """The benchmarks have no padding; the baselines are right with it, too."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([3, 1, 7, 2])
    states = torch.randn(int(lengths.sum()), 16, generator=generator)
    weight, bias = torch.randn(5, 16, generator=generator), torch.randn(5, generator=generator)
    cu_seqlens = cu_seqlens_from_lengths(lengths)
    padded = pad_sequence(states.split(lengths.tolist()), batch_first=True, padding_value=9.0)
    mask = (torch.arange(7) < lengths.unsqueeze(1)).long()
    expected = route_experts_reference(states, weight, bias, cu_seqlens, 2)
    for result in (
        routing_loop(padded, weight, bias, mask, 2),
        routing_topk(states, weight, bias, cu_seqlens, 2),
        routing_rounds(states, weight, bias, cu_seqlens, 2, mean_index_add),
        routing_rounds(states, weight, bias, cu_seqlens, 2, mean_segment_reduce),
    ):
        torch.testing.assert_close(result[:3], (expected.weight, expected.pooled, expected.balance_loss))
        assert torch.equal(result[3].int(), expected.expert)
