"""The scripts of launch/ against a gcloud that only pretends: what they would run, and what they do when it fails."""

import json
import os
import shlex
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "launch"
sys.path.insert(0, str(LAUNCH))
import environment  # noqa: E402

PLACE = ["--project=p", "--zone=z"]
TRAIN = ["--config=configs/pretrain_tiny.py", "--workdir=bucket/a b"]

# Each call is noted in calls.json. The answers to "describe" and to a question for the run's state come one by one from
# script.json; the last one stays.
GCLOUD = """
import json, sys
from pathlib import Path
here = Path(__file__).parent
arguments = sys.argv[1:]
with (here / "calls").open("a") as file:
    file.write(json.dumps(arguments) + "\\n")
script = json.loads((here / "script.json").read_text())
def next_of(name):
    answer = script[name].pop(0) if len(script[name]) > 1 else script[name][0]
    (here / "script.json").write_text(json.dumps(script))
    return answer
if arguments[:2] == ["config", "get-value"]:
    print(script.get(arguments[2], ""))
elif "describe" in arguments:
    answer = next_of("states")
    if answer == "NONE":
        sys.exit("ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: Resource was not found")
    print(answer)
elif any("worker.sh state" in a for a in arguments):
    answer = next_of("runs")
    if answer == "silent":
        sys.exit("ERROR: (gcloud.compute.tpus.queued-resources.ssh) connection refused")
    print(answer)
elif any(word in arguments for word in script.get("fail", [])):
    sys.exit("ERROR: (gcloud) RESOURCE_EXHAUSTED: quota")
"""


@pytest.fixture
def fake(tmp_path):
    """A directory for the PATH with the pretending gcloud in it; `tell` says what it answers."""
    bin = tmp_path / "bin"
    bin.mkdir()
    program(bin / "gcloud", GCLOUD)
    return bin


def program(path, source):
    path.write_text(f"#!{sys.executable}\n{textwrap.dedent(source)}")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)


def tell(fake, **script):
    (fake / "script.json").write_text(json.dumps(script))


def calls(fake):
    lines = (fake / "calls").read_text().splitlines() if (fake / "calls").exists() else []
    return [call for call in map(json.loads, lines) if call[0] != "config"]


def actions(fake):
    """The calls, each in a word."""
    words = []
    for call in calls(fake):
        command = next((a for a in call if a.startswith("--command=")), "")
        words.append(command.split("worker.sh ")[1].split()[0] if "worker.sh" in command else call[3])
    return words


def launch(*command, fake=None, **environment):
    path = f"{fake}:{os.environ['PATH']}" if fake else os.environ["PATH"]
    run = dict(cwd=ROOT, capture_output=True, text=True, timeout=120, env=os.environ | {"PATH": path} | environment)
    return subprocess.run([str(part) for part in command], **run)


def tpu_vm(*flags, fake=None):
    return launch("bash", LAUNCH / "tpu_vm.sh", *flags, fake=fake)


def babysit(*flags, fake=None):
    command = ["--name=n", "--type=v5litepod-16", *PLACE, "--poll_seconds=0", *flags]
    return launch(sys.executable, LAUNCH / "babysit.py", *command, fake=fake)


@pytest.mark.parametrize(
    "flags, wanted",
    [
        (["--type=v5litepod-16"], ["--node-id=n", "--runtime-version=v2-alpha-tpuv5-lite"]),
        (["--type=v6e-8", "--spot"], ["--spot", "--runtime-version=v2-alpha-tpuv6e"]),
        (["--type=v5p-32", "--slices=2"], ["--node-count=2", "--node-prefix=n", "--runtime-version=v2-alpha-tpuv5"]),
        (["--type=v4-32", "--runtime=mine"], ["--runtime-version=mine"]),
    ],
)
def test_create_asks_for_a_queued_resource(fake, flags, wanted):
    tell(fake)
    done = tpu_vm("create", "--name=n", *PLACE, *flags, fake=fake)
    assert done.returncode == 0, done.stderr
    (call,) = calls(fake)
    assert call[:5] == ["compute", "tpus", "queued-resources", "create", "n"]
    assert {*wanted, *PLACE, flags[0].replace("--type", "--accelerator-type")} <= set(call)
    assert ("--spot" in call) == ("--spot" in flags) and ("--node-id=n" in call) != ("--slices=2" in flags)
    assert done.stderr.startswith("+ gcloud compute tpus queued-resources create n ")


def test_run_hands_the_flags_to_every_host_unchanged(fake):
    tell(fake)
    assert tpu_vm("run", "--name=n", *PLACE, *TRAIN, fake=fake).returncode == 0
    (call,) = calls(fake)
    assert {"--node=all", "--worker=all"} <= set(call)
    command = call[-1].removeprefix("--command=")
    assert shlex.split(command) == ["bash", "llada_jax/launch/worker.sh", "run", "llada_jax.train", *TRAIN]


def test_setup_copies_the_checkout_first(fake):
    tell(fake)
    assert tpu_vm("setup", "--name=n", *PLACE, "--bucket=gs://b", fake=fake).returncode == 0
    copy, prepare = calls(fake)
    assert copy[3] == "scp" and copy[5] == "n:llada_jax.tgz" and prepare[-1].endswith("worker.sh setup b")


@pytest.mark.parametrize(
    "flags, script, message",
    [
        ([], {}, "say what to do"),
        (["create", *PLACE], {}, "--name=NAME is needed"),
        (["create", "--name=n", "--zone=z"], {}, "no project: give --project=ID"),
        (["create", "--name=n"], {"project": "p"}, "no zone: give --zone=ZONE"),
        (["create", "--name=n", *PLACE], {}, "--type is needed"),
        (["create", "--name=n", *PLACE, "--type=tpu7x-8"], {}, "TPU 7x comes through GKE only"),
        (["delete", "--name=n", *PLACE, "--workdir=w"], {}, "delete takes no --workdir=w"),
    ],
)
def test_what_is_missing_is_one_line(fake, flags, script, message):
    tell(fake, **script)
    done = tpu_vm(*flags, fake=fake)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert calls(fake) == []


@pytest.mark.parametrize("script", ["tpu_vm.sh", "xpk.sh", "gke_jobset.sh"])
def test_a_missing_program_is_one_line(tmp_path, script):
    needed = ["--name=n", "--type=v6e", "--cluster=c", "--image=i", "--bucket=b", "--topology=4x4"]
    flags = ["state", "--name=n"] if script == "tpu_vm.sh" else needed
    for name in ("bash", "dirname"):
        (tmp_path / name).symlink_to(f"/usr/bin/{name}" if Path(f"/usr/bin/{name}").exists() else f"/bin/{name}")
    done = launch("bash", LAUNCH / script, *flags, PATH=str(tmp_path))
    assert done.returncode == 2 and "is not installed" in done.stderr and len(done.stderr.splitlines()) == 1


def test_the_state_is_one_word(fake):
    tell(fake, states=["NONE", "ACTIVE"])
    assert [tpu_vm("state", "--name=n", *PLACE, fake=fake).stdout for _ in range(2)] == ["NONE\n", "ACTIVE\n"]


def test_babysitting_goes_through_a_preemption_to_the_end(fake):
    states = ["NONE", "WAITING_FOR_RESOURCES", "ACTIVE", "ACTIVE", "SUSPENDING", "SUSPENDED", "NONE", "ACTIVE"]
    tell(fake, states=states, runs=["NOTHING", "RUNNING", "NOTHING", "RUNNING", "EXITED 0"])
    done = babysit("--spot", "--delete_when_done", *TRAIN, fake=fake)
    assert done.returncode == 0, done.stderr
    first = ["describe", "create", "describe", "describe", "state", "scp", "setup", "run", "describe", "state"]
    again = ["describe", "describe", "delete", *first[:2], *first[3:], "describe", "state", "delete"]
    assert actions(fake) == first + again
    created = [call for call in calls(fake) if call[3] == "create"]
    started = [call[-1] for call in calls(fake) if "worker.sh run " in call[-1]]
    assert created[0] == created[1] and "--spot" in created[0]
    assert started[0] == started[1] and shlex.split(started[0])[-2:] == TRAIN


def test_babysitting_continues_a_run_that_goes_on(fake):
    tell(fake, states=["ACTIVE"], runs=["RUNNING", "silent", "RUNNING", "EXITED 0"])
    assert babysit(*TRAIN, fake=fake).returncode == 0
    assert set(actions(fake)) == {"describe", "state"}


def test_babysitting_restarts_what_crashed_and_replaces_what_is_silent(fake):
    tell(fake, states=["ACTIVE"] * 6 + ["NONE", "ACTIVE"], runs=["EXITED 134", *["silent"] * 5, "NOTHING", "EXITED 0"])
    done = babysit(*TRAIN, fake=fake)
    assert done.returncode == 0, done.stderr
    assert "the run ended with code 134; retry 1" in done.stderr and "does not answer; retry 2" in done.stderr
    assert [word for word in actions(fake) if word not in ("describe", "state", "scp")] == [
        "setup", "run", "delete", "create", "setup", "run",
    ]  # fmt: skip


def test_babysitting_starts_a_run_again_that_was_told_to_stop_and_counts_no_retry(fake):
    tell(fake, states=["ACTIVE"], runs=["EXITED 75", "RUNNING", "EXITED 75", "EXITED 0"])
    done = babysit("--retries=0", *TRAIN, fake=fake)
    assert done.returncode == 0, done.stderr
    assert actions(fake).count("run") == 2 and "has saved; it starts again" in done.stderr


@pytest.mark.parametrize(
    "script, flags, code, message",
    [
        (dict(states=["ACTIVE"], runs=["EXITED 2"]), [], 2, "a mistake in the flags"),
        (dict(states=["ACTIVE"], runs=["EXITED 1"]), ["--retries=2"], 1, "code 1; giving up after 2 retries"),
        (dict(states=["NONE"], fail=["create"]), ["--retries=1"], 1, "RESOURCE_EXHAUSTED: quota; giving up"),
        (dict(states=["NONE"]), ["--type=tpu7x-8", "--retries=0"], 1, "TPU 7x comes through GKE only"),
        (dict(states=["NONE"]), ["--zone="], 2, "no zone"),
    ],
)
def test_babysitting_gives_up_with_a_reason_and_a_code(fake, script, flags, code, message):
    tell(fake, **script)
    done = babysit(*flags, fake=fake)
    assert done.returncode == code and message in done.stderr.splitlines()[-1], done.stderr


def test_a_dry_run_shows_the_commands_and_runs_none(fake):
    tell(fake)
    done = babysit("--dry_run", *TRAIN, fake=fake)
    assert done.returncode == 0 and calls(fake) == []
    shown = [line.split()[5] for line in done.stderr.splitlines()]
    assert shown == ["create", "scp", "ssh", "ssh", "ssh"], done.stderr


@pytest.fixture
def host(tmp_path):
    """A checkout as on a TPU's host, with a Python that notes its arguments and ends as --end=CODE says."""
    (tmp_path / "launch").mkdir()
    for name in (
        "launch/worker.sh",
        "launch/environment.sh",
        "launch/environment.py",
        "requirements.txt",
        "pyproject.toml",
    ):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / ".venv-llada/bin").mkdir(parents=True)
    source = """import signal, sys, time
def save(*_):
    time.sleep(1)
    sys.exit(print("saved", flush=True) or 75)
signal.signal(signal.SIGTERM, save)
print(sys.argv[1:], flush=True)
time.sleep(60 * ("wait" in sys.argv))
sys.exit(3)"""
    program(tmp_path / ".venv-llada/bin/python", source)
    (tmp_path / ".venv-llada/.llada_jax").write_text(environment.wanted(["tpu"]))
    return lambda *words: launch("bash", tmp_path / "launch/worker.sh", *words), tmp_path


def test_a_host_runs_in_the_background_tells_how_it_ended_and_stops(host):
    worker, checkout = host
    assert worker("state").stdout == "NOTHING\n"
    assert worker("run", "llada_jax.train", "--workdir=a b").returncode == 0
    until(lambda: worker("state").stdout == "EXITED 3\n")
    assert "['-m', 'llada_jax.train', '--workdir=a b', '--distributed']" in (checkout / "run.log").read_text()
    worker("run", "llada_jax.train", "wait")
    until(lambda: worker("state").stdout == "RUNNING\n" and "wait" in (checkout / "run.log").read_text())
    assert worker("stop").returncode == 0
    assert (checkout / "run.log").read_text().endswith("saved\n")
    assert worker("state").stdout == "NOTHING\n"


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.sh")), ids=lambda path: path.name)
def test_every_script_is_shell(path):
    assert launch("bash", "-n", path).returncode == 0
    assert "set -euo pipefail" in path.read_text() or path.name in ("environment.sh", "common.sh")
