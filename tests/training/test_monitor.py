"""Where a run's time goes, and where it stands still."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from llada_jax.data import pipeline
from llada_jax.training import monitor
from llada_jax.training import run as train
from llada_jax.training.metrics import Reporter
from llada_jax.training.monitor import Events, Goodput, Watchdog

ROOT = Path(__file__).resolve().parents[2]


class Hours:
    """A clock in the place of the module `time` that a test sets."""

    def __init__(self):
        self.now = 1e9

    def time(self):
        return self.now

    def monotonic(self):
        return self.now


@pytest.fixture(autouse=True)
def nothing_was_said_before(monkeypatch):
    monkeypatch.setattr(monitor, "_warned", set())


@pytest.fixture
def hours(monkeypatch):
    clock = Hours()
    monkeypatch.setattr(monitor, "time", clock)
    return clock


def spend(clock, hours, *phases):
    """(phase, seconds, step or None) after each other; then the clock is kept, as by a process that is killed."""
    for phase, seconds, step in phases:
        clock.enter(phase, step=step)
        hours.now += seconds
    clock.write()


def test_every_second_of_a_life_with_a_kill_and_a_rollback_is_counted_once(tmp_path, hours):
    first = Goodput(tmp_path, hours.now)
    hours.now += 7
    steps = [("step", 10, 1), ("save", 2, None), ("data", 1, None), ("step", 10, 2), ("step", 10, 3)]
    spend(first, hours, ("compile", 5, 1), *steps)
    hours.now += 100  # killed; step 3 was not saved
    second = Goodput(tmp_path, hours.now)
    hours.now += 4
    spend(second, hours, ("restore", 3, None), ("step", 10, 3), ("step", 10, 4), ("evaluate", 8, None))
    expected = dict(start=11, compile=5, restore=3, data=1, step=30, again=20, save=2, evaluate=8, sample=0, down=100)
    assert second.seconds() == expected
    assert second.scalars()["4_speed/goodput"] == pytest.approx(30 / 180)
    assert second.line() == (
        "goodput 16.7% of 0:03:00; lost: down 55.6%, steps computed again 11.1%, starting 6.1%, evaluating 4.4%, "
        "compiling 2.8%, restoring 1.7%, saving 1.1%, waiting for data 0.6%"
    )


def test_waiting_that_the_device_spends_computing_is_not_lost(tmp_path, hours):
    clock = Goodput(tmp_path, hours.now)
    clock.enter("step", step=1)
    clock.enter("data")
    hours.now += 3
    clock.enter("step", step=2, hidden=True)
    assert clock.seconds()["step"] == 3 and clock.seconds()["data"] == 0


def place(path, what):
    """Puts something at a path that is no file, or none that a run has written."""
    if what == "a directory":
        path.mkdir()
    elif what == "a pipe":
        os.mkfifo(path)
    else:
        path.write_bytes(what)


@pytest.mark.parametrize(
    "what",
    ["a directory", "a pipe", b"", b"\0\0", b"[" * 5000, b'{"time": 1.0, "step": 3}', b'{"seconds": {"step": "x"}}'],
)
def test_a_damaged_clock_is_said_and_counts_anew(tmp_path, capsys, what):
    place(tmp_path / "goodput.json", what)
    clock = Goodput(tmp_path, time.time())
    clock.enter("step", step=1)
    clock.write()
    assert sum(clock.seconds().values()) < 60
    assert "goodput.json: damaged" in capsys.readouterr().err.splitlines()[0]


@pytest.mark.parametrize("what", ["a directory", "a pipe"])
def test_an_event_that_cannot_be_written_is_said_and_stops_nothing(tmp_path, capsys, what):
    place(tmp_path / "events.jsonl", what)
    Events(tmp_path).write("stall", step=3, cause="c", action="a")
    (line,) = capsys.readouterr().err.splitlines()
    assert "events.jsonl: " in line and '"cause": "c"' in line


def test_events_of_other_processes_reach_the_file_if_they_are_their_own(tmp_path, monkeypatch):
    sent = []
    monkeypatch.setattr(monitor.processes, "is_first", lambda: False)
    monkeypatch.setattr(monitor.processes, "send", sent.append)
    events = Events(tmp_path)
    events.write("skipped update", step=1, cause="c", action="a")
    events.write("damaged row", step=2, cause="c", action="a", own=True)
    assert not list(tmp_path.iterdir()) and [json.loads(text)["step"] for text in sent] == [2]
    monkeypatch.setattr(monitor.processes, "received", lambda: sent)
    events.collect()
    assert [json.loads(line)["event"] for line in (tmp_path / "events.jsonl").read_text().splitlines()] == [
        "damaged row"
    ]


@pytest.mark.parametrize("phase, reported", [("data", 1), ("step", 1), ("save", 1), ("evaluate", 1), ("compile", 0)])
def test_a_stalled_phase_is_named_once_with_the_stacks_of_all_threads(tmp_path, capfd, phase, reported):
    release = threading.Event()
    thread = threading.Thread(target=release.wait, name="stuck")
    thread.start()
    clock = Goodput(tmp_path, time.time())
    watch = Watchdog(clock, Events(tmp_path), 0.1)
    clock.enter(phase, step=12)
    time.sleep(0.5)
    clock.enter("compile")  # is not timed
    watch.close()
    release.set()
    thread.join()
    printed = capfd.readouterr().err
    assert printed.count(f"stalled at step 12: process 0 has been in phase '{phase}'") == reported
    path = tmp_path / "events.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    assert [(one["event"], one["step"]) for one in lines] == [("stall", 12)] * reported
    if reported:
        stacks = printed[printed.index("Timeout (") :]
        assert stacks.count("Timeout (") == 1 and stacks.count("Thread 0x") + stacks.count("thread 0x") >= 3
        assert stacks.count("test_monitor.py") == 1 and f"phase '{phase}'" in lines[0]["cause"]


def test_a_stall_is_seen_while_python_itself_stands_still(tmp_path):
    """A call that keeps the lock of the interpreter, as a bug in C may: no thread of ours would run."""
    program = f"""if True:
        import ctypes, pathlib, time
        from llada_jax.training.monitor import Events, Goodput, Watchdog
        clock = Goodput({str(tmp_path)!r}, time.time())
        watch = Watchdog(clock, Events({str(tmp_path)!r}), 0.5)
        clock.enter("step", step=1)
        time.sleep(0.3)
        ctypes.PyDLL(None).usleep(900_000)
        watch.close()
    """
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "Timeout (" in done.stderr and "<module>" in done.stderr, done.stderr


@pytest.mark.slow
def test_a_run_tells_where_it_hung_and_where_its_time_went(tiny_run, tmp_path, capfd, monkeypatch):
    read, reported = pipeline.RowSource.__getitem__, Reporter.step
    tiny_run.train.update(dict(stall_seconds=0.5, steps=3, eval_every=0))

    def hang(source, index):
        hung.append(source)
        time.sleep(2.0 if len(hung) == 1 else 0.0)
        return read(source, index)

    def killed(reporter, step, *rest):
        if step == 3:
            raise KeyboardInterrupt
        reported(reporter, step, *rest)

    hung = []
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline.RowSource, "__getitem__", hang)
        patch.setattr(Reporter, "step", killed)
        train.train(tiny_run, tmp_path)
    stalls = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert stalls[0]["event"] == "stall" and "phase 'data'" in stalls[0]["cause"]
    begun = time.time()
    train.train(tiny_run, tmp_path)
    seconds = json.loads((tmp_path / "goodput.json").read_text())["seconds"]
    assert seconds["data"] > 1.0 and seconds["again"] > 0 and seconds["step"] > 0 and seconds["restore"] > 0
    assert seconds["down"] < time.time() - begun
    printed = capfd.readouterr().err
    assert "in hang" in printed
    lines = [line for line in printed.splitlines() if "goodput" in line]
    assert len(lines) == 2 and "waiting for data" in lines[1]
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    shares = [value for name, value in logged[-1].items() if name.startswith(("4_speed/goodput", "4_speed/lost_to"))]
    assert np.sum(shares) == pytest.approx(1.0)
