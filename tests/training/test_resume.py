"""Nothing is lost: a run that was killed, again and again, ends in the bits of one that nobody killed."""

import random
import signal
import time

import pytest

from llada_jax.tools import kill_test

MANY = 10**6  # steps: the run is killed or stopped before


def strike(workdir, processes, moments):
    draw = random.Random(1)
    for moment in moments:
        struck = kill_test.kill(kill_test.Run(workdir, processes, MANY), moment, draw)
        assert struck is not None, f"ended before {moment}"
        assert set(struck.codes) <= {1}  # the others end, too, with a code that the babysitter starts again


def stop(workdir, processes):
    """SIGTERM to the last process when one step or more is done; returns the step that all have saved."""
    run = kill_test.Run(workdir, processes, MANY)
    lines = run.lines()
    while run.moment() != "computing" or run.lines() <= lines:
        assert run.is_running(), run.output()
        time.sleep(0.01)
    run.children[-1].send_signal(signal.SIGTERM)
    assert run.wait() == [75] * processes, run.output()
    return max(run.steps())


@pytest.mark.slow
@pytest.mark.parametrize("processes, moments", [(1, ["saving", "restoring"]), (2, ["saving"])])
def test_killed_and_stopped_runs_end_in_the_same_bits_and_the_same_metrics(tmp_path, processes, moments):
    strike(tmp_path / "killed", processes, moments)
    last = stop(tmp_path / "killed", processes) + 5
    for name in ("killed", "whole"):
        kill_test.finish(tmp_path / name, processes, last)
    compared = kill_test.same(tmp_path / "whole", tmp_path / "killed")
    assert last in [step for step, _, _ in compared]
    assert all(one == other for _, one, other in compared)
    lines = kill_test.metrics(tmp_path / "whole")
    assert [line["step"] for line in lines if "1_loss/loss" in line] == list(range(1, last + 1))
    assert kill_test.metrics(tmp_path / "killed") == lines
