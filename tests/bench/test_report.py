"""The report: what is in it, that it comes whole when a section fails, and that its arithmetic is right."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from reporting import cards, kernels, predictions, run, settings, waterfall
from reporting.context import Context, Deadline, run_script
from reporting.document import document, gaps, missed
from reporting.kernels import row_of
from reporting.models import VIRTUAL_TOKENS, PackedStep, floor_operations, load, packed_lengths
from reporting.pictures import draw
from reporting.reasons import Skip, without_paths
from reporting.settings import ON_CPU, ON_GPU, Settings
from roofline import Roofs

TINY = replace(settings.TINY, tokens=(128, 256), waterfall=("llama-tiny", 200))
SECTIONS = ["environment", "roofs", "step", "waterfall", "cards"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """A report of the smallest sizes: its folder, its figures, its text."""
    out = tmp_path_factory.mktemp("report")
    assert run.main([str(out), "--cpu", "--only", *SECTIONS], TINY) == 0
    return out, json.loads((out / "report.json").read_text()), (out / "report.md").read_text()


def test_the_mformer_on_cards_is_the_papers() -> None:
    import laser_fast

    preset = Path(laser_fast.__file__).parent / "presets" / "paper.yaml"
    paper = yaml.safe_load(preset.read_text(encoding="utf-8"))["mformer"]
    for sizes in (ON_GPU, ON_CPU):
        assert {name: paper[name] for name in sizes.card_mformer} == sizes.card_mformer
        assert {"width", "num_layers", "num_queries"} <= set(sizes.card_mformer)


def test_every_section_is_in_the_figures_and_in_the_text(made: Any) -> None:
    _, report, text = made
    assert list(report["sections"]) == SECTIONS
    for name, found in report["sections"].items():
        assert found["status"] == "measured" and found["seconds"] >= 0
        assert f"\n## {name.capitalize()}\n" in text
    assert "\n## What is furthest from its limit\n" in text
    assert report["command"].startswith("python bench/report.py ") and report["command"].endswith(" ".join(SECTIONS))
    assert report["sections"]["environment"]["versions"]["torch"] == torch.__version__


def test_no_path_of_the_machine_is_published(made: Any) -> None:
    out, _, text = made
    for content in (text, (out / "report.json").read_text()):
        assert str(out.parent) not in content and str(Path.home()) + "/" not in content
        assert not re.search(r"(?<![\w./])/(tmp|home|root|work)/", content)


def test_the_step_is_measured_in_every_mode_beside_its_plan(made: Any) -> None:
    found = made[1]["sections"]["step"]
    rows = {(row["weights"], row["checkpointing"], row["tokens"]): row for row in found["rows"]}
    kinds = {"nf4", "none"} if not found["left_out"] else {"none"}
    wanted = {(kind, "none", tokens) for kind in kinds for tokens in TINY.tokens}
    assert wanted | {(min(kinds, key="none".__eq__), mode, 128) for mode in ("mlp", "full")} == set(rows)
    for row in found["rows"]:
        assert row["tokens_per_s"] == pytest.approx(row["tokens"] / row["seconds"])
        achieved = row["floor_operations"] / row["seconds"] / 1e12
        assert row["share_of_floor"] == pytest.approx(achieved / row["matmul_tflops"])
        assert row["step_over_planned"] == pytest.approx(1, abs=0.25)  # tiny: what a plan leaves out is not tiny beside


def test_the_waterfall_multiplies_up(made: Any) -> None:
    found = made[1]["sections"]["waterfall"]
    rows = found["cumulative"]
    assert [row["name"] for row in rows] == list(waterfall.CUMULATIVE)
    product = predicted = 1.0
    for row in [row for row in rows[1:] if "us_per_token" in row]:
        product *= row["gain"]
        predicted *= row["predicted_gain"]
        assert row["cumulative_gain"] == pytest.approx(product)
        assert row["predicted_cumulative_gain"] == pytest.approx(predicted)
        assert row["us_per_token"] == pytest.approx(1e6 * row["seconds"] / 200)
    assert predictions.packing_gain(found["padding_ratio"]) == rows[1]["predicted_gain"]
    assert [row["name"] for row in found["turned_off"]] == list(waterfall.TURNED_OFF)
    assert all(row["slower"] > 0 for row in found["turned_off"])


def test_plans_are_not_taken_for_measurements(made: Any) -> None:
    found, text = made[1]["sections"]["cards"], made[2]
    assert [row["card"] for row in found["cards"]] == list(TINY.cards)
    assert not any("measured" in row for row in found["cards"])
    assert "Planned, not measured." in text and "there is no GPU, so these are plans" in text
    tokens = [row["planned_tokens"]["full"] for row in found["cards"]]
    assert tokens == sorted(tokens) and tokens[0] > 0


@pytest.mark.parametrize("name", ["roofline.png", "waterfall.png", "memory.png"])
def test_pictures_show_something(made: Any, name: str) -> None:
    image = pytest.importorskip("matplotlib.image")
    out, _, text = made
    pixels = image.imread(out / name)
    height, width = pixels.shape[:2]
    assert width >= 600 and height >= 200
    colours = {tuple(pixel) for pixel in pixels[::3, ::3, :3].reshape(-1, 3).round(2).tolist()}
    assert len(colours) > 10 and 0.02 < (pixels[..., :3] < 0.9).any(axis=-1).mean() < 0.9
    assert f"]({name})" in text


def test_a_failing_section_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def fail(context: Context, deadline: Deadline) -> dict[str, Any]:
        raise RuntimeError("could not read /srv/somebody/data/file.bin\nmore")

    def skip(context: Context, deadline: Deadline) -> dict[str, Any]:
        raise Skip("there is no such package")

    monkeypatch.setitem(run.SECTIONS, "kernels", run.SECTIONS["kernels"]._replace(measure=fail))
    monkeypatch.setitem(run.SECTIONS, "training", run.SECTIONS["training"]._replace(measure=skip))
    words = [str(tmp_path), "--cpu", "--only", "kernels", "training", "roofs"]
    assert run.main(words, TINY) == 1
    assert "report: kernels failed: RuntimeError: could not read file.bin" in capsys.readouterr().err
    text = (tmp_path / "report.md").read_text()
    assert "## Kernels\n\nfailed: RuntimeError: could not read file.bin\n" in text
    assert "## Training\n\nskipped: there is no such package\n" in text
    sections = json.loads((tmp_path / "report.json").read_text())["sections"]
    assert sections["roofs"]["status"] == "measured" and sections["roofs"]["copy_gb_per_s"] > 0
    monkeypatch.setitem(run.SECTIONS, "kernels", run.SECTIONS["kernels"]._replace(measure=skip))
    assert run.main([*words[:2], "--only", "kernels"], TINY) == 0


def test_a_section_has_its_share_of_the_time_and_what_is_left_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = {}

    def look(name: str) -> Any:
        def measure(context: Context, deadline: Deadline) -> dict[str, Any]:
            left[name] = deadline.left_s
            return {}

        return measure

    for name in ("roofs", "step", "cards"):
        monkeypatch.setitem(run.SECTIONS, name, run.SECTIONS[name]._replace(measure=look(name)))
    shares = {"roofs": 1, "step": 4, "cards": 5}
    context = Context(torch.device("cpu"), replace(TINY, minutes=10.0, shares=shares), tmp_path)
    run.measure_all(context, ["roofs", "step", "cards"])
    assert left == pytest.approx({"roofs": 60, "step": 300, "cards": 600}, abs=20)  # the first two took no time
    assert Deadline(30.5).rounds(5, 10) == 5 and Deadline(100).rounds(1, 3) == 3 and Deadline(1).rounds(5, 3) == 1
    assert Deadline(-1).over and Deadline(-1).left_s == 0 and not Deadline(60).over


def test_a_step_whose_time_is_over_says_so(tmp_path: Path) -> None:
    context = Context(torch.device("cpu"), TINY, tmp_path)
    for name, reason in {
        "step": "llama-tiny in float32: the time was over",
        "baselines": "authors: the time was over",
    }.items():
        with pytest.raises(Skip, match=reason):
            run.SECTIONS[name].measure(context, Deadline(0))


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run.main([str(tmp_path)]) == 2
    assert "report: torch sees no CUDA device; give --cpu" in capsys.readouterr().err
    for words, message in [
        (["--cpu", "--minutes", "0"], "minutes must be above 0 and below 1000, got 0"),
        (["--cpu", "--only", "nothing"], "invalid choice: 'nothing'"),
    ]:
        with pytest.raises(SystemExit):
            run.main([str(tmp_path), *words])
        assert message in capsys.readouterr().err


def test_predictions_say_what_they_are() -> None:
    for known in (*predictions.KERNELS, predictions.STEP_SHARE, predictions.STEP_SHARE_NF4):
        assert known.value > 1 if known.unit == "x" else 0 < known.value <= 1
    assert set(predictions.WATERFALL) == set(list(waterfall.CUMULATIVE)[1:])
    found = predictions.predictions_for("bench_routing.py::test_route_experts[gpu-large-graph-forward+backward]")
    assert {known.value for known in found} == {0.85, 3.0}
    assert predictions.predictions_for("bench_routing.py::test_route_experts[gpu-large-graph-forward]") == []


@pytest.mark.parametrize("sizes", [ON_CPU, ON_GPU], ids=["cpu", "gpu"])
def test_the_sizes_name_what_there_is(sizes: Settings) -> None:
    assert set(sizes.shares) == set(run.SECTIONS)
    assert sizes.mode_tokens in sizes.tokens and sizes.waterfall[0] in sizes.shapes
    assert sizes.minutes <= {"float32": 4, "bfloat16": 9}[sizes.dtype]


def test_the_floor_is_what_one_would_count_by_hand(tmp_path: Path) -> None:
    context = Context(torch.device("cpu"), replace(TINY, shapes=("llama-1m",)), tmp_path)
    model = load(context, "llama-1m", "none")
    lengths = torch.tensor([3, 5])
    attention, mlp = 128 * 128, 128 * 352
    linear = 4 * (8 * (4 * attention + 3 * mlp)) + 8 * 2 * attention + 2 * (2 * attention + 3 * mlp)
    pairs = 4 * (6 + 15) + 8
    assert floor_operations(model, lengths) == 4 * linear + 14 * 128 * pairs
    with pytest.raises(ValueError, match="floor_operations: the model must have layers that are known, got Linear"):
        floor_operations(torch.nn.Linear(1, 1), lengths)  # type: ignore[arg-type]


def test_lengths_add_up() -> None:
    for tokens in (64, 1000, 4096, 16384):
        lengths = packed_lengths(tokens)
        assert int(lengths.sum()) == tokens and int(lengths.min()) >= 1
        assert bool((lengths[:-1] > VIRTUAL_TOKENS).all())


def test_the_padded_form_is_the_same_step(tmp_path: Path) -> None:
    steps = waterfall._steps(Context(torch.device("cpu"), TINY, tmp_path), "llama-tiny", "none", packed_lengths(150))
    ours, padded = steps[f"on {waterfall.FINAL}"], steps["off packing (padded, nothing recomputed)"]
    assert isinstance(ours, PackedStep) and isinstance(padded, waterfall.PaddedStep)
    torch.testing.assert_close(padded.states(), ours.states(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(padded(), ours(), rtol=1e-4, atol=1e-5)


def test_gradients_are_held_against_each_other_as_far_as_rounding_allows() -> None:
    expected = torch.ones(100, 4)
    ruined = expected.clone()
    ruined[7] *= 1.5  # a row of the gradient, as 32 layers in bfloat16 leave some
    waterfall.check_gradient("a state", expected * 1.0001, expected, "float32")
    waterfall.check_gradient("a state", ruined.bfloat16(), expected.bfloat16(), "bfloat16")
    for wrong, dtype in ((ruined, "float32"), (ruined * torch.nan, "float32"), (expected * 1.5, "bfloat16")):
        with pytest.raises(RuntimeError, match='waterfall: "a state" must give the gradients of the final state, got'):
            waterfall.check_gradient("a state", wrong, expected, dtype)


def recorded(name: str, **info: Any) -> dict[str, Any]:
    facts = {"median_us": {"candidate": 100.0}, "moved_bytes": 10**8, "copy_gb_per_s": 2000.0}
    shape = {"shape": {"dtype": "torch.float32"}}
    return {"fullname": f"bench/bench_x.py::test_{name}", "extra_info": {**facts, **shape, **info}}


def test_a_kernel_is_held_against_the_nearer_roof_and_its_predictions() -> None:
    roofs = Roofs(1.0, {"float32": 50.0})
    name = "route_experts[gpu-large-graph-forward+backward]"
    row = row_of(recorded(name, speedup_over_topk_one_hot=2.5), roofs)
    assert row["share_of_limit"] == pytest.approx(0.5) and row["limit"] == "copy"
    assert [(known["figure"], known["measured"]) for known in row["predicted"]] == [
        ("share_of_limit", pytest.approx(0.5)),
        ("speedup_over_topk_one_hot", 2.5),
    ]
    products = row_of(recorded("catalog_x", floating_point_operations=4 * 10**9), roofs)
    assert products["share_of_limit"] == pytest.approx(0.8) and products["limit"] == "products"
    sizes = {"users": 64, "items": 10**6, "width": 25, "dtype": "torch.float32"}
    scores = row_of(recorded("catalog_topk[64]", shape=sizes), roofs)
    assert scores["share_of_limit"] == pytest.approx(0.64) and scores["limit"] == "products"
    elsewhere = row_of(recorded("route_experts[cpu-demo]", speedup_over_topk_one_hot=2.5), roofs)
    assert elsewhere["predicted"] == [] and elsewhere["predicted_elsewhere"][0]["value"] == 6.0
    sections = {"kernels": {"status": "measured", "seconds": 1.0, "rows": [row, products]}}
    assert [gap.name for gap in gaps(sections)] == [name, "catalog_x"]
    assert gaps(sections)[0].lost_us == pytest.approx(50)
    report = {"device_class": "H100", "sections": sections}
    assert [one.measured for one in missed(report)] == [pytest.approx(0.5), 2.5]  # 59% and 83% of what was predicted
    assert missed({**report, "device_class": "4090"}) == []


def test_measured_cards_read_as_such(tmp_path: Path) -> None:
    measured = {"fits": True, "reserved_bytes": 7 * 2**30, "reserved_over_planned": 1.1, "largest_tokens": 3000}
    proposal = {"checkpointing": "mlp", "micro_batch_tokens": 2048}
    row = {"card": "8GB", "bytes": 2**33, "planned_tokens": {"mlp": 2060}, "proposal": proposal, "planned_bytes": 2**32}
    found = {
        "status": "measured",
        "seconds": 1.0,
        "shape": "llama-3-8b",
        "weights": "NF4",
        "fixed_bytes": {"CUDA context": 6 * 10**8},
        "modes": {"mlp": {"base_bytes": 2**32, "bytes_per_token": 10**6}},
        "row_tokens": 100.0,
        "cards": [row | {"measured": measured | {"tokens": 2048, "bisected": False}}],
    }
    text = "\n".join(cards.markdown(found))
    assert "| 8GB | mlp | 2048 | 4.00 GiB | yes | 7.00 GiB | 1.10x | 3000 or more |" in text
    assert "emulated" in text and "not measured" not in text
    found["cards"][0]["measured"]["fits"] = False
    assert "| no | - | - | 3000 |" in "\n".join(cards.markdown(found))
    pytest.importorskip("matplotlib")
    assert draw({"sections": {"cards": found}}, tmp_path) == ["memory.png"]
    report = {"sections": {}, "command": "c", "device": "cuda", "device_class": "H100"}
    report |= {"minutes_taken": 1.0, "minutes_allowed": 9.0}
    assert "no measurement is below its prediction" in document(report, {}, [])


@pytest.mark.parametrize("limit", [1000, 1270, 5000])
def test_the_largest_that_fits_is_found(limit: int) -> None:
    found, bisected = cards.largest_that_fits(lambda tokens: tokens <= limit, 1000, True, 5)
    assert found <= limit < found + 257 and bisected
    assert cards.largest_that_fits(lambda tokens: True, 1000, True, 0) == (1000, False)
    below, bisected = cards.largest_that_fits(lambda tokens: tokens <= limit, 8000, False, 5)
    assert below <= limit < 1.3 * below and not bisected
    assert cards.largest_that_fits(lambda tokens: False, 8000, False, 5) == (0, False)


def test_a_card_takes_a_step(tmp_path: Path) -> None:
    """The model and the batch of the measurement on a card, which itself needs a GPU."""
    context = Context(torch.device("cpu"), TINY, tmp_path)
    settings = cards.card_settings(context, "full")
    settings["lm"] |= {"quantization": "none", "dtype": "float32"}
    config = cards.build_config(cards.LaserConfig, settings)
    work = replace(cards.WORKLOAD, num_items=50)
    model = cards.build_model(config, work, context.device)
    loss = model(cards.batch_of(3, work, 500)).loss
    loss.backward()
    assert torch.isfinite(loss) and model.bituning.suffix_tokens.grad is not None


def test_a_script_that_fails_says_why() -> None:
    assert run_script(["-c", "import reporting; print(reporting.__name__)"], 60) == "reporting\n"
    with pytest.raises(RuntimeError, match="run_script: -c must end with status 0, got 3: the reason"):
        run_script(["-c", "import sys; print('the reason', file=sys.stderr); sys.exit(3)"], 60)


def test_paths_become_names() -> None:
    assert without_paths("cannot open '/srv/a/b/c.txt': no") == "cannot open 'c.txt': no"
    assert without_paths("File '/there/me/x.py' in 1/2, a / b: runs/out") == "File 'x.py' in 1/2, a / b: runs/out"
    assert without_paths("1/2 and a/b/c and https://x.org/y/z") == "1/2 and a/b/c and https://x.org/y/z"


def test_benchmarks_that_record_nothing_are_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_run", lambda *_: ("status 4", []))
    monkeypatch.setattr(kernels, "package_missing", lambda _: False)
    context = Context(torch.device("cpu"), TINY, tmp_path)
    with pytest.raises(
        RuntimeError, match="kernels: the benchmarks must record their figures, got none after status 4"
    ):
        kernels.measure(context, Deadline(1))
    monkeypatch.setattr(kernels, "package_missing", lambda _: True)
    with pytest.raises(Skip, match="pytest-benchmark is not installed"):
        kernels.measure(context, Deadline(1))


def test_a_benchmark_that_fails_fails_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fake(context: Context, stored: Path, deadline: Deadline) -> tuple[str, list[str]]:
        shape = {"users": 1, "items": 10, "width": 4, "dtype": "torch.float32"}
        stored.write_text(
            json.dumps({"benchmarks": [recorded("catalog_topk[1]", speedup_over_product=3.0, shape=shape)]})
        )
        return "all of them", ["FAILED bench/bench_x.py::test_x - AssertionError"]

    monkeypatch.setattr(kernels, "_run", fake)
    monkeypatch.setattr(kernels, "package_missing", lambda _: False)
    assert run.main([str(tmp_path), "--cpu", "--only", "kernels"], TINY) == 1
    assert "report: kernels failed: FAILED bench/bench_x.py::test_x" in capsys.readouterr().err
    text = (tmp_path / "report.md").read_text()
    assert "**FAILED bench/bench_x.py::test_x - AssertionError**" in text and "3.00x product" in text
