"""What `--help` prints, and the run configs that `--config` names."""

import ast
import difflib
import inspect
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

from absl import flags

CONFIGS = Path(__file__).with_name("configs")
_WIDTH = 100
_ASKS = ("-h", "-help", "--help", "-helpshort", "--helpshort", "-helpfull", "--helpfull")


def configs() -> dict[str, str]:
    """The configs that come with the package: each name with the first line of its file. No file is run."""
    found = {}
    for path in sorted(CONFIGS.glob("[a-z]*.py")):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        found[path.stem] = text.splitlines()[0]
    return found


def config_path(value: str) -> str:
    """The value of --config with the path of its file: `pretrain_tiny:python` names a config of the package.

    What is a file, or is named like one, stays; but `configs/NAME.py` is that of the package where there is none here.
    """
    name, colon, argument = value.partition(":")
    if Path(name).is_file():
        return value
    stem = name.removeprefix("configs/").removesuffix(".py")
    if (name in (stem, f"configs/{stem}.py")) and (CONFIGS / f"{stem}.py").is_file():
        return f"{CONFIGS / stem}.py{colon}{argument}"
    return value


def config_paths(argv: list[str]) -> list[str]:
    """The command line with `config_path` of what it gives as --config."""
    result = list(argv)
    for i, word in enumerate(argv):
        if word in ("--config", "-config") and i + 1 < len(argv):
            result[i + 1] = config_path(argv[i + 1])
        elif word.startswith(("--config=", "-config=")):
            flag, _, value = word.partition("=")
            result[i] = f"{flag}={config_path(value)}"
    return result


def no_config(value: str) -> str:
    """The message for a --config that is not there, or whose file can't be loaded."""
    name = Path(value.partition(":")[0]).stem
    near = difflib.get_close_matches(name, configs(), n=1)
    hint = f"did you mean {near[0]}?" if near else f"the configs of the package are {', '.join(configs())}"
    return f"--config={value}: no such file, or it can't be loaded; {hint}"


def is_asked(argv: list[str]) -> bool:
    """Whether the command line asks for help."""
    return any(word in _ASKS for word in argv[1:])


def text(main: Callable, *, full: bool = False) -> str:
    """The help of a command: the head of the file that `main` is in, its flags, and the configs if it takes one.

    full: also the flags of the libraries.
    """
    own = inspect.unwrap(main).__module__
    own_flags = sys.argv[0] if own == "__main__" else own  # absl's name for the module of a script
    parts = [inspect.cleandoc(sys.modules[own].__doc__ or "")]
    modules = flags.FLAGS.flags_by_module_dict()
    for module in sorted(modules, key=lambda module: module != own_flags):
        if full or module == own_flags or module.startswith("llada_jax"):
            parts.append("\n".join(_line(flag) for flag in modules[module]))
    if "config" in flags.FLAGS:
        parts.append(_configs())
    return "\n\n".join(filter(None, parts)) + "\n"


def _line(flag: flags.Flag) -> str:
    name = f"--[no]{flag.name}" if flag.boolean else f"--{flag.name}"
    default = f" (default: {flag.default})" if flag.default not in (None, "", []) else ""
    return textwrap.fill(f"{name}: {flag.help}{default}", _WIDTH, initial_indent="  ", subsequent_indent="      ")


def _configs() -> str:
    width = max(map(len, configs()))
    lines = [
        textwrap.fill(f"{name:{width}}  {line}", _WIDTH, initial_indent="  ", subsequent_indent=" " * (width + 4))
        for name, line in configs().items()
    ]
    return "\n".join(["--config is the path of a file, or one of these names:", *lines])
