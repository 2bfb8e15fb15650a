"""The house: who may import whom, who does, and a picture of it.

python tests/house.py draws llada_jax/house.svg from the imports; a test says that it is what is committed.
"""

import ast
import functools
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "llada_jax"
PICTURE = PACKAGE / "house.svg"
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


# The picture: a box for each room, or part of one that has a floor of its own. Rows from the roof down; a column is the
# middle of the box.
GROUND = ("fields", "streams", "inputs", "files", "help", "cli", "config", "storage", "model.config")
COMMANDS = ("train", "sample", "chat", "demo", "evaluate")
STEP = ("training.step", "training.optimizer", "training.stability", "training.monitor")
ROWS = [
    {"library": 1, "commands": 3},
    {"training": 1, "evaluation.harness": 3, "serving": 5},
    {"training.step": 0.3, "evaluation": 2, "interop": 4},
    {"objectives": 1, "sampling": 5},
    {"model": 2},
    {"parallel": 2, "data": 4},
    {"ground": 2.5},
]
HOLDS = {"ground": GROUND, "commands": COMMANDS, "training.step": STEP}  # of other boxes the number of files is shown
COLUMN, ROW, WIDTH, HEIGHT, MARGIN = 165, 104, 150, 46, 14
LABEL = 0.25  # where on its arrow a number stands
STYLE = """
  text { font: 13px system-ui, sans-serif; text-anchor: middle; fill: #1f2328 }
  .name { font-weight: 600 } .small { font-size: 11px; fill: #59636e }
  .count { font-size: 11px; stroke: #ffffff; stroke-width: 4; paint-order: stroke }
  rect { fill: #eaf2fb; stroke: #1f6fb4 }
  path { fill: none; stroke: #8c959f } marker path { fill: #8c959f; stroke: none }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 } .small { fill: #9198a1 } .count { stroke: #0d1117 }
    rect { fill: #12263a; stroke: #4f9be0 }
  }
"""


def box(module: str) -> str:
    """The box of the picture in which a module is drawn."""
    for name, parts in HOLDS.items():
        if any(f"{module}.".startswith(f"{part}.") for part in parts):
            return name
    names = [name for row in ROWS for name in row if f"{module}.".startswith(f"{name}.")]
    assert names, f"give {module} a box in ROWS"
    return max(names, key=len)


def arrows() -> Counter[tuple[str, str]]:
    """How many imports lead from each box to each other one: modules, once for each file that imports them."""
    found = Counter()
    for path in modules():
        found.update((box(name_of(path)), box(other)) for other in imports(path) if other)
    return Counter({(a, b): count for (a, b), count in found.items() if a != b})


def row_of(name: str) -> int:
    return next(i for i, row in enumerate(ROWS) if name in row)


def direct(found: Counter[tuple[str, str]]) -> list[tuple[str, str]]:
    """The arrows without those that a chain of others implies. The boxes must not be in a circle."""

    @functools.cache
    def below(a: str) -> frozenset[str]:
        nexts = {y for x, y in found if x == a}
        return frozenset(nexts).union(*map(below, nexts))

    return sorted((a, b) for a, b in found if not any(b in below(c) for x, c in found if x == a and c != b))


def picture() -> str:
    """The SVG."""
    found = arrows()
    shown = direct(found)
    x = {name: MARGIN + WIDTH / 2 + column * COLUMN for row in ROWS for name, column in row.items()}
    width, height = 5 * COLUMN + WIDTH + 2 * MARGIN, (len(ROWS) - 1) * ROW + HEIGHT + 2 * MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">',
        "<title>Which room imports from which, and how many modules</title>",
        f"<style>{STYLE}</style>",
        '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 8 4 0 8z"/></marker>',
    ]
    for a, b in shown:
        outs = sorted((y for first, y in shown if first == a), key=lambda y: (x[y], y))
        ins = sorted((y for y, last in shown if last == b), key=lambda y: (x[y], y))
        x0, x1 = (x[at] + 0.7 * WIDTH * ((names.index(to) + 0.5) / len(names) - 0.5)
                  for at, to, names in ((a, b, outs), (b, a, ins)))  # fmt: skip
        x1 = x0 if b == "ground" else x1
        y0, y1 = _top(a) + HEIGHT, _top(b)
        bend = (y1 - y0) / 2
        parts.append(f'<path d="M{x0:g} {y0} C{x0:g} {y0 + bend:g} {x1:g} {y1 - bend:g} {x1:g} {y1 - 1}" '
                     'marker-end="url(#tip)"/>')  # fmt: skip
        x_label = x0 + (x1 - x0) * LABEL**2 * (3 - 2 * LABEL)  # on the curve
        y_label = y0 + (y1 - y0) * (1.5 * LABEL * (1 - LABEL) + LABEL**3) + 4
        parts.append(f'<text class="count" x="{x_label:.1f}" y="{y_label:.1f}">{found[a, b]}</text>')
    parts += [line for row in ROWS for name in row for line in _drawn(name, x[name], width)]
    return "\n".join([*parts, "</svg>\n"])


def _top(name: str) -> int:
    return MARGIN + row_of(name) * ROW


def _drawn(name: str, x: float, width: int) -> list[str]:
    files = sum(box(name_of(path)) == name and path.name != "__init__.py" for path in modules())
    text = " · ".join(part.rpartition(".")[2] if name == "training.step" else part for part in HOLDS.get(name, ()))
    wide = width - 2 * MARGIN if name == "ground" else WIDTH + (90 if text else 0)
    y = _top(name)
    return [
        f'<rect x="{x - wide / 2:g}" y="{y}" width="{wide:g}" height="{HEIGHT}" rx="6"/>',
        f'<text class="name" x="{x:g}" y="{y + 19}">{name}</text>',
        f'<text class="small" x="{x:g}" y="{y + 36}">{text or f"{files} file" + "s" * (files > 1)}</text>',
    ]


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
    print(PICTURE)
