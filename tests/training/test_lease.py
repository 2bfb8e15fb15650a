"""Whose a workdir is: one run at a time, the same run, and nobody's as long as nothing was saved in it."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llada_jax.fields import InputError
from llada_jax.files import write_atomic
from llada_jax.interop import hf
from llada_jax.tools import kill_test
from llada_jax.tools.digest import digest
from llada_jax.training import run as train
from llada_jax.training import workdir as workdirs

ROOT = Path(__file__).resolve().parents[2]


# --- one run at a time ---


def test_a_second_run_is_refused_in_one_line_and_the_first_goes_on(make_run, tmp_path):
    first = kill_test.Run(tmp_path / "w", 1, 10**6)
    while first.moment() != "computing":
        assert first.is_running(), first.output()
        time.sleep(0.01)
    child = first.children[0]
    with pytest.raises(InputError, match=rf"w: process {child.pid} on .* trains there; stop that, or choose another"):
        train.train(make_run(), tmp_path / "w")
    before = first.lines()
    while first.lines() < before + 3:
        assert first.is_running(), first.output()
    child.kill()
    assert child.wait() == -9
    lease = workdirs.Lease(tmp_path / "w")  # of a killed run: at once
    lease.release()


@pytest.fixture
def elsewhere(monkeypatch):
    """Leases are written by a run on another machine while it is open."""
    monkeypatch.setattr(workdirs, "LEASE_SECONDS", 3.0)
    monkeypatch.setattr(workdirs, "_RENEW_SECONDS", 0.2)
    with monkeypatch.context() as patch:
        patch.setattr(workdirs, "_machine", lambda: "another")
        yield patch


def test_a_run_on_another_machine_is_watched_and_respected_while_it_lives(tmp_path, elsewhere):
    other = workdirs.Lease(tmp_path)
    elsewhere.undo()
    with pytest.raises(InputError, match="trains there"):
        workdirs.Lease(tmp_path)
    other.release()


def test_a_run_on_another_machine_that_shows_no_sign_of_life_is_succeeded(tmp_path, elsewhere, capsys):
    elsewhere.setattr(workdirs.Lease, "_keep", lambda self: None)
    workdirs.Lease(tmp_path)
    elsewhere.undo()
    began = time.monotonic()
    workdirs.LEASE_SECONDS = 3.0
    try:
        workdirs.Lease(tmp_path).release()
    finally:
        workdirs.LEASE_SECONDS = 60.0
    assert 2 < time.monotonic() - began < 10
    assert "looking for 3 s whether the run on" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "{", "[]", '{"run": 3}', "[" * 10**5])
def test_a_damaged_lease_is_nobodys(tmp_path, text):
    (tmp_path / "lease.json").write_text(text)
    workdirs.Lease(tmp_path).release()
    assert not (tmp_path / "lease.json").exists()


def test_of_two_runs_that_begin_at_once_the_later_one_stays(tmp_path):
    first = workdirs.Lease(tmp_path)
    stored = json.loads((tmp_path / "lease.json").read_text())
    write_atomic(tmp_path / "lease.json", json.dumps(stored | {"run": "another", "pid": 7}))
    with pytest.raises(InputError, match="process 7 on .* began there just now, too"):
        first.confirm()
    first.release()
    assert (tmp_path / "lease.json").exists()


def test_a_run_whose_workdir_was_taken_over_ends_at_once(tmp_path):
    """As after a long sleep of its machine: whatever it still wrote would be in the other's way."""
    program = f"""if True:
        import json, pathlib, time
        from llada_jax.training import workdir
        workdir._RENEW_SECONDS = 0.2
        workdir.Lease(pathlib.Path({str(tmp_path)!r}))
        path = pathlib.Path({str(tmp_path)!r}) / "lease.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {{"run": "another", "pid": 7}}))
        time.sleep(60)
    """
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "was taken over by process 7" in done.stderr and done.stderr.count("\n") == 1


# --- nobody's ---


@pytest.mark.parametrize("mistake", ["init_from", "attention", "kernel", "threads", "schedule", "vocabulary", "rows"])
def test_a_start_that_fails_leaves_nothing_and_the_corrected_command_runs(make_run, tmp_path, trained, mistake, steps):
    def wrong(run):
        if mistake == "init_from":
            source = shutil.copytree(trained, tmp_path / "source", dirs_exist_ok=True)
            for place in (source / "checkpoints").glob("*/model"):
                shutil.rmtree(place)
            run.train.init_from = str(source)
        if mistake == "attention":
            run.objective.attention = "foo"
        if mistake == "kernel":
            run.model.attention_kernel = "foo"
        if mistake == "threads":
            run.data.threads = -1
        if mistake == "schedule":
            run.optimizer.schedule = (("linear", 1e-3, "soon"),)
        if mistake == "vocabulary":
            run.model.vocab_size = run.model.embedding_size = 64
        if mistake == "rows":
            run.data.validation_fraction = 0.999999
        return run

    for _ in range(2):
        with pytest.raises(InputError) as caught:
            train.train(wrong(make_run(steps=2)), tmp_path / "w")
        assert "\n" not in str(caught.value) and not (tmp_path / "w").exists()
    train.train(make_run(steps=2), tmp_path / "w")
    assert steps(tmp_path / "w") == [2]


@pytest.mark.slow
def test_what_a_killed_start_left_is_replaced_where_the_config_is_another(make_run, tmp_path, monkeypatch, steps):
    """Killed after its data was prepared and before anything was saved."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "_start", stop)
        train.train(make_run(), tmp_path / "w")
    assert (tmp_path / "w" / "data" / "manifest.json").exists()
    run = make_run(steps=2)
    run.data.row_length, run.optimizer.b2, run.data.tokenizer_type, run.data.vocab_size = 20, 0.5, "bpe", 700
    train.train(run, tmp_path / "w")
    train.train(run, tmp_path / "new")
    assert digest(tmp_path / "w", 2) == digest(tmp_path / "new", 2)


def test_data_that_a_killed_start_prepared_is_used_by_the_same_command(make_run, tmp_path, monkeypatch):
    made = set()
    for _ in range(2):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(train, "_start", stop)
            train.train(make_run(), tmp_path / "w")
        made.add((tmp_path / "w" / "data" / "manifest.json").stat().st_mtime_ns)
    assert len(made) == 1


def stop(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize("text", ['{"architectures": ["LLaDAModelLM"]}', '{"model": {}}'])
def test_a_config_that_is_of_no_run_is_never_replaced(make_run, tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match="config.json: of no training run, and a run would replace it"):
        train.train(make_run(), tmp_path)
    assert (tmp_path / "config.json").read_text() == text and [path.name for path in tmp_path.iterdir()] == [
        "config.json"
    ]


@pytest.mark.parametrize(
    "place, code",
    [("/proc/x", 2), ("/etc/passwd/x", 2), ("w" * 300, 2), ("full/w", 2)],
)
def test_a_place_that_cannot_be_is_one_line_and_code_2(tmp_path, place, code):
    (tmp_path / "full").write_text("")
    command = [sys.executable, "-m", "llada_jax.train", *kill_test.RUN, f"--workdir={tmp_path / place}"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == code and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr, done.stderr


# --- the same run ---


@pytest.mark.parametrize("gone", ["checkpoints", "checkpoints/*"])
def test_checkpoints_that_are_gone_are_missed(workdir, make_run, gone):
    for place in workdir.glob(gone):
        shutil.rmtree(place)
    lines = (workdir / "metrics.jsonl").read_text()
    with pytest.raises(InputError, match="holds no checkpoint, but this run had saved step 6; mount or copy it back"):
        train.train(make_run(steps=8), workdir)
    assert (workdir / "metrics.jsonl").read_text() == lines


def test_fewer_steps_than_were_made_are_refused(workdir, make_run):
    config = (workdir / "config.json").read_text()
    with pytest.raises(InputError, match="config.train.steps is 5, but .* has reached step 6"):
        train.train(make_run(steps=5), workdir)
    assert (workdir / "config.json").read_text() == config


def test_the_learning_rate_changes_only_with_permission_and_every_change_is_an_event(workdir, make_run, events):
    run = make_run(steps=8)
    run.optimizer.schedule = (("constant", 5e-4, "100%"),)
    with pytest.raises(InputError, match=r"schedule: .*0\.001.* -> .*0\.0005.*; --allow_config_change continues"):
        train.train(run, workdir)
    assert not events(workdir)
    train.train(run, workdir, allow_config_change=True)
    (event,) = events(workdir)
    assert event["event"] == "config changed" and event["step"] == 6
    assert "config.train.steps: 6 -> 8" in event["cause"] and "config.optimizer.schedule: " in event["cause"]
    run.model.d_model = 64
    with pytest.raises(InputError, match=r"d_model: 32 -> 64"):
        train.train(run, workdir, allow_config_change=True)


@pytest.mark.parametrize(
    "schedule, moved",
    [
        ((("constant", 1e-3, "50%"), ("linear", 1e-4, "100%")), "rate of step 95: 0.00019 -> 0.001"),
        ((("constant", 1e-3, "90%"), ("constant", 1e-4, "100%")), "rate of step 95: 0.0001 -> 0.001"),
        ((("constant", 1e-3, "2 steps"), ("constant", 1e-4, "100%")), ""),
        ((("linear", 1e-3, "2 steps"), ("constant", 1e-3, "9 steps")), ""),
    ],
)
def test_steps_that_move_phases_in_percent_need_permission(make_run, schedule, moved):
    old, new = make_run(steps=100), make_run(steps=200)
    old.optimizer.schedule = new.optimizer.schedule = schedule
    found = workdirs._moved_rates(*(json.loads(json.dumps(run.to_dict())) for run in (old, new)), reached=95)
    assert len(found) == bool(moved)
    assert all(re.search(moved, line) for line in found), found


@pytest.mark.slow
def test_a_run_goes_on_without_the_files_and_the_model_that_it_began_with(make_run, trained, tmp_path):
    source = shutil.copytree(trained, tmp_path / "source")
    run = make_run(steps=4)
    book = shutil.copy(run.data.files, tmp_path / "book.jsonl")
    run.data.files, run.train.init_from = str(book), str(source)
    train.train(run, tmp_path / "whole")
    run.train.steps = 2
    train.train(run, tmp_path / "w")
    book.rename(tmp_path / "gone.jsonl")
    source.rename(tmp_path / "gone")
    run.train.steps = 4
    train.train(run, tmp_path / "w")
    assert digest(tmp_path / "w", 4) == digest(tmp_path / "whole", 4)


def test_a_converted_model_is_no_workdir_to_train_in(make_run, trained, tmp_path):
    hf.save_workdir(hf.load(trained), tmp_path / "converted", source_dir=trained)
    with pytest.raises(InputError, match="of no training run"):
        train.train(make_run(), tmp_path / "converted")
