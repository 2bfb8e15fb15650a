"""Nothing is lost: a run that was killed, stopped, moved to other devices or found its checkpoint damaged goes on."""

import errno
import json
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from llada_jax import cli
from llada_jax.data import sources
from llada_jax.fields import InputError
from llada_jax.files import CHECKSUMS, write_checksums
from llada_jax.interop.workdir import load_config, saved_steps
from llada_jax.model.config import model_config
from llada_jax.parallel.mesh import make_mesh
from llada_jax.tools import kill_test
from llada_jax.tools.digest import digest
from llada_jax.training import checkpoint, preemption, writer
from llada_jax.training import run as train
from llada_jax.training.step import init_state

ROOT = Path(__file__).resolve().parents[2]
MANY = 10**6  # steps: the run is killed or stopped before


@pytest.fixture(scope="module")
def make_run(tmp_path_factory, make_tiny_run):
    file = tmp_path_factory.mktemp("files") / "poems.jsonl"
    texts = [
        json.dumps({"text": sources.couplet_text(a, b)}, ensure_ascii=False) for a, b, _ in sources.couplets()[:60]
    ]
    file.write_text("\n".join(texts), encoding="utf-8")

    def make(**train_fields):
        run = make_tiny_run()
        run.data.files = str(file)
        run.optimizer.schedule = (("constant", 1e-3, "100%"),)
        run.train.update(dict(log_every=1, eval_every=0) | train_fields)
        run.checkpoint.update(dict(every_steps=2, keep=5))
        return run

    return make


@pytest.fixture(scope="module")
def trained(tmp_path_factory, make_run):
    """A run of six steps with the checkpoints 2, 4 and 6."""
    workdir = tmp_path_factory.mktemp("trained") / "w"
    train.train(make_run(steps=6), workdir)
    return workdir


@pytest.fixture
def workdir(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "w")


def steps(workdir):
    return sorted(saved_steps(workdir / "checkpoints"))


def events(workdir):
    return [json.loads(line) for line in (workdir / "events.jsonl").read_text().splitlines()]


def largest_file(directory):
    return max((path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


# --- killed ---


def strike(workdir, processes, moments):
    draw = random.Random(1)  # of two processes the first, whose end the other notices at once
    for moment in moments:
        struck = kill_test.kill(kill_test.Run(workdir, processes, MANY), moment, draw)
        assert struck is not None, f"ended before {moment}"
        assert not {0, 2} & set(struck.codes)  # the others end, too, with a code that the babysitter starts again


def stop(workdir, processes):
    """SIGTERM to the last process when one step or more is done; returns the step that all have saved."""
    run = kill_test.Run(workdir, processes, MANY)
    lines = run.lines()
    while run.moment() != "computing" or run.lines() <= lines:
        assert run.is_running(), run.output()
        time.sleep(0.01)
    run.children[-1].send_signal(signal.SIGTERM)
    assert run.wait() == [cli.TRY_AGAIN] * processes, run.output()
    (event,) = (event for event in events(workdir) if event["event"] == "preemption")
    assert event["cause"] == "SIGTERM" and event["step"] == max(steps(workdir))
    assert kill_test.metrics(workdir)[-1]["step"] == event["step"]
    return event["step"]


@pytest.mark.parametrize("processes, moments", [(1, ["saving", "restoring"]), (2, ["saving"])])
def test_killed_and_stopped_runs_end_in_the_same_bits_and_the_same_metrics(tmp_path, processes, moments):
    strike(tmp_path / "killed", processes, moments)
    last = stop(tmp_path / "killed", processes) + 5
    for name in ("killed", "whole"):
        kill_test.finish(kill_test.Run(tmp_path / name, processes, last))
    compared = kill_test.same(tmp_path / "whole", tmp_path / "killed")
    assert last in [step for step, _, _ in compared]
    assert all(one == other for _, one, other in compared)
    lines = kill_test.metrics(tmp_path / "whole")
    assert [line["step"] for line in lines if "1_loss/loss" in line] == list(range(1, last + 1))
    assert kill_test.metrics(tmp_path / "killed") == lines


def test_a_second_sigterm_ends_a_program_at_once_that_is_busy(tmp_path):
    program = """if True:
        import jax
        from llada_jax.training import preemption
        with preemption.Requests(jax.make_mesh((1,), ("data",), devices=jax.devices()[:1]), 0):
            print("ready", flush=True)
            jax.block_until_ready(jax.jit(lambda x: jax.lax.while_loop(lambda x: x < 2, lambda x: 1 - x, x))(0))
    """
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE) as child:
        try:
            assert child.stdout and child.stdout.readline() == b"ready\n"
            for _ in range(2):
                time.sleep(1)
                assert child.poll() is None
                child.terminate()
            assert child.wait(20) == 128 + signal.SIGTERM
        finally:
            child.kill()


# --- saved by the clock, by steps, for good ---


def test_checkpoints_are_kept_by_number_and_by_step_and_saved_by_the_clock(make_run, tmp_path):
    run = make_run(steps=4)
    run.checkpoint.update(dict(every_steps=100, every_minutes=1e-9, keep=1, keep_every_steps=2))
    train.train(run, tmp_path / "w")
    assert steps(tmp_path / "w") == [2, 4]
    run.train.steps = 5
    train.train(run, tmp_path / "w")
    assert steps(tmp_path / "w") == [2, 4, 5]


def test_a_request_is_heeded_between_two_steps_and_the_run_goes_on_from_there(make_run, trained, tmp_path, monkeypatch):
    polls = iter([preemption.NOTHING, preemption.SAVE, preemption.STOP])
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


# --- damaged ---


def truncate(place):
    path = largest_file(place)
    path.write_bytes(path.read_bytes()[:-1])


def flip(place):
    path = largest_file(place)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage, cause",
    [
        (truncate, "bytes, not"),
        (flip, "the right size and another content"),
        (lambda place: largest_file(place).unlink(), "no such file"),
        (lambda place: (place / CHECKSUMS).write_text("{"), "checksums.json cannot be read"),
        (lambda place: (place / CHECKSUMS).write_text('{"../a": [1, ""]}'), "names '../a', which is not in"),
    ],
)
def test_a_damaged_checkpoint_is_moved_aside_and_the_one_before_taken(workdir, make_run, capsys, damage, cause):
    damage(workdir / "checkpoints" / "6")
    assert checkpoint.Checkpointer(workdir, make_run()).newest() == 4
    assert steps(workdir) == [2, 4] and (workdir / "checkpoints" / "6.damaged").is_dir()
    (event,) = events(workdir)
    assert event["event"] == "checkpoint damaged" and event["step"] == 6 and cause in event["cause"]
    assert capsys.readouterr().err.count("\n") == 1


def test_a_run_whose_newest_checkpoint_is_damaged_ends_in_the_same_bits(workdir, trained, make_run):
    flip(workdir / "checkpoints" / "6")
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "1_lo')
    train.train(make_run(steps=6), workdir)
    assert digest(workdir, 6) == digest(trained, 6)
    assert kill_test.metrics(workdir) == kill_test.metrics(trained)


def test_a_run_without_an_undamaged_checkpoint_does_not_begin_anew_by_itself(workdir, make_run):
    for step in (2, 4, 6):
        truncate(workdir / "checkpoints" / str(step))
    with pytest.raises(InputError, match="6.damaged, 4.damaged, 2.damaged.*copy one back"):
        train.train(make_run(steps=6), workdir)
    assert len(list((workdir / "checkpoints").glob("*.damaged"))) == 3


def test_what_a_kill_left_is_no_checkpoint_and_goes(workdir, make_run):
    places = workdir / "checkpoints"
    shutil.copytree(places / "6", places / "8.writing")
    (places / "4").rename(places / "4.removing")
    assert checkpoint.Checkpointer(workdir, make_run()).newest() == 6
    assert sorted(path.name for path in places.iterdir()) == ["2", "6"]


# --- a full disk ---


def test_a_save_that_fails_does_not_end_the_run_and_the_next_one_succeeds(workdir, trained, make_run, monkeypatch):
    write = write_checksums

    def full(place):
        if place.name == "8.writing":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(place)

    monkeypatch.setattr(checkpoint, "write_checksums", full)
    train.train(make_run(steps=10), workdir)
    assert steps(workdir) == [2, 4, 6, 10] and not list(workdir.glob("checkpoints/*.*"))
    (event,) = (event for event in events(workdir) if event["event"] == "save failed")
    assert event["step"] == 8 and event["cause"] == "no space left on device"


def test_the_last_save_that_fails_is_an_error_and_earlier_checkpoints_stay(workdir, make_run, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.ocp, "save_checkpointables_async", full)
    with pytest.raises(InputError, match="the last save failed .no space left on device.; free some space"):
        train.train(make_run(steps=8), workdir)
    assert steps(workdir) == [2, 4, 6] and digest(workdir)[0] == 6


def test_lines_wait_for_a_full_disk_and_hold_a_checkpoint_back(tmp_path):
    lines, board = writer.Lines(tmp_path / "metrics.jsonl", 0), writer.Board(tmp_path, 0)
    full = open("/dev/full", "ab", buffering=2**20)
    for log in (lines, board):
        log._file.close()
        log._file = full
    lines.write({"step": 1})
    board.add_scalar("loss", 1.0, 1)
    for log in (lines, board):
        with pytest.raises(OSError, match="No space left"):
            log.flush()
    with pytest.raises(OSError, match="No space left"):
        full.close()


# --- logs ---


def test_metrics_are_cut_back_to_the_checkpoint_at_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 2, "v": 1}\n{"step": 3}\n{"st')
    lines = writer.Lines(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 2, "v": 1}\n'
    lines.write({"step": 3})
    lines.close()
    assert path.read_text().endswith('1}\n{"step": 3}\n') and not (tmp_path / "metrics.jsonl.tmp").exists()


def test_tensorboard_gets_what_is_flushed_and_hides_what_is_trained_again(tmp_path):
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    board = writer.Board(tmp_path, 4)
    board.add_scalar("loss", 0.5, 5)
    board.add_text("sample", "床前", 5)
    board.flush()
    (path,) = tmp_path.glob("events.out.tfevents.*")
    data, found = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        found.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    assert found[0].file_version == "brain.Event:2"
    assert (found[1].step, found[1].session_log.status) == (5, SessionLog.START)  # TensorBoard drops steps from 5 on
    assert found[2].summary.value[0].simple_value == 0.5 and found[3].step == 5
    board.close()


# --- elsewhere ---


def test_a_run_goes_on_with_fewer_devices_and_on_another_mesh(trained, make_run, tmp_path, monkeypatch):
    for done, devices, sizes in ((2, 8, {}), (4, 4, dict(fsdp=2, tensor=2)), (6, 1, {})):
        monkeypatch.setattr(jax, "device_count", lambda count=devices: count)
        monkeypatch.setattr(train, "make_mesh", lambda s, count=devices: make_mesh(s, jax.devices()[:count]))
        run = make_run(steps=done)
        run.mesh.update(sizes)
        train.train(run, tmp_path / "w")
    found, expected = (kill_test.metrics(workdir) for workdir in (tmp_path / "w", trained))
    assert found[:2] == expected[:2]
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_a_digest_depends_on_every_bit_and_not_on_the_mesh(trained, make_run, tmp_path):
    config = model_config(load_config(trained)["model"])
    run, found = make_run(), {}
    optimizer = train.training_step(make_run(steps=6), make_mesh(dict(run.mesh)))[0]
    for name, sizes, bit in (("a", {}, 0), ("b", dict(fsdp=4, tensor=2), 0), ("c", {}, 1)):
        mesh = make_mesh(dict(run.mesh) | sizes)
        saver = checkpoint.Checkpointer(tmp_path / name, run)
        with jax.set_mesh(mesh):
            init = jax.jit(init_state, static_argnums=(0, 1))
            state, _ = checkpoint.Checkpointer(trained, run).restore(6, init(config, optimizer, jax.random.key(0)))
            if bit:
                leaves, tree = jax.tree.flatten(state.model)
                changed = np.array(leaves[0])
                changed.flat[0] = np.nextafter(changed.flat[0], np.float32(2))
                state.trainable = jax.tree.unflatten(tree, [jax.device_put(changed, leaves[0].sharding), *leaves[1:]])
            saver.save(6, state)
            saver.finish()
        found[name] = digest(tmp_path / name)
    assert found["a"] == found["b"] == digest(trained, 6) != found["c"]


# --- another config ---


def test_the_learning_rate_changes_only_with_permission_and_every_change_is_an_event(workdir, make_run):
    run = make_run(steps=8)
    run.optimizer.schedule = (("constant", 5e-4, "100%"),)
    with pytest.raises(InputError, match=r"schedule: .*0\.001.* -> .*0\.0005.*; --allow_config_change continues"):
        train.train(run, workdir)
    assert not (workdir / "events.jsonl").exists()
    train.train(run, workdir, allow_config_change=True)
    (event,) = events(workdir)
    assert event["event"] == "config changed" and event["step"] == 6
    assert "config.train.steps: 6 -> 8" in event["cause"] and "config.optimizer.schedule: " in event["cause"]
    run.model.d_model = 64
    with pytest.raises(InputError, match=r"d_model: 32 -> 64"):
        train.train(run, workdir, allow_config_change=True)
