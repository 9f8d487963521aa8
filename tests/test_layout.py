"""The plan of the house, held by reading every source file: who imports whom, and what may never appear."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# From the ground up: a room imports itself and the rooms below it. `files` and `data` hold no tensors of a model, and
# the operations stand on nothing but the kernels.
ORDER = ("printable", "config", "files", "data", "kernels", "ops", "processes", "lm", "nn", "recommenders", "models")
ORDER += ("retrieval", "laser", "evaluation", "runs", "planning", "training", "reports", "doctor", "cli")
ALLOWED = {room: set(ORDER[: place + 1]) for place, room in enumerate(ORDER)}
ALLOWED |= {"kernels": {"kernels"}, "ops": {"kernels", "ops"}, "processes": {"processes"}}
MOST_FILES = 15  # of its own in a folder, `__init__` apart
FOLDERS = {".ci", ".git", "bench", "csrc", "docs", "examples", "kernels", "laser_fast", "tests"}
FILES = {".clang-format", ".editorconfig", ".git", ".gitattributes", ".gitignore", ".pre-commit-config.yaml", "LICENSE"}
FILES |= {"CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "MANIFEST.in", "Makefile", "README.md"}
FILES |= {"constraints.txt", "pyproject.toml", "setup.py"}


def source_files(*suffixes: str) -> list[Path]:
    """Files of the repository, not of a build or an environment beside it."""
    folders = [ROOT / name for name in ("laser_fast", "kernels", "csrc", "tests", "bench", "docs", "examples", ".ci")]
    found = [file for file in ROOT.iterdir() if file.is_file()]
    for folder in folders:
        found += [file for file in folder.rglob("*") if file.is_file()]
    skipped = {"__pycache__", "_native", "build"}
    return sorted(
        file for file in found if file.suffix in suffixes and not skipped & set(file.relative_to(ROOT).parts[:-1])
    )


def library_files() -> list[Path]:
    return [file for file in source_files(".py") if file.relative_to(ROOT).parts[0] in ("laser_fast", "kernels")]


def name_of(file: Path) -> str:
    parts = list(file.relative_to(ROOT).with_suffix("").parts)
    parts = ["laser_fast", "kernels", *parts[2:]] if parts[0] == "kernels" else parts
    parts = parts[1:] if parts[0] == "bench" else parts  # that folder is on the path of its scripts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """`laser_fast.ops.routing` -> `ops`; the package itself and its command have no room of their own."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def imported_modules(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Every module named by an import statement anywhere in the file, relative ones resolved."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")
            base = base[: len(base) - node.level + is_package] if node.level else []
            target = ".".join([*base, *([node.module] if node.module else [])])
            if target == "laser_fast":  # `from laser_fast import ops` names a room
                yield from ((node.lineno, f"laser_fast.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, target


def wrong_arrows(source: str, module: str, is_package: bool) -> list[str]:
    room = room_of(module)
    wrong = []
    for line, target in imported_modules(ast.parse(source), module, is_package):
        if not target.startswith("laser_fast.") or room in ("", "__main__", "__init__"):
            continue
        if room_of(target) not in ALLOWED.get(room, set()) | {"__version__"}:
            wrong.append(f"{module}:{line} imports {target}")
    return wrong


@pytest.mark.parametrize("file", library_files(), ids=name_of)
def test_imports_run_downhill(file: Path) -> None:
    wrong = wrong_arrows(file.read_text(encoding="utf-8"), name_of(file), file.name == "__init__.py")
    assert not wrong


@pytest.mark.parametrize(
    ("source", "module", "refused"),
    [
        ("from laser_fast.recommenders import SASRec", "laser_fast.ops.routing", True),
        ("def f():\n    import laser_fast.nn.mformer", "laser_fast.ops.routing", True),
        ("from laser_fast import training", "laser_fast.laser.model", True),
        ("from ..nn import mformer", "laser_fast.ops.routing", True),
        ("import laser_fast.cli", "laser_fast.training.loop", True),
        ("from laser_fast.ops import x", "laser_fast.kernels.routing", True),
        ("from laser_fast.laser import LaserModel", "laser_fast.models.network", True),
        ("from laser_fast.data import X", "laser_fast.config", True),
        ("from laser_fast.config import X", "laser_fast.ops.routing", True),
        ("from laser_fast.planning import X", "laser_fast.runs.resume", True),
        ("from laser_fast.ops import route_experts", "laser_fast.laser.model", False),
        ("from .segments import segment_ids", "laser_fast.ops.routing", False),
        ("import torch", "laser_fast.ops.routing", False),
    ],
)
def test_the_check_of_arrows_sees_them(source: str, module: str, refused: bool) -> None:
    assert bool(wrong_arrows(source, module, is_package=False)) is refused


def test_every_room_is_in_the_plan() -> None:
    rooms = {room_of(name_of(file)) for file in library_files()} - {"", "__main__"}
    assert rooms == set(ORDER)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import one another."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        seen, waiting = set(), [start]
        while waiting:
            new = graph.get(waiting.pop(), set()) - seen
            seen |= new
            waiting += new
        reached[start] = seen
    groups = {
        tuple(sorted({one} | {other for other in reached[one] if one in reached.get(other, set())}))
        for one in graph
        if one in reached[one]
    }
    return sorted(list(group) for group in groups)


def import_graph(files: list[Path]) -> dict[str, set[str]]:
    """Who imports whom; imports inside functions and for type checkers count as well."""
    names = {name_of(file): file for file in files}
    graph = {}
    for name, file in names.items():
        tree, package = ast.parse(file.read_text(encoding="utf-8")), file.name == "__init__.py"
        found = {target for _, target in imported_modules(tree, name, package)}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and not node.level:
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
                if all(f"{node.module}.{alias.name}" in names for alias in node.names):
                    found -= {str(node.module)}  # files of a folder, not what its `__init__` offers
        graph[name] = found & set(names) - {"laser_fast"}  # the package itself fetches its names at first use
    return graph


def test_no_circle_of_imports() -> None:
    assert circles(import_graph(library_files())) == []


def test_no_circle_of_imports_in_the_benchmarks() -> None:
    graph = import_graph([file for file in source_files(".py") if file.relative_to(ROOT).parts[0] == "bench"])
    assert {"reporting.step", "reporting.document"} <= graph["reporting.run"]  # else it sees no import at all
    assert "forms" in graph["bench_catalog"]
    assert circles(graph) == []


def test_a_circle_is_seen() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": {"e"}}) == [["a", "b", "c"], ["e"]]


def test_a_folder_holds_few_files() -> None:
    counts: dict[str, int] = {}
    for file in library_files():
        if file.name != "__init__.py":
            counts[str(file.parent.relative_to(ROOT))] = counts.get(str(file.parent.relative_to(ROOT)), 0) + 1
    assert {folder: count for folder, count in counts.items() if count > MOST_FILES} == {}


def test_a_name_stands_for_one_thing() -> None:
    """An operation shares its name with its kernel, a command with what it calls."""
    homes: dict[str, list[str]] = {}
    for file in library_files():
        if file.name not in ("__init__.py", "__main__.py") and room_of(name_of(file)) not in ("kernels", "cli"):
            homes.setdefault(file.name, []).append(name_of(file))
    assert {name: found for name, found in homes.items() if len(found) > 1} == {}


def test_top_level_names() -> None:
    ignored = set()
    for line in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines():
        ignored.add(line.strip("/"))
    present = {path.name for path in ROOT.iterdir() if path.name not in (FILES if path.is_file() else FOLDERS)}
    unexpected = {name for name in present - ignored if not name.endswith(".egg-info")}
    assert not unexpected
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would hide the package `kernels` of Hugging Face"


@pytest.mark.parametrize("file", library_files(), ids=name_of)
def test_every_module_says_what_it_is(file: Path) -> None:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{file.relative_to(ROOT)} has no docstring"


@pytest.mark.parametrize("file", library_files(), ids=name_of)
def test_public_functions_have_docstrings(file: Path) -> None:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    public = [
        node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    ]
    assert [node.name for node in public if not ast.get_docstring(node)] == []


def test_no_file_is_called_after_nothing() -> None:
    nameless = {"utils.py", "util.py", "helpers.py", "helper.py", "common.py", "misc.py"}
    assert [str(file.relative_to(ROOT)) for file in source_files(".py") if file.name in nameless] == []


FORBIDDEN = {
    "pickle": r"^\s*(import|from)\s+(pickle|cPickle|dill|joblib|shelve)\b|\b(pickle\.loads?|read_pickle)\("
    r"|allow_pickle\s*=\s*True",
    "unsafe load": r"weights_only\s*=\s*False|\bsafe_globals\b|\badd_safe_globals\b|\byaml\.(unsafe_|full_)?load\(",
    "torch.load without weights_only": r"\btorch\.load\((?!.*weights_only=True)",
    "remote code": r"trust_remote_code\s*=\s*True",
    "evaluation of text": r"(?<![\w.])(eval|exec)\(",
    "a path of one machine": r"(?<![\w./~])/(home|work|Users|root|mnt|scratch)/\w",
    "network": r"^\s*(import|from)\s+(requests|urllib|httpx|socket)\b",
}


@pytest.mark.parametrize("rule", FORBIDDEN)
def test_what_never_appears(rule: str) -> None:
    pattern = re.compile(FORBIDDEN[rule])
    everywhere = rule == "a path of one machine"
    files = (
        source_files(".py", ".h", ".cpp", ".cu", ".md", ".toml", ".yaml", ".yml", ".cfg")
        if everywhere
        else library_files()
    )
    found = []
    for file in files:
        if file == Path(__file__).resolve():
            continue
        lines = enumerate(file.read_text(encoding="utf-8").splitlines(), start=1)
        found += [
            f"{file.relative_to(ROOT)}:{number}: {line.strip()}" for number, line in lines if pattern.search(line)
        ]
    assert not found


@pytest.mark.parametrize(
    ("rule", "line", "caught"),
    [
        ("pickle", "import pickle", True),
        ("pickle", "np.load(file, allow_pickle=True)", True),
        ("pickle", "np.load(file, allow_pickle=False)", False),
        ("pickle", "pd.read_pickle(file)", True),
        ("unsafe load", "torch.load(file, weights_only=False)", True),
        ("unsafe load", "torch.serialization.add_safe_globals([Config])", True),
        ("unsafe load", "yaml.safe_load(text)", False),
        ("torch.load without weights_only", "torch.load(file)", True),
        ("torch.load without weights_only", "torch.load(file, weights_only=True)", False),
        ("remote code", "AutoModel.from_pretrained(name, trust_remote_code=True)", True),
        ("evaluation of text", "model.eval()", False),
        ("evaluation of text", "value = eval(text)", True),
        ("a path of one machine", "DATA = '/home" + "/someone/data'", True),
        ("network", "import requests", True),
    ],
)
def test_the_rules_catch_what_they_should(rule: str, line: str, caught: bool) -> None:
    assert bool(re.search(FORBIDDEN[rule], line)) is caught
