"""The wheel, installed where no checkout is: commands, configs, tools and data files, from any directory."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SMALL = """--config.train.steps=2 --config.model.d_model=32 --config.model.n_layers=1 --config.model.n_heads=2
    --config.model.n_kv_heads=2 --config.model.mlp_hidden_size=48 --config.data.row_length=32
    --config.train.eval_every=0 --config.data.vocab_size=2000 --config.data.tokenizer_type=char
    --config.train.batch_size=4""".split()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy: setuptools leaves its work in the source tree."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("llada_jax", "configs", "tools"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, source / name)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w"]
    subprocess.run([*build, target, source], check=True, capture_output=True)
    return next(target.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Runs a command of the installed package in a directory; what the package needs comes from this environment."""
    site = tmp_path_factory.mktemp("site")
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", site, wheel]
    subprocess.run(install, check=True, capture_output=True)
    return runner(site / "bin", PYTHONPATH=str(site))


def runner(programs, **variables):
    """Runs a command, of those in `programs` first, in a directory; returns what it prints."""
    environment = dict(os.environ, PATH=f"{programs}:{os.environ['PATH']}", XLA_FLAGS="", **variables)
    environment["JAX_COMPILATION_CACHE_DIR"] = str(Path(tempfile.gettempdir()) / "llada_jax_tests_cache")

    def run(*command, cwd):
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_the_wheel_holds_every_file_that_the_package_reads(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    for folder, prefix in (("llada_jax", ""), ("configs", "llada_jax/"), ("tools", "llada_jax/")):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and path.suffix not in (".pyc", ".md", ".svg"):  # pictures are of pages
                assert prefix + path.relative_to(ROOT).as_posix() in held


@pytest.mark.slow
def test_a_model_is_trained_and_sampled_from_where_no_checkout_is(installed, tmp_path):
    origin = installed(sys.executable, "-c", "import llada_jax; print(llada_jax.__file__)", cwd=tmp_path)
    assert not Path(origin.strip()).is_relative_to(ROOT)
    train_and_sample(installed, tmp_path)


@pytest.mark.slow
def test_the_oldest_versions_of_the_bounds_train_and_sample(wheel, tmp_path):
    """In an environment of its own; pip downloads them."""
    bounds = re.findall(r"^([\w-]+)>=([\d.]+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    (tmp_path / "oldest.txt").write_text("".join(f"{name}=={version}\n" for name, version in bounds))
    run = runner(tmp_path / "old" / "bin", PYTHONPATH="")
    run(sys.executable, "-m", "venv", "old", cwd=tmp_path)
    python = tmp_path / "old" / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", "--constraint", "oldest.txt", wheel, cwd=tmp_path)
    given = run(python, "-c", "import jax, numpy; print(jax.__version__, numpy.__version__)", cwd=tmp_path).split()
    assert all(version.startswith(dict(bounds)[name]) for name, version in zip(("jax", "numpy"), given, strict=True))
    train_and_sample(run, tmp_path)


def train_and_sample(run, place):
    run("llada-train", "--config=pretrain_tiny", "--workdir=runs/tiny", *SMALL, cwd=place)
    assert (place / "runs" / "tiny" / "checkpoints" / "2").is_dir()
    sample = ["llada-sample", "--checkpoint=runs/tiny", "--prompt=床前明月光，", "--gen_length=8", "--steps=2"]
    assert run(*sample, cwd=place).startswith("床前明月光，")


@pytest.mark.parametrize(
    "command",
    [
        ["llada-train"],
        ["llada-sample"],
        ["llada-chat"],
        ["llada-demo"],
        ["llada-evaluate"],
        ["-m", "llada_jax.tools.prepare_data"],
    ],  # fmt: skip
)
def test_commands_and_tools_show_their_help(installed, tmp_path, command):
    start = [sys.executable] if command[0] == "-m" else []
    text = installed(*start, *command, "--help", cwd=tmp_path)
    assert "python -m llada_jax." in text or "python tools/" in text
    assert ("pretrain_tiny  " in text) == (command == ["llada-train"])
