"""The environment that the scripts make: never over one of the user's, never under two hands, flags looked at first."""

import os
import subprocess
import sys
import time

import pytest
from fakes import LAUNCH, ROOT, launch, prepared, program

# A Python that makes environments and installs in an instant, and notes the calls in "calls" beside itself. What it
# puts into an environment is itself. "pip" may be told to fail, or to take its time.
PYTHON = """
import os, pathlib, shutil, sys, time
notes, words = pathlib.Path({notes!r}), sys.argv[1:]
if words[:1] == ["-c"]:
    sys.exit()
(notes / "calls").open("a").write(" ".join(words) + "\\n")
if words[:2] == ["-m", "venv"]:
    bin = pathlib.Path(words[2]) / "bin"
    bin.mkdir(exist_ok=True)
    shutil.copy(__file__, bin / "python")
elif words[:2] == ["-m", "pip"]:
    time.sleep(float(os.environ.get("PIP_SECONDS", 0)))
    print("WARNING: Location 'file:///gone' is ignored" if "-qq" not in words else "", end="", file=sys.stderr)
    sys.exit(int(os.environ.get("PIP_CODE", 0)))
"""


@pytest.fixture
def checkout(tmp_path):
    """A checkout without an environment, whose base Python is the one above."""
    where = tmp_path / "checkout"
    where.mkdir()
    for name in ("requirements.txt", "pyproject.toml"):
        (where / name).write_bytes((ROOT / name).read_bytes())
    (where / "launch").mkdir()
    for path in LAUNCH.glob("*.*"):
        (where / "launch" / path.name).write_bytes(path.read_bytes())
    (where / "configs").mkdir()
    (where / "configs/quickstart.py").touch()
    program(tmp_path / "python-fake", PYTHON.format(notes=str(tmp_path)))
    # environment.py itself is run by a real Python, which then calls this one for what takes minutes.
    text = (where / "launch/environment.py").read_text().replace("sys.executable", repr(str(tmp_path / "python-fake")))
    (where / "launch/environment.py").write_text(text)
    return where


def calls(checkout):
    path = checkout.parent / "calls"
    return [line.split()[1:3] for line in path.read_text().splitlines()] if path.exists() else []


def prepare(checkout, *extras, **environment):
    return launch(sys.executable, checkout / "launch/environment.py", checkout / ".venv-llada", *extras, **environment)


def quickstart(checkout, *flags, cwd=None):
    return launch("bash", checkout / "launch/quickstart.sh", *flags, cwd=cwd or checkout, LLADA_PYTHON=sys.executable)


def test_an_environment_is_made_once_and_updated_in_place(checkout):
    assert prepare(checkout, "gpu").returncode == 0
    assert prepare(checkout, "gpu").returncode == 0
    assert calls(checkout) == [["venv", str(checkout / ".venv-llada")], ["pip", "install"]]
    used = checkout / ".venv-llada/used-by-a-run"
    used.touch()
    with (checkout / "pyproject.toml").open("a") as file:
        file.write("# a pull")
    assert prepare(checkout, "gpu").returncode == 0
    assert calls(checkout)[2:] == [["pip", "install"]] and used.exists()


def test_an_environment_whose_python_is_gone_is_made_again_in_place(checkout):
    prepare(checkout)
    (checkout / ".venv-llada/bin/python").unlink()
    assert prepare(checkout).returncode == 0
    assert [call[0] for call in calls(checkout)] == ["venv", "pip"] * 2


def test_what_pip_left_half_done_is_done_again(checkout):
    failed = prepare(checkout, PIP_CODE="1")
    assert failed.returncode == 1 and failed.stderr.splitlines()[-1].startswith("error: pip could not install")
    assert prepare(checkout).returncode == 0
    assert [call[0] for call in calls(checkout)] == ["venv", "pip", "pip"]


def test_a_directory_that_the_user_made_is_left_alone(checkout):
    mine = checkout / ".venv-llada/bin/python"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    done = prepare(checkout)
    assert done.returncode == 2 and "was not made by this script" in done.stderr and len(done.stderr.splitlines()) == 1
    assert mine.read_text() == "mine" and calls(checkout) == []
    assert [path.name for path in (checkout / ".venv-llada").iterdir()] == ["bin"]


def test_no_script_names_an_environment_that_a_user_may_have(checkout):
    for path in LAUNCH.glob("*.sh"):
        text = path.read_text()
        assert ".venv/" not in text and '.venv"' not in text and ".venv-test" not in text, path
        assert "rm -rf" not in text, path


def test_of_two_scripts_at_once_the_second_waits(checkout):
    environment = os.environ | {"PIP_SECONDS": "2"}
    command = [sys.executable, checkout / "launch/environment.py", checkout / ".venv-llada"]
    first = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    while ["pip", "install"] not in calls(checkout):
        time.sleep(0.05)
    second = prepare(checkout)
    assert first.wait(timeout=20) == second.returncode == 0 and "waiting for it" in second.stderr
    assert [call[0] for call in calls(checkout)] == ["venv", "pip"]


def test_a_script_that_was_killed_leaves_no_lock(checkout):
    environment = os.environ | {"PIP_SECONDS": "5"}
    command = [sys.executable, checkout / "launch/environment.py", checkout / ".venv-llada"]
    first = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, start_new_session=True)
    while ["pip", "install"] not in calls(checkout):
        time.sleep(0.05)
    os.killpg(first.pid, 9)
    first.wait()
    assert prepare(checkout).returncode == 0


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--workdr=x"], "unexpected argument '--workdr=x'"),
        (["seed=1"], "unexpected argument 'seed=1'"),
        (["--workdir"], "--workdir needs a value"),
        (["--workdir="], "unexpected argument '--workdir='"),
        (["--config=configs/nothing.py:arm"], "--config=configs/nothing.py:arm: no such file"),
    ],
)
def test_the_quickstart_refuses_flags_before_it_makes_anything(checkout, flags, message):
    done = quickstart(checkout, *flags)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (checkout / ".venv-llada").exists()


def test_the_quickstart_makes_its_environment_quietly_and_starts(checkout):
    (checkout / ".venv").mkdir()
    done = quickstart(checkout, "--config.train.seed", "1")
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    last = (checkout.parent / "calls").read_text().splitlines()[-1]
    config, workdir = f"--config={checkout}/configs/quickstart.py", f"--workdir={checkout}/runs/quickstart"
    assert last == f"tools/quickstart.py {config} {workdir} --config.train.seed=1"
    assert list((checkout / ".venv").iterdir()) == []


def test_the_quickstart_s_paths_are_those_of_the_caller(checkout):
    elsewhere = checkout.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine.py").touch()
    assert quickstart(checkout, "--workdir=out", "--config=mine.py:arm", cwd=elsewhere).returncode == 0
    last = (checkout.parent / "calls").read_text().splitlines()[-1]
    assert last == f"tools/quickstart.py --config={elsewhere}/mine.py:arm --workdir={elsewhere}/out"


def test_a_python_that_is_too_old_is_one_line(checkout):
    program(checkout.parent / "old", "import sys\nsys.exit(1)")
    for name in ("python3.13", "python3.12", "python3.11", "python3", "python"):
        (checkout.parent / name).symlink_to("old")
    for name in ("bash", "dirname", "sed"):
        (checkout.parent / name).symlink_to(f"/usr/bin/{name}")
    done = launch("/usr/bin/bash", checkout / "launch/quickstart.sh", cwd=checkout, PATH=str(checkout.parent))
    assert done.returncode == 2 and "no Python 3.11 or newer" in done.stderr and len(done.stderr.splitlines()) == 1


def test_ci_runs_the_tests_of_launch_in_an_environment_of_its_own(tmp_path):
    (tmp_path / ".ci").mkdir()
    (tmp_path / ".ci/run").write_bytes((ROOT / ".ci/run").read_bytes())
    prepared(tmp_path, "test", python="import sys\nprint(sys.argv[2:])", directory=".venv-llada-test")
    done = launch("bash", tmp_path / ".ci/run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    ran = done.stdout.splitlines()
    assert [line.split("'")[1] for line in ran] == ["ruff", "ruff", "pyright", "pytest"]


@pytest.mark.parametrize("mine", [None, "glibc.malloc.check=1"])
def test_programs_get_huge_pages_unless_the_user_tunes_the_c_library(mine):
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    environment |= {} if mine is None else {"GLIBC_TUNABLES": mine}
    told = subprocess.run(
        ["bash", "-c", '. launch/environment.sh && env | grep ^GLIBC_TUNABLES='],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert told.stdout == f"GLIBC_TUNABLES={mine or 'glibc.malloc.hugetlb=1'}\n"
