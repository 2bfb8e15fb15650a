"""SIGTERM and Ctrl-C: before the first step they end a run in one line, later it saves first; a second one ends it."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llada_jax import cli
from llada_jax.tools import kill_test
from llada_jax.tools.digest import digest
from llada_jax.training import preemption
from llada_jax.training import run as train

ROOT = Path(__file__).resolve().parents[2]
MANY = 10**6  # steps: the run is stopped before
CODES = [(signal.SIGTERM, 75, "SIGTERM"), (signal.SIGINT, 130, "Ctrl-C")]


def start(program, *arguments):
    return subprocess.Popen(
        [sys.executable, *program, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def until(condition, child, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert child.poll() is None and time.monotonic() < end, child.stderr.read()
        time.sleep(0.01)


@pytest.mark.parametrize("number, code, name", CODES)
def test_a_signal_while_jax_is_imported_ends_a_run_in_one_line(tmp_path, number, code, name):
    child = start(["-m", "llada_jax.train"], *kill_test.RUN, f"--workdir={tmp_path / 'w'}")
    maps = Path(f"/proc/{child.pid}/maps")
    until(lambda: "jaxlib" in maps.read_text(), child)  # the import is under way
    began = time.monotonic()
    child.send_signal(number)
    _, printed = child.communicate(timeout=60)
    assert child.returncode == code and time.monotonic() - began < 5
    assert printed.splitlines() == [f"stopped by {name} before it could save; the same command starts again"]
    assert not (tmp_path / "w").exists()


def test_a_signal_before_the_first_step_gives_the_workdir_back(tmp_path):
    child = start(["-m", "llada_jax.train"], *kill_test.RUN, f"--workdir={tmp_path / 'w'}")
    until((tmp_path / "w" / "config.json").exists, child)  # it prepares its data
    child.terminate()
    _, printed = child.communicate(timeout=60)
    assert child.returncode == 75 and not (tmp_path / "w" / "lease.json").exists()
    assert printed.count("\n") == 1, printed


@pytest.mark.parametrize("number, code, name", CODES)
def test_a_signal_in_the_loop_saves_and_the_run_goes_on_from_there(tmp_path, number, code, name, steps, events):
    run = kill_test.Run(tmp_path / "w", 1, MANY)
    while run.moment() != "computing" or run.lines() < 2:
        assert run.is_running(), run.output()
        time.sleep(0.01)
    run.children[0].send_signal(number)
    assert run.wait() == [code], run.output()
    (event,) = events(tmp_path / "w", "preemption")
    assert event["cause"] == name and event["step"] == max(steps(tmp_path / "w"))
    last = f"stopped by {name}; step {event['step']} is saved, the same command continues from there"
    assert run.output().splitlines()[-1] == last and "Traceback" not in run.output()
    assert kill_test.metrics(tmp_path / "w")[-1]["step"] == event["step"]
    assert not (tmp_path / "w" / "lease.json").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_a_program_at_once_that_is_busy(number):
    program = """if True:
        import jax
        from llada_jax.training import preemption
        with preemption.Signals() as signals, signals.asking():
            print("ready", flush=True)
            jax.block_until_ready(jax.jit(lambda x: jax.lax.while_loop(lambda x: x < 2, lambda x: 1 - x, x))(0))
    """
    child = start(["-c", program])
    try:
        assert child.stdout.readline() == "ready\n"
        for _ in range(2):
            time.sleep(1)
            assert child.poll() is None
            child.send_signal(number)
        assert child.wait(20) == 128 + number
    finally:
        child.kill()
        child.communicate()


def test_a_signal_inside_a_callback_is_not_lost():
    """A KeyboardInterrupt that is raised while Python collects garbage, say, is printed and forgotten."""
    program = """if True:
        import gc, os, signal
        from llada_jax.training import preemption
        class Trash:
            def __del__(self):
                os.kill(os.getpid(), signal.SIGINT)
        with preemption.Signals() as signals, signals.asking():
            Trash()
            gc.collect()
            while not signals.asked: pass
            print(signals.asked)
    """
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("2\n", "")


def test_a_run_from_python_hears_signals_in_its_steps_only(make_run, tmp_path):
    handlers = [signal.getsignal(number) for number in cli.STOPPED]
    signals = preemption.Signals()
    with signals.asking():
        assert [signal.getsignal(number) for number in cli.STOPPED] != handlers
        signal.raise_signal(signal.SIGINT)
        while signals.asked != signal.SIGINT:
            time.sleep(0.01)
    assert [signal.getsignal(number) for number in cli.STOPPED] == handlers


def test_a_request_is_heeded_between_two_steps(make_run, trained, tmp_path, monkeypatch, steps):
    polls = iter([preemption.NOTHING, preemption.SAVE, int(signal.SIGTERM)])
    with monkeypatch.context() as patched:
        patched.setattr(preemption.Requests, "poll", lambda self: next(polls))
        run = make_run(steps=6)
        run.checkpoint.every_steps = 100
        with pytest.raises(cli.Preempted, match="step 3 is saved"):
            train.train(run, tmp_path / "w")
    assert steps(tmp_path / "w") == [2, 3]
    train.train(make_run(steps=6), tmp_path / "w")
    assert digest(tmp_path / "w", 6) == digest(trained, 6)
    assert kill_test.metrics(tmp_path / "w") == kill_test.metrics(trained)
