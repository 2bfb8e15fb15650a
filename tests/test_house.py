"""Who may import whom, and how long a file may be: the floors of the house."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "llada_jax"
# Rooms and files, from the ground up; what is named more exactly counts. A file imports from its own floor and below.
FLOORS = [
    ["fields", "streams"],
    ["storage.buckets"],
    ["inputs", "files", "help"],
    ["storage"],
    ["model.config", "cli"],
    ["config"],
    ["parallel"],
    ["model"],
    ["objectives", "sampling", "data"],
    ["evaluation"],
    ["training.monitor", "training.optimizer", "training.stability"],
    ["training.step"],
    ["interop"],
    ["training", "evaluation.harness", "serving"],
    ["train", "sample", "evaluate", "chat", "demo", "library"],
]


def floor(module: str) -> int:
    named = [(len(name), i) for i, names in enumerate(FLOORS) for name in names if f"{module}.".startswith(f"{name}.")]
    assert named, f"give {module} a floor"
    return max(named)[1]


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def modules():
    links = (PACKAGE / "tools", PACKAGE / "configs")
    return [p for p in sorted(PACKAGE.rglob("*.py")) if p != PACKAGE / "__init__.py" and p.parents[0] not in links]


def imports(path: Path) -> set[str]:
    """Every module of the package that a file imports, wherever the statement stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "llada_jax":
            base = node.module.removeprefix("llada_jax").strip(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}".strip(".")
                is_module = (PACKAGE / (inner.replace(".", "/") + ".py")).exists() or (PACKAGE / inner).is_dir()
                found.add(inner if is_module else base)
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("llada_jax.") for a in node.names if a.name.startswith("llada_jax.")}
    return found


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_no_file_imports_upwards(path):
    own = name_of(path)
    for other in imports(path) - {own}:
        assert floor(other) <= floor(own), f"{own} imports {other}"


def test_no_files_import_each_other_in_a_circle():
    needs = {name_of(path): imports(path) - {name_of(path)} for path in modules()}
    while free := [name for name, others in needs.items() if not others & needs.keys()]:
        for name in free:
            del needs[name]
    assert not needs


@pytest.mark.parametrize("room, forbidden", [("data", "jax"), ("model", "llada_jax.objectives")])
def test_rooms_know_nothing_of_what_is_not_theirs(room, forbidden):
    for path in modules():
        if name_of(path).split(".")[0] == room:
            tree = ast.parse(path.read_text())
            names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
            names |= {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
            assert not any(name == forbidden or name.startswith(forbidden + ".") for name in names), path


def test_files_and_rooms_stay_small():
    for folder in ("llada_jax", "tools", "configs", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            assert len(path.read_text().splitlines()) <= 450, path
    for room in {path.parent for path in modules()}:
        assert len(list(room.glob("*.py"))) <= 13, f"{room}: over 12 files beside __init__.py"
