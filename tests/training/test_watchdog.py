"""Where a run's time goes, and where it stands still."""

import json
import threading
import time

import numpy as np
import pytest

from llada_jax.data import pipeline
from llada_jax.fields import InputError
from llada_jax.training import monitor
from llada_jax.training import run as train
from llada_jax.training.metrics import Reporter
from llada_jax.training.monitor import Events, Goodput, Watchdog


class Hours:
    """A clock in the place of the module `time` that a test sets."""

    def __init__(self):
        self.now = 1e9

    def time(self):
        return self.now

    def monotonic(self):
        return self.now


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


def test_a_damaged_clock_is_named(tmp_path):
    (tmp_path / "goodput.json").write_text('{"time": 1.0, "step": 3}')
    with pytest.raises(InputError, match="goodput.json: damaged"):
        Goodput(tmp_path, time.time())


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
    for one in [printed, *(one["cause"] for one in lines)][: 2 * reported]:
        assert one.count("test_watchdog.py") == 1 and one.count("Thread 0x") + one.count("thread 0x") >= 3


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
    assert stalls[0]["event"] == "stall" and "phase 'data'" in stalls[0]["cause"] and "in hang" in stalls[0]["cause"]
    begun = time.time()
    train.train(tiny_run, tmp_path)
    seconds = json.loads((tmp_path / "goodput.json").read_text())["seconds"]
    assert seconds["data"] > 1.0 and seconds["again"] > 0 and seconds["step"] > 0 and seconds["restore"] > 0
    assert seconds["down"] < time.time() - begun
    lines = [line for line in capfd.readouterr().err.splitlines() if "goodput" in line]
    assert len(lines) == 2 and "waiting for data" in lines[1]
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    shares = [value for name, value in logged[-1].items() if name.startswith(("4_speed/goodput", "4_speed/lost_to"))]
    assert np.sum(shares) == pytest.approx(1.0)
