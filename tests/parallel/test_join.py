"""How processes find each other, and how they end together, each in one line."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ports import free_port

from llada_jax.parallel import join
from llada_jax.tools import kill_test

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 300  # seconds, for a machine that is busy with other things


def start(port, count, numbers, *flags):
    """Some of `count` processes of a program that only joins and leaves."""
    program = "from llada_jax import cli; from llada_jax.parallel import join; join.define_flags(); "
    program += "cli.run(join.joined(lambda argv: print('joined')))"
    place = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}", *flags]
    return [
        subprocess.Popen(
            [sys.executable, "-c", program, *place, f"--process_id={i}"], cwd=ROOT, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )
        for i in numbers
    ]  # fmt: skip


@pytest.mark.slow
def test_processes_that_do_not_come_are_named_by_all_that_came():
    port = free_port()
    running = start(port, 4, (0, 2), "--join_timeout_seconds=8")
    for child in running:
        _, printed = child.communicate(timeout=TIMEOUT)
        assert child.returncode == 1
        line = f"error: processes 1, 3 of 4 did not join 127.0.0.1:{port} within 8 seconds"
        assert printed.splitlines() == [line]


def test_a_first_process_that_does_not_come_is_named():
    port = free_port()
    (child,) = start(port, 2, (1,), "--join_timeout_seconds=1")
    _, printed = child.communicate(timeout=TIMEOUT)
    assert child.returncode == 1
    assert printed.splitlines() == [f"error: process 0 did not answer at 127.0.0.1:{port} within 1 seconds"]


def test_a_line_of_another_process_is_the_last_one(monkeypatch, capsys):
    """The first process waits so that all can read why, and its main thread prints meanwhile what the fault broke."""
    monkeypatch.setattr(join, "_client", object)
    monkeypatch.setattr(join.time, "sleep", lambda _: join.cli.say("train: goodput 2.0%"))
    monkeypatch.setattr(join.cli, "end", lambda code: join.cli.say(f"ended with {code}"))
    join.leave(1, "error: process 1 stopped")
    assert capsys.readouterr().err.splitlines() == ["train: goodput 2.0%", "error: process 1 stopped", "ended with 1"]


def test_another_service_at_the_port_and_strangers_do_not_hinder(tmp_path):
    """A run that is ending may still have the port; whoever scans ports says nothing that we understand."""
    port = free_port()
    with socket.create_server(("127.0.0.1", port)) as old:
        old.settimeout(TIMEOUT)
        running = start(port, 2, (1,))
        stranger, _ = old.accept()
        stranger.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        stranger.close()
    running += start(port, 2, (0,))
    end = time.monotonic() + TIMEOUT
    while time.monotonic() < end:
        try:
            with socket.create_connection(("127.0.0.1", port), 1) as scan:
                scan.sendall(b"GET / HTTP/1.1\r\n\r\n")
                break
        except OSError:
            time.sleep(0.05)
    for child in running:
        out, printed = child.communicate(timeout=TIMEOUT)
        assert (child.returncode, out.splitlines()[-1]) == (0, "joined"), printed


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_process_is_killed_the_other_ends_within_seconds_in_one_line(tmp_path, victim):
    run = kill_test.Run(tmp_path / "w", 2, 10**6)
    while run.moment() != "computing" or run.lines() < 2:
        assert run.is_running(), run.output()
        time.sleep(0.01)
    before = run.logs[1 - victim].read_text()
    began = time.monotonic()
    run.children[victim].kill()
    codes = run.wait()
    assert codes[1 - victim] == 1 and time.monotonic() - began < 25  # a heartbeat is missed after 10 s
    printed = run.logs[1 - victim].read_text().removeprefix(before).splitlines()
    lines = [line for line in printed if not line.startswith(("train: step", "train: goodput"))]  # of the run itself
    assert len(lines) == 1 and lines[0].startswith("error: another process of this run is gone"), printed


@pytest.mark.parametrize(
    "number, code", [(signal.SIGTERM, 75), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_signal_to_one_process_in_the_loop_saves_and_ends_all(tmp_path, number, code, steps, events):
    run = kill_test.Run(tmp_path / "w", 2, 10**6)
    while run.moment() != "computing" or run.lines() < 2:
        assert run.is_running(), run.output()
        time.sleep(0.01)
    run.children[1].send_signal(number)
    assert run.wait() == [code, code], run.output()
    (event,) = events(tmp_path / "w", "preemption")
    assert event["step"] == max(steps(tmp_path / "w")) == kill_test.metrics(tmp_path / "w")[-1]["step"]
    for log in run.logs:
        assert "Traceback" not in log.read_text() and log.read_text().count("is saved, the same command continues") == 1


def test_a_signal_to_one_process_before_the_loop_ends_all_with_its_code(tmp_path):
    run = kill_test.Run(tmp_path / "w", 2, 10**6)
    while run.moment() != "preparing":
        assert run.is_running(), run.output()
        time.sleep(0.01)
    began = time.monotonic()
    run.children[1].terminate()
    assert run.wait() == [75, 75], run.output()
    assert time.monotonic() - began < 10 and "Traceback" not in run.output()
    assert run.output().count("stopped by SIGTERM before it could save") == 2


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--coordinator=localhost:1"], "belong together; --num_processes and --process_id not given"),
        (["--coordinator=localhost:1", "--num_processes=2", "--process_id=2"], "--process_id=2 is not one of 0 to 1"),
        (
            ["--coordinator=localhost", "--num_processes=2", "--process_id=1"],
            "--coordinator=localhost is not HOST:PORT",
        ),
        (["--distributed"], "the environment names no cluster"),
    ],
)
def test_flags_that_join_nothing_are_named(flags, message):
    command = [sys.executable, "-m", "llada_jax.sample", *flags]
    environment = os.environ | {"TPU_SKIP_MDS_QUERY": "1"}  # or JAX asks the network whether this is a TPU's host
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 2 and message in done.stderr.splitlines()[-1], done.stderr


@pytest.mark.parametrize(
    "environment, marked",
    [
        ({}, False),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "job-0.svc,job-1.svc"}, True),
        ({"TPU_WORKER_HOSTNAMES": "job-0.svc,job-1.svc", "JAX_PLATFORMS": "cpu"}, False),
        ({"TPU_PROCESS_ADDRESSES": "a:8471,b:8471", "JAX_PLATFORMS": "tpu,cpu"}, True),
        ({"MEGASCALE_NUM_SLICES": "1"}, False),
        ({"MEGASCALE_NUM_SLICES": "2", "TPU_WORKER_HOSTNAMES": "localhost"}, True),
    ],
)
def test_several_tpu_hosts_are_seen_in_the_environment(environment, marked):
    assert join.is_marked(environment) == marked
