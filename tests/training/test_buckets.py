"""Runs that live in buckets: the same bits as on a disk, through kills, damage and faults of the network.

Servers of both protocols run here (bucket_servers.py); what is kept of a run is read back through them.
"""

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
import types
from http import HTTPStatus
from pathlib import Path, PurePosixPath
from typing import Any

import bucket_servers
import numpy as np
import pytest

from llada_jax.data import dataset, prepare, sources
from llada_jax.data.tokenizer import load_tokenizer
from llada_jax.fields import InputError, RunFailed
from llada_jax.files import write_atomic
from llada_jax.interop import hf
from llada_jax.interop.workdir import load_model, named_leaves, saved_steps
from llada_jax.storage import buckets, mirror
from llada_jax.tools import kill_test, report
from llada_jax.tools.digest import digest
from llada_jax.training import run as train
from llada_jax.training import workdir as workdirs

ROOT = Path(__file__).resolve().parents[2]
AWAY = HTTPStatus.IM_A_TEAPOT  # for tests that cannot wait: no client tries it again by itself


@pytest.fixture(scope="module")
def proxies(tmp_path_factory):
    """The servers, by scheme, for this process and those that it starts."""
    before = dict(os.environ)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    yield {"gs": bucket_servers.start_gcs(), "s3": bucket_servers.start_s3()}
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def bucket(proxies, request):
    """A place of its own for each test, in Cloud Storage."""
    return f"gs://{bucket_servers.BUCKET}/{re.sub('[^a-z0-9]+', '-', request.node.name)}"


def bits(workdir: str, local: Path) -> str:
    """The digest of the newest checkpoint, of which a copy is made: that takes fewer requests."""
    place = buckets.path_of(workdir) / "checkpoints"
    names = [name for name in buckets.files_below(place) if name.startswith(f"{steps(workdir)[-1]}/")]
    for name in names:
        buckets.download(place / name, local / "checkpoints" / name)
    return digest(local)[1]


def metrics(workdir) -> list[dict]:
    """The lines of metrics.jsonl without what depends on the clock."""
    text = buckets.read(buckets.path_of(workdir) / "metrics.jsonl").decode()
    lines = map(json.loads, text.splitlines())
    return [{name: value for name, value in line.items() if not name.startswith("4_")} for line in lines]


def events(workdir) -> list[dict]:
    path = buckets.path_of(workdir) / "events.jsonl"
    return [json.loads(line) for line in buckets.read(path).splitlines()] if buckets.exists(path) else []


def steps(workdir) -> list[int]:
    return sorted(saved_steps(buckets.path_of(workdir) / "checkpoints"))


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_a_run_that_continues_in_a_bucket_ends_in_the_bits_of_one_on_disk(proxies, make_run, trained, scheme, tmp_path):
    workdir = f"{scheme}://{bucket_servers.BUCKET}/same"
    train.train(make_run(steps=4), workdir)
    train.train(make_run(steps=6), workdir)  # finds nothing on this machine: the first one's copy is gone
    assert steps(workdir) == [2, 4, 6] and events(workdir)[0]["event"] == "config changed"
    assert bits(workdir, tmp_path) == digest(trained)[1]
    assert metrics(workdir) == kill_test.metrics(trained)
    found = buckets.files_below(buckets.path_of(workdir))
    assert sum("tfevents" in name for name in found) == 2 and "lease.json" not in found
    for name in ("config.json", "goodput.json", "tokenizer/tokenizer.model", "data/manifest.json"):
        assert found[name]["size"] > 0
    # Another reader: the model, its tokenizer and its config, as sample.py and the converter take them.
    leaves = dict(named_leaves(hf.load(workdir)))
    assert all(np.array_equal(leaf, leaves[name]) for name, leaf in named_leaves(load_model(trained)))
    assert (hf.tokenizer_directory(workdir) / "tokenizer.model").is_file()
    page = report.render_runs([workdir], tmp_path / "page.html").read_text()
    assert "<h1>same</h1>" in page and "config changed" in page
    with pytest.raises(InputError, match=f"^no {workdir}/none/metrics.jsonl; --workdir names"):
        report.render_runs([f"{workdir}/none"], tmp_path / "page.html")
    with pytest.raises(InputError, match=f"^{workdir} is in a bucket; say with --output where the page goes"):
        report.render_runs([workdir])


@pytest.mark.slow
def test_a_damaged_checkpoint_is_set_aside_in_the_bucket(proxies, make_run, trained, bucket, tmp_path):
    train.train(make_run(steps=6), bucket)
    place = buckets.path_of(bucket) / "checkpoints" / "6"
    name = next(name for name in buckets.files_below(place) if name.startswith("model/d/"))
    data = bytearray(buckets.read(place / name))
    data[len(data) // 2] ^= 1
    buckets.write(place / name, bytes(data))
    train.train(make_run(steps=6), bucket)
    (event,) = [event for event in events(bucket) if event["event"] == "checkpoint damaged"]
    assert event["step"] == 6 and f"{name} has the right size and another content" in event["cause"]
    assert steps(bucket) == [2, 4, 6] and bits(bucket, tmp_path) == digest(trained)[1]


FAULTS = {
    "slow": lambda n, *_: 0.5 if n % 29 == 0 else None,
    "too many requests": lambda n, *_: HTTPStatus.TOO_MANY_REQUESTS if n % 83 == 0 else None,
    "unavailable": lambda n, *_: HTTPStatus.SERVICE_UNAVAILABLE if n % 83 == 0 else None,
    "dropped": lambda n, *_: "drop" if n % 83 == 0 else None,
    "cut off": lambda n, method, _: "cut" if n % 41 == 0 and method == "GET" else None,
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_the_network_lose_nothing_and_are_no_events(proxies, make_run, trained, bucket, fault, tmp_path):
    with proxies["gs"].faulty(FAULTS[fault]) as proxy:
        train.train(make_run(steps=4), bucket)
        assert proxy.requests > 200
    assert steps(bucket) == [2, 4] and not events(bucket)
    assert bits(bucket, tmp_path) == digest(trained, 4)[1]


@pytest.mark.slow
def test_a_bucket_that_is_away_during_a_save_costs_that_save_and_is_one_event(
    proxies, make_run, trained, bucket, monkeypatch, tmp_path
):
    """Away as long as anything is tried: from the first object of checkpoint 4 until that save has failed."""
    monkeypatch.setattr(buckets, "PATIENCE_SECONDS", 1.0)
    original, away = train.checkpoint.Checkpointer._report_failure, []

    def report(self, step, error):
        away.clear()  # the bucket is there again
        original(self, step, error)

    monkeypatch.setattr(train.checkpoint.Checkpointer, "_report_failure", report)
    push = mirror.Workdir.push

    def pushing(self):
        if steps(bucket) == [2] and not events(bucket) and not hasattr(self, "was_away"):
            self.was_away = True
            away.append(True)
        push(self)

    monkeypatch.setattr(mirror.Workdir, "push", pushing)
    with proxies["gs"].faulty(lambda *_: AWAY if away else None):
        train.train(make_run(steps=6), bucket)
    (event,) = events(bucket)
    assert (event["event"], event["step"]) == ("save failed", 4)
    assert "goes on with the checkpoints before" in event["action"]
    assert steps(bucket) == [2, 6] and bits(bucket, tmp_path) == digest(trained)[1]
    assert metrics(bucket) == kill_test.metrics(trained)


@pytest.mark.slow
def test_a_bucket_that_is_away_for_a_minute_between_two_saves_costs_nothing(
    proxies, make_run, trained, bucket, monkeypatch, tmp_path
):
    """A minute by the clock, from the first file that is brought there before checkpoint 4."""
    push, back = mirror.Workdir.push, []

    def pushing(self):
        if steps(bucket) == [2] and not back:
            back.append(time.monotonic() + 60)
        push(self)

    monkeypatch.setattr(mirror.Workdir, "push", pushing)
    is_away = lambda *_: HTTPStatus.SERVICE_UNAVAILABLE if back and time.monotonic() < back[0] else None
    with proxies["gs"].faulty(is_away):
        train.train(make_run(steps=6), bucket)
    assert time.monotonic() > back[0] and not events(bucket)
    assert steps(bucket) == [2, 4, 6] and bits(bucket, tmp_path) == digest(trained)[1]


@pytest.mark.parametrize("seconds, is_reached", [(60, True), (100, True), (125, False)])
def test_a_bucket_may_be_away_for_over_a_minute(monkeypatch, seconds, is_reached):
    """By a clock of this test, which only waiting moves."""
    clock = types.SimpleNamespace(
        now=0.0, monotonic=lambda: clock.now, sleep=lambda s: setattr(clock, "now", clock.now + s)
    )

    def cat_file(_):
        if clock.now < seconds:
            raise OSError("503 Service Unavailable")
        return b"there"

    monkeypatch.setattr(buckets, "time", clock)
    monkeypatch.setattr(buckets, "_file_system", lambda scheme: types.SimpleNamespace(cat_file=cat_file))
    if is_reached:
        assert buckets.read(PurePosixPath("gs://runs/a")) == b"there"
    else:
        with pytest.raises(RunFailed, match="gs:/runs/a: cannot be reached .503"):
            buckets.read(PurePosixPath("gs://runs/a"))
        assert clock.now <= buckets.PATIENCE_SECONDS


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_run_continues_in_a_bucket_to_the_same_bits(proxies, bucket, tmp_path, processes):
    run = kill_test.Run(tmp_path / "logs", processes, 10**6, address=bucket)
    while not steps(bucket) or steps(bucket)[-1] < 10:
        assert run.is_running(), run.output()
        time.sleep(0.1)
    run.children[-1].send_signal(signal.SIGKILL)
    assert set(run.wait()[:-1]) <= {1}
    last = steps(bucket)[-1] + 3
    run = kill_test.Run(tmp_path / "logs", processes, last, address=bucket)
    assert run.wait() == [0] * processes, run.output()
    kill_test.finish(tmp_path / "whole", processes, last)
    assert bits(bucket, tmp_path) == digest(tmp_path / "whole")[1]
    assert metrics(bucket) == kill_test.metrics(tmp_path / "whole")


# --- whose it is ---


def test_a_second_run_is_refused_by_the_lease_in_the_bucket(proxies, make_run, bucket, monkeypatch):
    monkeypatch.setattr(workdirs, "LEASE_SECONDS", 3.0)
    monkeypatch.setattr(workdirs, "_RENEW_SECONDS", 0.2)
    with monkeypatch.context() as patch:
        patch.setattr(workdirs, "_machine", lambda: "another")
        other = workdirs.Lease(buckets.path_of(bucket))
    with pytest.raises(InputError, match=rf"^{bucket}: process \d+ on .* trains there; stop that, or choose another"):
        train.train(make_run(), bucket)
    other.release()
    assert not buckets.files_below(buckets.path_of(bucket))


def test_a_lease_that_cannot_be_read_is_not_taken_for_none(proxies, bucket, monkeypatch):
    monkeypatch.setattr(buckets, "PATIENCE_SECONDS", 0.0)
    place = buckets.path_of(bucket)
    write_atomic(place / "lease.json", "{}")
    with proxies["gs"].faulty(lambda *_: AWAY):
        with pytest.raises(RunFailed, match="lease.json: cannot be reached"):
            workdirs.Lease(place)


def test_nothing_is_taken_for_incomplete_while_the_bucket_is_away(proxies, bucket, make_run, monkeypatch):
    """fsspec's exists() answers no then, and what is incomplete is removed."""
    train.train(make_run(steps=2), bucket)
    monkeypatch.setattr(buckets, "PATIENCE_SECONDS", 0.0)
    with proxies["gs"].faulty(lambda *_: AWAY), pytest.raises(RunFailed):
        train.train(make_run(steps=4), bucket)
    assert steps(bucket) == [2]


def test_a_start_that_fails_leaves_nothing_in_the_bucket(proxies, make_run, bucket):
    run = make_run(steps=2)
    run.model.vocab_size = run.model.embedding_size = 64
    with pytest.raises(InputError):
        train.train(run, bucket)
    assert not buckets.files_below(buckets.path_of(bucket))


@pytest.mark.parametrize(
    "address, words",
    [
        ("gs://nosuchbucket/a", "there is no such bucket; make it, or correct the name"),
        ("gs://", "is no gs://BUCKET/NAME or s3://BUCKET/NAME"),
        ("http://runs/a", "is no gs://BUCKET/NAME or s3://BUCKET/NAME"),
    ],
)
def test_an_address_that_is_wrong_is_one_line_and_code_2(proxies, address, words):
    command = [sys.executable, "-m", "llada_jax.train", *kill_test.RUN, f"--workdir={address}"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and words in done.stderr, done.stderr


@pytest.mark.parametrize("scheme, library, extra", [("gs", "gcsfs", "gcs"), ("s3", "s3fs", "s3")])
def test_a_library_that_is_missing_is_named_with_its_extra(scheme, library, extra):
    program = f"""if True:
        import sys
        sys.modules[{library!r}] = None
        from llada_jax.storage import buckets
        try:
            buckets.path_of("{scheme}://runs/a")
        except buckets.InputError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == f"{scheme}:// needs {library}; pip install 'llada_jax[{extra}]'\n", done.stderr


# --- copies ---


def test_prepared_data_of_a_bucket_is_copied_once_and_compared_with_its_checksums(
    proxies, make_run, trained, bucket, tmp_path
):
    remote = buckets.path_of(bucket)
    for path in (trained / "data").rglob("*"):
        if path.is_file():
            buckets.upload(path, remote / path.relative_to(trained / "data").as_posix())
    run = make_run(steps=6)
    run.data.path, run.data.cache_dir = bucket, str(tmp_path / "cache")
    train.train(run, tmp_path / "w")
    assert digest(tmp_path / "w", 6)[1] == digest(trained, 6)[1]
    asked = []
    with proxies["gs"].faulty(lambda n, method, path: asked.append(path)):
        copy = mirror.copied(bucket, run.data.cache_dir)
    assert len(dataset.open_dataset(copy)) > 0 and len(asked) == 1  # the listing alone
    (shard,) = [name for name in buckets.files_below(remote) if name.startswith("rows-")]
    data = bytearray(buckets.read(remote / shard))
    data[-1] ^= 1
    buckets.write(remote / shard, bytes(data))
    with pytest.raises(InputError, match=rf"^{bucket}/{shard}: not as manifest.json says; prepare or copy it again$"):
        mirror.copied(bucket, run.data.cache_dir)
    assert not copy.exists()


def test_data_is_prepared_into_a_bucket_and_found_there_again(proxies, trained, bucket, tmp_path):
    texts = [sources.couplet_text(a, b) for a, b, _ in sources.couplets()[:40]]
    tokenizer = load_tokenizer(trained / "tokenizer")

    def prepared(place, row_length=32):
        settings: dict[str, Any] = dict(row_length=row_length, validation_fraction=0.2, workers=1, progress=False)
        return prepare.prepare_dataset(place, items=texts, tokenizer=tokenizer, **settings)

    manifest = prepared(bucket)
    assert manifest["shards"] == prepared(tmp_path / "here")["shards"]
    before = buckets.files_below(buckets.path_of(bucket))
    assert {"manifest.json", "validation/manifest.json"} < before.keys()
    assert prepared(bucket) == manifest and buckets.files_below(buckets.path_of(bucket)) == before
    with pytest.raises(InputError, match=rf"^{bucket}: holds another preparation"):
        prepared(bucket, row_length=64)
    with pytest.raises(InputError, match=rf"^{bucket}/\*: text is prepared from files of this machine"):
        sources.expand_files(f"{bucket}/*")


@pytest.mark.slow
def test_a_published_checkpoint_is_written_to_a_bucket_and_read_from_it(proxies, trained, bucket):
    model = hf.load(trained)
    hf.save_hf(model, bucket, source_dir=trained)
    leaves = dict(named_leaves(hf.load(bucket)))
    assert all(np.array_equal(leaf, leaves[name]) for name, leaf in named_leaves(model))
    with pytest.raises(InputError, match="there is something already; choose another place"):
        hf.save_hf(model, bucket)
    hf.save_workdir(model, f"{bucket}-run", source_dir=trained)
    leaves = dict(named_leaves(hf.load(f"{bucket}-run")))
    assert all(np.array_equal(leaf, leaves[name]) for name, leaf in named_leaves(model))
