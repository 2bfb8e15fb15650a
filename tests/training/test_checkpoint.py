"""Checkpoints: which are kept, what a kill, a full disk or damage does to them, and which one a run continues from."""

import errno
import os
import shutil

import jax
import pytest

from llada_jax.fields import InputError, RunFailed
from llada_jax.files import COMMIT, checksums, damage
from llada_jax.parallel.mesh import make_mesh
from llada_jax.tools import kill_test
from llada_jax.tools.digest import digest
from llada_jax.training import checkpoint
from llada_jax.training import run as train
from llada_jax.training.monitor import Events


def largest_file(directory):
    return max((path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


# --- kept ---


def test_checkpoints_are_kept_by_number_and_by_step_and_saved_by_the_clock(make_run, tmp_path, steps):
    run = make_run(steps=4)
    run.checkpoint.update(dict(every_steps=100, every_minutes=1e-9, keep=1, keep_every_steps=2))
    train.train(run, tmp_path / "w")
    assert steps(tmp_path / "w") == [2, 4]
    run.train.steps = 5
    train.train(run, tmp_path / "w")
    assert steps(tmp_path / "w") == [2, 4, 5]


def test_every_file_of_a_checkpoint_has_a_checksum(trained):
    place = trained / "checkpoints" / "6"
    files = {path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()}
    assert checksums(place).keys() == files - {COMMIT, "checksums.json"} and not damage(place)


@pytest.mark.parametrize("name", ["²", "٣٤", "012", "12", "+8", "8.writing"])
def test_what_is_no_checkpoint_is_none(workdir, make_run, name, steps, events):
    (workdir / "checkpoints" / name).mkdir()
    if not name.isdigit() or name != "12":
        (workdir / "checkpoints" / name / COMMIT).touch()
    assert steps(workdir) == [2, 4, 6]
    train.train(make_run(steps=8), workdir)
    assert steps(workdir) == [2, 4, 6, 8] and not events(workdir, "checkpoint damaged")


# --- damaged ---


def restored(workdir, run):
    """The state that a run would continue from, and the step."""
    mesh = make_mesh(dict(run.mesh))
    model = train.fit_to_tokenizer(run, train.load_tokenizer(workdir / "tokenizer"))
    with jax.set_mesh(mesh):
        like = train._abstract_state(model, train.training_step(run, mesh)[0], mesh)
        found = checkpoint.Checkpointer(workdir, run, Events(workdir)).restore(like)
    assert found is not None
    return found[0]


def truncate(place):
    path = largest_file(place)
    path.write_bytes(path.read_bytes()[:-1])


def flip(place):
    path = largest_file(place)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def halve(place):
    path = largest_file(place)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def without_checksums(harm):
    def apply(place):
        (place / "checksums.json").unlink()
        harm(place)

    return apply


def write_checksums(text):
    return lambda place: (place / "checksums.json").write_text(text)


def pipe(place):
    (place / "checksums.json").unlink()
    os.mkfifo(place / "checksums.json")


def empty(place):
    for path in place.iterdir():
        if path.name != COMMIT:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


# TensorStore's threads still report to Orbax's event loop when it is gone; cli.py is silent about that, too.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    "harm, cause",
    [
        (truncate, "bytes, not"),
        (flip, "the right size and another content"),
        (lambda place: largest_file(place).unlink(), "no such file"),
        (write_checksums("{"), "checksums.json cannot be read"),
        (write_checksums('{"a": ' * 10**5), "checksums.json cannot be read"),
        (write_checksums('{"a\\u0000": [1, ""]}'), "which is not in the directory"),
        (write_checksums('{"../a": [1, ""]}'), "checksums name '../a', which is not in"),
        (write_checksums('{"a": {"size": 1}}'), "are not a size and a SHA-256"),
        (pipe, "checksums.json cannot be read"),
        (without_checksums(halve), "cannot be loaded"),
        (without_checksums(lambda place: shutil.rmtree(place / "optimizer")), "cannot be loaded"),
        (empty, "cannot be loaded"),
    ],
)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_taken(
    workdir, trained, make_run, capsys, harm, cause, steps, events
):
    place = workdir / "checkpoints" / "6"
    harm(place)
    left = {path.name for path in place.iterdir()}
    assert int(restored(workdir, make_run()).step) == 4
    assert steps(workdir) == [2, 4]
    assert {path.name for path in place.iterdir()} == (left - {COMMIT}) | {"damaged.txt"}
    assert cause in (place / "damaged.txt").read_text()
    (event,) = events(workdir, "checkpoint damaged")
    assert event["step"] == 6 and cause in event["cause"]
    assert capsys.readouterr().err.count("checkpoint damaged") == 1
    train.train(make_run(steps=6), workdir)
    assert digest(workdir, 6) == digest(trained, 6) and not (place / "damaged.txt").exists()


def test_a_checkpoint_without_checksums_is_one_if_orbax_has_completed_it(workdir, trained, make_run, events):
    (workdir / "checkpoints" / "6" / "checksums.json").unlink()
    train.train(make_run(steps=8), workdir)
    assert not events(workdir, "checkpoint damaged")
    assert [line["step"] for line in kill_test.metrics(workdir)] == list(range(1, 9))


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
    with pytest.raises(InputError, match="every checkpoint is damaged, as damaged.txt in 6, 4, 2 says; copy one back"):
        train.train(make_run(steps=6), workdir)
    with pytest.raises(InputError, match="this run had saved step 6; mount or copy it back"):
        train.train(make_run(steps=6), workdir)
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["2", "4", "6"]


def test_files_that_cannot_be_read_just_now_are_not_taken_for_damaged(workdir, make_run, monkeypatch, steps):
    def away(*_, **__):
        raise ValueError("UNAVAILABLE: the bucket does not answer")

    (workdir / "checkpoints" / "6" / "checksums.json").unlink()
    monkeypatch.setattr(checkpoint.ocp, "load_checkpointables", away)
    with pytest.raises(ValueError, match="UNAVAILABLE"):
        train.train(make_run(steps=8), workdir)
    assert steps(workdir) == [2, 4, 6]


# --- killed ---


def test_what_a_kill_left_of_a_save_or_a_removal_is_no_checkpoint_and_goes(workdir, make_run, steps, events):
    places = workdir / "checkpoints"
    shutil.copytree(places / "6", places / "8")
    for step in ("4", "8"):
        (places / step / COMMIT).unlink()
    train.train(make_run(steps=10), workdir)
    assert steps(workdir) == [2, 6, 8, 10] and len(events(workdir)) == len(events(workdir, "config changed"))


# --- a full disk ---


def test_a_save_that_fails_does_not_end_the_run_and_the_next_one_succeeds(
    workdir, make_run, monkeypatch, steps, events
):
    start = checkpoint.ocp.training.Checkpointer.save_checkpointables_async

    class Full:
        def __init__(self, writing):
            self._writing = writing

        def result(self):
            self._writing.result()
            (workdir / "checkpoints" / "8" / COMMIT).unlink()  # as if it had never come so far
            raise ValueError(f"RESOURCE_EXHAUSTED: {os.strerror(errno.ENOSPC)}")

    def save(orbax, step, *rest, **options):
        writing = start(orbax, step, *rest, **options)
        return Full(writing) if step == 8 else writing

    monkeypatch.setattr(checkpoint.ocp.training.Checkpointer, "save_checkpointables_async", save)
    train.train(make_run(steps=10), workdir)
    assert steps(workdir) == [2, 4, 6, 10] and not (workdir / "checkpoints" / "8").exists()
    (event,) = events(workdir, "save failed")
    assert event["step"] == 8 and event["cause"] == "no space left on device"


def test_metrics_that_are_not_on_the_disk_hold_a_checkpoint_back(workdir, make_run, monkeypatch, steps, events):
    flush = train.Reporter.flush

    def full(reporter):
        if not failed:
            failed.append(reporter)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(reporter)

    failed = []
    monkeypatch.setattr(train.Reporter, "flush", full)
    train.train(make_run(steps=10), workdir)
    assert steps(workdir) == [2, 4, 6, 10] and [event["step"] for event in events(workdir, "save failed")] == [8]


def test_the_last_save_that_fails_is_an_error_and_earlier_checkpoints_stay(workdir, make_run, monkeypatch, steps):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.ocp.training.Checkpointer, "save_checkpointables_async", full)
    with pytest.raises(RunFailed, match="the last save failed .no space left on device.; free some space"):
        train.train(make_run(steps=8), workdir)
    assert steps(workdir) == [2, 4, 6] and digest(workdir)[0] == 6


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


@pytest.mark.slow
def test_a_digest_depends_on_every_bit_and_not_on_the_mesh(trained, make_run, tmp_path):
    run, found = make_run(), {}
    model = train.fit_to_tokenizer(run, train.load_tokenizer(trained / "tokenizer"))
    optimizer = train.training_step(make_run(steps=6), make_mesh(dict(run.mesh)))[0]
    for name, sizes, bit in (("a", {}, 0), ("b", dict(fsdp=4, tensor=2), 0), ("c", {}, 1)):
        mesh = make_mesh(dict(run.mesh) | sizes)
        saver = checkpoint.Checkpointer(tmp_path / name, run, Events(tmp_path / name))
        with jax.set_mesh(mesh):
            restored = checkpoint.Checkpointer(trained, run, Events(trained)).restore(
                train._abstract_state(model, optimizer, mesh)
            )
            assert restored is not None
            state = restored[0]
            if bit:
                leaves, tree = jax.tree.flatten(state.model)
                changed = jax.device_get(leaves[0]).copy()
                changed.view("uint32").flat[0] ^= 1
                state.trainable = jax.tree.unflatten(tree, [jax.device_put(changed, leaves[0].sharding), *leaves[1:]])
            saver.save(6, state)
            saver.finish()
        found[name] = digest(tmp_path / name)
    assert found["a"] == found["b"] == digest(trained, 6) != found["c"]


def test_restoring_makes_no_second_state(trained, make_run):
    """Shapes are enough to restore to: what is asked for takes no memory."""
    run = make_run()
    mesh = make_mesh(dict(run.mesh))
    model = train.fit_to_tokenizer(run, train.load_tokenizer(trained / "tokenizer"))
    with jax.set_mesh(mesh):
        before = len(jax.live_arrays())
        like = train._abstract_state(model, train.training_step(run, mesh)[0], mesh)
        assert len(jax.live_arrays()) == before
        restored = checkpoint.Checkpointer(trained, run, Events(trained)).restore(like)
        assert restored is not None
    for array, shape in zip(jax.tree.leaves(restored[0]), jax.tree.leaves(like), strict=True):
        assert (array.shape, array.dtype, array.sharding) == (shape.shape, shape.dtype, shape.sharding)
