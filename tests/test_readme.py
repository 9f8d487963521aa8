"""What README and docs/ show must work: code runs, commands parse, make targets and links exist."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from laser_fast import LaserModel
from laser_fast.cli import parser
from laser_fast.config import LaserConfig, build_config
from laser_fast.training.train import train_laser

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str, *pages: Path) -> list[str]:
    """Of README, or of other pages."""
    texts = [page.read_text(encoding="utf-8") for page in pages or [README]]
    return re.findall(rf"```{language}\n(.*?)```", "\n".join(texts), flags=re.DOTALL)


def test_stand_alone_code_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = [block for block in blocks("python") if "laser_fast.ops" in block]
    exec(compile(code, "README.md", "exec"), {})
    assert "torch.Size([3, 2])" in capsys.readouterr().out


def test_what_is_imported_exists() -> None:
    lines = [line.strip() for line in "\n".join(blocks("python", *PAGES)).splitlines()]
    imports = [line for line in lines if line.startswith(("import ", "from "))]
    assert len(imports) >= 5
    for line in imports:
        exec(line, {})


def test_a_model_is_built_saved_and_trained_as_shown(
    tiny_lm: Path, tiny_data: Path, tiny_recommender: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import TrainingArguments

    from laser_fast.data import SequenceDataset

    uploads: list[str] = []
    monkeypatch.setattr(LaserModel, "push_to_hub", lambda self, name: uploads.append(name))
    dataset = SequenceDataset.load(tiny_data)
    use, build, train = [block for block in blocks("python") if "laser_fast.ops" not in block]
    # the README's names stand for folders of ours
    texts = {
        "hub:Qwen/Qwen3-0.6B": str(tiny_lm),
        'quantization="nf4"': 'quantization="none"',
        "runs/sasrec": str(tiny_recommender),
        "data/mine": str(tiny_data),
        "my-laser": str(tmp_path / "my-laser"),
        "runs/movielens-100k/laser": str(tmp_path / "my-laser"),
        '{"B00A": "Fujifilm Instax Mini Film", "B01B": "Polaroid 600 Color Film"}': "items",
        '["50", "172", "181"]': '["i1", "i2"]',
    }
    names = {
        "LaserModel": LaserModel,
        "items": dataset.items,
        "arguments": TrainingArguments(
            str(tmp_path / "trainer"), max_steps=2, remove_unused_columns=False, report_to=[], use_cpu=True
        ),
    }
    for code in (build, train, "model.save_pretrained('my-laser')", use):
        for shown, ours in texts.items():
            code = code.replace(shown, ours)
        exec(compile(code, "README.md", "exec"), names)
    assert uploads == [f"me/{tmp_path / 'my-laser'}"]


def test_the_configuration_trains(tiny_lm: Path, tiny_data: Path, tiny_recommender: Path, tmp_path: Path) -> None:
    (text,) = blocks("yaml")
    values = yaml.safe_load(text)
    assert set(re.findall(r"{(\w+)}", values["prompt"]["item_template"])) == {"title", "brand"}
    values["prompt"]["item_template"] = "{title}"
    ours = {"data": str(tiny_data), "recommender": str(tiny_recommender), "lm": {"path": str(tiny_lm)}}
    config = build_config(LaserConfig, values | ours | {"output": str(tmp_path / "laser")})
    with pytest.warns(
        UserWarning, match="the prefix should be written from states of a recommender that has not seen the targets"
    ):
        model, inputs = train_laser(config, progress=False)
    assert model.calibration is not None and set(model.calibration.components) >= {"laser", "recommender"}
    loaded = LaserModel.from_pretrained(tmp_path / "laser")
    history = [[model.item_ids[item] for item in inputs.split.test.histories[0]]]
    assert len(loaded.recommend(history, 5)[0]) == 5


def test_commands_parse() -> None:
    joined = "\n".join(blocks("bash", *PAGES)).replace("\\\n", " ")
    commands = [shlex.split(line, comments=True)[1:] for line in joined.splitlines() if line.startswith("laser-fast ")]
    assert {command[0] for command in commands} >= {"prepare", "recommender", "train", "compare", "recommend", "plan"}
    for command in commands:
        assert callable(parser().parse_args(command).run)


def test_make_targets_exist() -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    for target in re.findall(r"^make ([a-z]+)", "\n".join(blocks("bash", *PAGES)), flags=re.MULTILINE):
        assert target in targets


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
    for link in links:
        if not link.startswith(("http", "#")):
            assert (page.parent / link.partition("#")[0]).exists(), link


def test_readme_names_every_page() -> None:
    named = set(re.findall(r"\]\(docs/([^)#]+\.md)\)", README.read_text(encoding="utf-8")))
    assert named == {page.name for page in PAGES if page.parent.name == "docs"}
