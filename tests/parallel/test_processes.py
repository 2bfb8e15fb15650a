"""Real processes, two and four of them, over eight devices: what one process computes, they compute together."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
import several
from ml_collections import ConfigDict
from ports import free_port

from llada_jax.data import sources
from llada_jax.fields import InputError
from llada_jax.parallel.mesh import _across_slices
from llada_jax.storage.mirror import Workdir
from llada_jax.training import run as train

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 300  # seconds, for a machine that is busy with other things
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"  # to compile
COUPLETS = [list(c[:2]) for c in sources.couplets()[:60]]
FSDP = dict(data=1, fsdp=8, tensor=1, context=1)
MIXED = dict(data=1, fsdp=2, tensor=2, context=2)  # with four processes, two hold the same rows


def start(directory, program, count, *flags, devices=8):
    """Starts `count` processes of a program and waits; exit code, stdout and stderr of each; the stack if it hangs."""
    port = free_port()
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices // count} {QUICK}",
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(ROOT),
    }
    place = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}"]
    command = [sys.executable, "-X", "faulthandler", *program, *place, *flags]
    outputs = [[directory / f"{i}.{stream}" for stream in ("out", "err")] for i in range(count)]
    running = []
    for i, (out, err) in enumerate(outputs):
        with out.open("w") as stdout, err.open("w") as stderr:
            process = [*command, f"--process_id={i}"]
            running.append(subprocess.Popen(process, cwd=ROOT, env=environment, stdout=stdout, stderr=stderr))
    end = time.monotonic() + TIMEOUT
    while any(process.poll() is None for process in running) and time.monotonic() < end:
        time.sleep(0.05)
    for process in running:
        if process.poll() is None:
            process.send_signal(signal.SIGABRT)
        process.wait()
    return [
        (process.returncode, out.read_text(), err.read_text())
        for process, (out, err) in zip(running, outputs, strict=True)
    ]


class Results(NamedTuple):
    values: list[dict]  # of each process, by the name of the job: {"result": …} or {"error": …}
    printed: list[tuple[str, str]]


def do(directory, count, jobs) -> Results:
    """The results of the jobs on each process."""
    directory.mkdir()
    (directory / "jobs.json").write_text(json.dumps(list(jobs.values())))
    ended = start(directory, ["tests/several.py"], count, f"--jobs={directory / 'jobs.json'}", f"--out={directory}")
    assert [code for code, _, _ in ended] == [0] * count, "\n".join(f"{out}\n{err[-3000:]}" for _, out, err in ended)
    values = [json.loads((directory / f"{i}.json").read_text()) for i in range(count)]
    return Results([dict(zip(jobs, value, strict=True)) for value in values], [ended[1:] for ended in ended])


def metrics(workdir, name):
    lines = [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("several")
    texts = [json.dumps({"text": sources.couplet_text(a, b)}, ensure_ascii=False) for a, b in COUPLETS]
    (root / "poems.jsonl").write_text("\n".join(texts), encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def of(root, make_tiny_run):
    """A run config as a dictionary."""

    def make(steps, mesh=FSDP, **train_fields):
        run = make_tiny_run()
        run.data.files = str(root / "poems.jsonl")
        run.optimizer.schedule = (("constant", 1e-3, "100%"),)
        run.mesh.update(mesh)
        run.train.update(dict(batch_size=16, log_every=1, eval_every=2, eval_rows=16, steps=steps) | train_fields)
        return run.to_dict()

    return make


@pytest.fixture(scope="module")
def one(root, of):
    """A run of one process, uninterrupted, and what it tells."""
    read = several.run(of(6), root / "one")
    several.save(root / "one", root / "hf")
    return {
        "read": read,
        "masks": several.masks(of(6), root / "one", [0, 6]),
        "evaluated": several.evaluate(root / "one", FSDP, COUPLETS[:3]),
    }


@pytest.fixture(scope="module")
def two(root, of, one):
    """Two processes: a run of two steps, an evaluation, and all that can go wrong on one of them."""
    other = of(2)
    other["optimizer"]["b2"] = 0.9
    missing = of(2)
    missing["data"]["files"] = str(root / "nothing/*.txt")
    path = lambda name: str(root / name)
    jobs = {
        "meet": ["meet", dict(sizes=FSDP)],
        "run": ["run", dict(config=of(2, sample_every=2, sample_prompt="床前明月光，"), workdir=path("many"))],
        "masks": ["masks", dict(config=of(2), workdir=path("many"), steps=[0, 2])],
        "sick": ["sick", dict(config=of(4, eval_every=0, rollback_after=1), workdir=path("sick"), batches=[2])],
        "evaluated": ["evaluate", dict(workdir=path("one"), sizes=FSDP, couplets=COUPLETS[:3])],
        "sample": ["sample", dict(workdir=path("one"), prompt="床前明月光，")],
        "rows": ["place", dict(sizes=FSDP, order=[0, 2, 4, 6, 1, 3, 5, 7], batch_size=16)],
        "columns": ["place", dict(sizes=FSDP | dict(fsdp=2, context=4), order=[0, 4, 1, 5, 2, 6, 3, 7], batch_size=6)],
        "saved": ["save", dict(workdir=path("one"), target=path("hf2"))],
        "full": ["save", dict(workdir=path("one"), target=path("full"), full_disk=True)],
        "exists": ["save", dict(workdir=path("one"), target=path("hf"))],
        "recipe": ["run", dict(config=other, workdir=path("many"))],
        "files": ["run", dict(config=missing, workdir=path("files"))],
        "differs": ["run", dict(config=of(2), workdir=path("differs"), differs=True)],
        "fails": ["fail", dict(process=1)],
        "fault": ["fail", dict(process=1, number=errno.EIO, text="Input/output error")],
        "denied": ["fail", dict(process=1, number=errno.EACCES, text="Permission denied")],
        "long": ["fail", dict(process=1, text='quoted: "' * 3000)],
    }
    return do(root / "jobs2", 2, jobs)


@pytest.fixture(scope="module")
def four(root, of, two):
    """Four processes continue the run of the two, and start one on a mesh on which two of them hold the same rows."""
    jobs = {
        "meet": ["meet", dict(sizes=FSDP)],
        "run": ["run", dict(config=of(4), workdir=str(root / "many"))],
        "masks": ["masks", dict(config=of(4), workdir=str(root / "many"), steps=[2, 4])],
        "meet again": ["meet", dict(sizes=MIXED)],
        "mixed": ["run", dict(config=of(2, MIXED, eval_every=0), workdir=str(root / "mixed"))],
        "rows": ["place", dict(sizes=FSDP, order=[0, 2, 4, 6, 1, 3, 5, 7], batch_size=16)],
        "fails": ["fail", dict(process=2)],
        "tell": ["tell", dict(workdir=str(root / "told"))],
    }
    return do(root / "jobs4", 4, jobs)


def losses(workdir):
    return metrics(workdir, "1_loss/loss")


def test_two_then_four_then_one_process_compute_the_losses_of_one(root, of, one, two, four):
    several.run(of(6), root / "many")
    np.testing.assert_allclose(losses(root / "many"), losses(root / "one"), rtol=1e-5)
    validation = "0_validation/elbo_nats_per_token"
    np.testing.assert_allclose(metrics(root / "many", validation), metrics(root / "one", validation), rtol=1e-5)
    np.testing.assert_allclose(losses(root / "mixed"), losses(root / "one")[:2], rtol=1e-5)


def test_rows_and_masks_are_the_same_bits(one, two, four):
    for results, steps in ((two, slice(0, 2)), (four, slice(2, 4))):
        assert all(result["masks"]["result"] == one["masks"][steps] for result in results.values)


def test_every_process_reads_its_share_and_no_more(root, of, one, two, four):
    order = train.open_data(ConfigDict(of(6)), Workdir(root / "one"))[1]
    for results, steps in ((two, range(0, 2)), (four, range(2, 4))):
        shares = np.arange(16).reshape(len(results.values), -1)
        for result, rows in zip(results.values, shares, strict=True):
            due = [order.place(16 * step + int(row))[1] for step in steps for row in rows]
            assert sorted(result["run"]["result"]) == sorted(due)
    halves = np.arange(16).reshape(2, -1)
    for i, result in enumerate(four.values):  # processes 0 and 1 hold the first half of the rows, 2 and 3 the second
        due = [order.place(16 * step + int(row))[1] for step in range(2) for row in halves[i // 2]]
        assert sorted(result["mixed"]["result"]) == sorted(due)


def test_rows_land_where_they_belong_on_any_order_of_the_devices(two, four):
    assert [result["rows"]["result"] for result in two.values] == [
        [[0, 1, 2, 3, 8, 9, 10, 11], True],
        [[4, 5, 6, 7, 12, 13, 14, 15], True],
    ]
    assert [result["columns"]["result"] for result in two.values] == [[[0, 1, 2, 3, 4, 5], True]] * 2
    assert [result["rows"]["result"] for result in four.values] == [
        [[r, r + 1, r + 8, r + 9], True] for r in (0, 2, 4, 6)
    ]


def test_a_model_split_over_processes_writes_and_scores_the_same(one, two):
    for result in two.values:
        lines, score = result["evaluated"]["result"]
        assert lines == one["evaluated"][0]
        assert score == pytest.approx(one["evaluated"][1], rel=1e-5)


def test_a_published_checkpoint_is_the_same_file(root, one, two):
    for name in ("config.json", "model.safetensors"):
        assert (root / "hf2" / name).read_bytes() == (root / "hf" / name).read_bytes()


def test_processes_skip_and_roll_back_alike(root, one, two):
    found = [json.loads(line) for line in (root / "sick" / "events.jsonl").read_text().splitlines()]
    action = "rolled back to step 2; it goes on with batch 3"
    assert [(event["step"], event["action"]) for event in found if event["event"] == "diverged"] == [(3, action)]
    assert [event["step"] for event in found if event["event"] == "skipped update"] == [3]
    np.testing.assert_allclose(losses(root / "sick")[:2], losses(root / "one")[:2], rtol=1e-5)
    assert np.isfinite(losses(root / "sick")[-2:]).all()
    assert [line.count("rolled back to step 2") for _, line in two.printed] == [1, 0]


def test_the_slowest_process_is_seen(root, two, four):
    of_two, of_four = metrics(root / "many", "4_speed/slowest_host_over_mean")  # the steps that compile are not timed
    assert 1 <= of_two <= 2 and 1 <= of_four <= 4


@pytest.mark.parametrize(
    "job, message, left",
    [
        ("full", "no space left on device", "full"),
        ("exists", "hf: exists and is not an empty directory", None),
        ("recipe", "config.optimizer.b2: 0.95 -> 0.9", None),
        ("files", "nothing/*.txt: no such file", "files"),
        ("differs", "process 1 was given another config or --workdir than process 0", "differs"),
    ],
)
def test_what_fails_on_one_process_fails_on_all(root, two, job, message, left):
    assert all(message in result[job]["error"] for result in two.values)
    assert left is None or not (root / left).exists()


@pytest.mark.parametrize(
    "job, code, message",
    [
        ("fails", 2, "row 7 can't be read"),
        ("fault", 1, "Input/output error"),
        ("denied", 2, "Permission denied"),
        ("long", 2, 'quoted: "quoted: "'),
    ],
)
def test_processes_end_with_the_same_code_whichever_of_them_met_the_fault(two, four, job, code, message):
    for results in (two, four):
        found = [result[job]["result"] for result in results.values if job in result]
        assert all(ended == code and message in text for ended, text in found)


def test_events_of_every_process_are_in_one_file(root, four):
    found = [json.loads(line) for line in (root / "told" / "events.jsonl").read_text().splitlines()]
    assert sorted(event["step"] for event in found) == [0, 1, 2, 3]


def test_only_the_first_process_speaks(two, four):
    for results in (two, four):
        assert "train: step" in results.printed[0][1]
        assert not any("train" in out or "train" in err for out, err in results.printed[1:])
    assert "sample: 床前明月光，" in two.printed[0][1] and "床前明月光，" in two.printed[0][0]


@pytest.mark.parametrize("broken", [0, 1])
def test_a_process_that_fails_in_the_loop_ends_with_its_line_and_the_other_with_it(root, of, one, tmp_path, broken):
    jobs = [["meet", dict(sizes=FSDP)], ["run", dict(config=of(6), workdir=str(tmp_path / "run"), broken=broken)]]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    started = time.monotonic()
    ended = start(tmp_path, ["tests/several.py"], 2, f"--jobs={tmp_path / 'jobs.json'}", f"--out={tmp_path}")
    assert [code for code, _, _ in ended] == [1, 1]  # in the loop nothing is a mistake of the user's any more
    assert ended[broken][2].splitlines()[-1] == "error: row 7 can't be read"
    assert ended[1 - broken][2].splitlines()[-1] == f"error: process {broken} stopped: row 7 can't be read"
    assert time.monotonic() - started < 90  # JAX alone would take 100 seconds to notice


@pytest.mark.parametrize(
    "shape, slices, across",
    [
        ([2, 8, 1, 1], 2, [2, 1, 1, 1]),
        ([4, 2, 2, 1], 2, [2, 1, 1, 1]),
        ([2, 4, 1, 1], 4, [2, 2, 1, 1]),
        ([1, 16, 1, 1], 2, [1, 2, 1, 1]),
    ],
)
def test_data_runs_across_slices_and_fsdp_if_it_must(shape, slices, across):
    assert _across_slices(shape, slices) == across


def test_tensor_and_context_stay_inside_a_slice():
    with pytest.raises(InputError, match="tensor=16 .* in 2 slices or hosts"):
        _across_slices([1, 1, 16, 1], 2)
