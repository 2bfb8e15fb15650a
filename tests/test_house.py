"""Who may import whom, and how long a file may be: the floors of the house."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "llada_jax"
FLOORS = [
    {"config", "streams"},
    {"processes", "integrity", "logs", "requests", "untrusted"},
    {"events", "goodput"},
    {"sharding", "compiler_options", "cli", "checks"},
    {"attention", "diffusion", "optimizer", "stability", "watchdog"},
    {"model", "data"},
    {"cross_entropy"},
    {"losses"},
    {"train_step", "sampling", "likelihood"},
    {"checkpoint", "metrics"},
    {"interop", "loop"},
    {"train", "evaluation", "sample"},
    {"ahead"},
]
FLOOR = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("llada_jax"):
            module = node.module.removeprefix("llada_jax").strip(".")
            yield from [module] if module else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from (a.name.removeprefix("llada_jax.") for a in node.names if a.name.startswith("llada_jax."))


def modules():
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_no_module_imports_upwards(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert room in FLOOR, f"give {room} a floor"
    for other in {name.split(".")[0] for name in imports(path)} - {room}:
        assert FLOOR[other] < FLOOR[room] or (FLOOR[other] == FLOOR[room] and room in ("sample",)), (
            f"{room} imports {other}"
        )


@pytest.mark.parametrize("forbidden, rooms", [("jax", ["data"]), ("llada_jax.model", ["diffusion"])])
def test_rooms_know_nothing_of_what_is_not_theirs(forbidden, rooms):
    for path in modules():
        if path.relative_to(PACKAGE).parts[0].removesuffix(".py") in rooms:
            tree = ast.parse(path.read_text())
            names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
            names |= {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
            assert not any(name == forbidden or name.startswith(forbidden + ".") for name in names), path


def test_no_file_is_two_files():
    for folder in ("llada_jax", "tools", "configs", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            assert len(path.read_text().splitlines()) <= 500, path
