"""Who may import whom, and how long a file may be: the floors of the house."""

import ast

import pytest
from house import PICTURE, ROOT, arrows, floor, imports, modules, name_of, picture, row_of


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


def test_the_picture_is_drawn_from_the_imports():
    assert PICTURE.read_text(encoding="utf-8") == picture(), "python tests/house.py draws it again"


def test_no_arrow_of_the_picture_points_upwards():
    found = arrows()
    assert found and all(row_of(a) < row_of(b) for a, b in found)


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
