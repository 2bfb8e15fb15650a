"""Help lists what there is, in words that work when they are typed."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags
from ml_collections import config_flags

from llada_jax import help
from llada_jax.config import GROUPS, describe, run_config

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = [*sorted((ROOT / "llada_jax").glob("*.py")), *sorted((ROOT / "tools").glob("*.py"))]
COMMANDS = [path for path in COMMANDS if "cli.run(" in path.read_text() and path.name != "cli.py"]


def run(*arguments, cwd):
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def test_help_of_train_lists_its_flags_and_every_config(tmp_path):
    done = run("llada_jax.train", "--help", cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr
    for flag in ("--config", "--workdir", "print_config", "allow_config_change", "--coordinator", "distributed"):
        assert f"{flag}: " in done.stdout, flag
    plain = " ".join(done.stdout.split())
    for path in (ROOT / "configs").glob("[a-z]*.py"):
        first = path.read_text().split('"""')[1].splitlines()[0]
        assert f"{path.stem} {first}" in plain


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.stem)
def test_the_head_of_every_command_has_an_example(path):
    head = path.read_text().split('"""')[1]
    assert f"python -m llada_jax.{path.stem} --" in head or f"python tools/{path.name} " in head


def test_a_config_is_found_by_its_name_from_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = f"{help.CONFIGS}/pretrain_tiny.py"
    assert help.config_path("pretrain_tiny") == help.config_path("configs/pretrain_tiny.py") == own
    assert help.config_path("pretrain_tiny:python") == f"{own}:python"
    assert help.config_path("pretrain_tinny") == "pretrain_tinny"
    assert help.config_path("elsewhere/pretrain_tiny.py") == "elsewhere/pretrain_tiny.py"
    given = ["train", "--config", "pretrain_tiny", "--config.train.steps=2", "--config=sft_tiny"]
    assert help.config_paths(given) == ["train", "--config", own, given[3], f"--config={help.CONFIGS}/sft_tiny.py"]


def test_a_file_of_the_users_comes_before_a_config_of_the_package(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "sft_tiny.py").touch()
    monkeypatch.chdir(tmp_path)
    assert help.config_path("configs/sft_tiny.py:x") == "configs/sft_tiny.py:x"


@pytest.mark.parametrize(
    "arguments, line",
    [
        (
            ["--config=pretran_tiny"],
            "--config=pretran_tiny: no such file, or it can't be loaded; did you mean pretrain",
        ),
        (["--config=pretrain_tiny", "--config.train.stepz=3"], 'stepz Did you mean "steps"'),
        (["--config=pretrain_tiny", "--config.trane.steps=3"], 'Did you mean "train"'),
    ],
)
def test_a_slip_is_answered_with_the_nearest_name(tmp_path, arguments, line):
    done = run("llada_jax.train", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert line in done.stderr and done.stderr.count("\n") == 1


def test_print_config_names_every_field_with_its_meaning(tmp_path):
    done = run("llada_jax.train", "--config=quickstart", "--config.train.steps=7", "--print_config", cwd=tmp_path)
    assert done.returncode == 0
    lines = dict(line.split("=", 1) for line in done.stdout.splitlines())
    assert lines["--config.train.steps"].split() == "7 # of the run".split()
    assert "one of full, padding, documents" in lines["--config.objective.attention"]
    assert lines["--config.quickstart.couplets"] == "200"
    assert not list(tmp_path.iterdir())


def test_what_describe_prints_sets_the_same_config(monkeypatch):
    """The lines, typed as flags, turn another config into this one."""
    config = run_config("tiny")
    config.data.files = "it's here/*.txt"
    config.optimizer.schedule = (("linear", 1e-3, "50 steps"), ("constant", 1e-3, "100%"))
    config.train.sample_prompt = 'two words, "quoted" # no comment'
    words = [word for line in describe(config).splitlines() for word in shlex.split(line, comments=True)]
    assert len(words) == sum(len(config[group]) for group in GROUPS)
    monkeypatch.setattr(sys, "argv", ["train", *words])  # where ml_collections looks for overrides
    values = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", run_config("llada_1b"), flag_values=values)
    values(sys.argv)
    assert values.config.to_dict() == config.to_dict()
