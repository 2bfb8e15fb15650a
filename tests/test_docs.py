"""The READMEs: their links lead somewhere, and their commands name programs, flags, configs and fields that exist."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest

from llada_jax.config import GROUPS
from llada_jax.model.config import ModelConfig
from llada_jax.sampling.options import Options

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path for path in ROOT.rglob("README.md") if not any(part.startswith(".") or part == "golden" for part in path.parts)
)
FIELDS = {f"{group}.{field.name}" for group, kind in GROUPS.items() for field in dataclasses.fields(kind)} | {
    f"model.{field.name}" for field in dataclasses.fields(ModelConfig)
}


def sources() -> str:
    places = [*ROOT.glob("llada_jax/**/*.py"), *ROOT.glob("tools/**/*.py")]
    return "\n".join(path.read_text(encoding="utf-8") for path in places)


FLAGS = set(re.findall(r"""(?:DEFINE_\w+)\(\s*["'](\w+)["']""", sources())) | {
    field.name for field in dataclasses.fields(Options)
}


def commands(page: Path) -> list[str]:
    """The lines of shell blocks that run Python, and inline ones; tests/launch checks those of launch/."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"```(?:sh)?\n(.*?)```", text, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    inline = [code.replace("\n", " ") for code in re.findall(r"`([^`]+)`", prose)]
    return [
        line.strip()
        for line in [*lines, *inline]
        if re.match(r"\s*python (-m llada_jax\.(?!tools\.NAME)|tools/(?!NAME))", line)
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!https?:)([^)#]*)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / link).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_name_what_exists(page):
    for line in commands(page):
        words = shlex.split(re.sub(r"\[(--[^]]*)\]", r"\1", line), comments=True)
        program = words[2].replace(".", "/") + ".py" if words[1] == "-m" else words[1]
        assert (ROOT / program).exists(), line
        for word in words:
            if not (match := re.match(r"--([\w.]+)(?:=(.*))?$", word)):
                continue
            name, value = match.groups()
            if name.startswith("config."):
                assert name.removeprefix("config.") in FIELDS, f"{name} in: {line}"
            elif name == "config" and value and not set(value) & set("…{"):
                config = value.partition(":")[0].removeprefix("configs/").removesuffix(".py")
                assert (ROOT / "configs" / f"{config}.py").exists() or config == "NAME", line
            else:
                assert name.removeprefix("no") in FLAGS or name in FLAGS | {"config", "help"}, f"{name} in: {line}"


def test_commands_are_found():
    assert len(commands(ROOT / "README.md")) >= 5
