"""Damaged rows are named and stop a run, or are replaced and counted; data that changed is refused."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from llada_jax.data import KINDS
from llada_jax.data.dataset import DamagedRow, open_dataset
from llada_jax.data.pipeline import batches, ordered
from llada_jax.data.prepare import prepare_dataset
from llada_jax.data.tokenizer import load_tokenizer
from llada_jax.fields import InputError, RunFailed
from llada_jax.training import run as train

TOKENIZER = load_tokenizer(Path(__file__).parents[1] / "golden" / "tokenizer")
TEXTS = [f"text {i} " + "a quick fox " * (i % 4) for i in range(60)]
DIALOGUES = [
    [{"role": "user", "content": f"q {i}"}, {"role": "assistant", "content": "yes " * (1 + i % 9)}] for i in range(60)
]


def prepared(path, kind="text", row_length=32, **options):
    contents = {"items": TEXTS, "packing": "document"} if kind == "text" else {"items": DIALOGUES}
    prepare_dataset(
        path, kind=kind, tokenizer=TOKENIZER, row_length=row_length, rows_per_shard=20, workers=1, progress=False,
        **contents | options,
    )  # fmt: skip
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return {kind: prepared(tmp_path_factory.mktemp(kind) / "d", kind, 64) for kind in KINDS}


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def damaged_copy(whole, target, shard=1, at=500):
    """A copy with one flipped bit, and the rows that it makes unreadable."""
    shutil.copytree(whole, target)
    flip(sorted(target.glob("rows-*"))[shard], at)
    return target, unreadable(open_dataset(target))


def unreadable(source):
    rows = []
    for i in range(len(source)):
        try:
            source[i]
        except DamagedRow:
            rows.append(i)
    return rows


def equal(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("at", range(41, 3700, 191))
def test_a_flipped_bit_is_found_in_its_row_or_is_in_no_row(tmp_path, whole, at):
    clean = open_dataset(whole["text"])
    path, rows = damaged_copy(whole["text"], tmp_path / "d", at=at)
    source = open_dataset(path)
    assert all(equal(source[i], clean[i]) for i in range(len(source)) if i not in rows)
    for row in rows:
        name = sorted(path.glob("rows-*"))[1].name
        with pytest.raises(DamagedRow, match=f"{name}: record {row - 20} cannot be read .* copy the file again"):
            source[row]


def test_flipped_bits_of_every_part_of_a_record_are_found(tmp_path, whole):
    record = sorted(whole["text"].glob("rows-*"))[0].read_bytes().find(b"\x28\xb5\x2f\xfd")  # zstd, in the first
    assert record > 0
    for at in range(record, record + 20):
        path, rows = damaged_copy(whole["text"], tmp_path / str(at), 0, at)
        assert rows, at


def test_rows_of_another_shard_of_the_same_size_are_damaged(tmp_path, whole):
    shutil.copytree(whole["text"], tmp_path / "d")
    first, second, _ = sorted((tmp_path / "d").glob("rows-*"))
    assert first.stat().st_size == second.stat().st_size
    first.write_bytes(second.read_bytes())
    source = open_dataset(tmp_path / "d")
    assert unreadable(source) == list(range(20))
    with pytest.raises(DamagedRow, match="record 3 cannot be read .its bytes are not those that were written"):
        source[3]


def test_a_length_that_is_not_its_rows_is_damage(tmp_path, whole):
    shutil.copytree(whole["chat"], tmp_path / "d")
    lengths = np.load(tmp_path / "d" / "lengths.npy")
    lengths[7] += 1
    np.save(tmp_path / "d" / "lengths.npy", lengths)
    assert unreadable(open_dataset(tmp_path / "d")) == [7]


def take(order, kind, **options):
    defaults = {"batch_size": 8, "start_step": 0, "num_steps": 20, "seed": 1, "eos_id": TOKENIZER.eos_id}
    return list(batches(order, kind=kind, **defaults | options))


def test_a_damaged_row_stops_the_batches_in_one_line(tmp_path, whole):
    path, rows = damaged_copy(whole["text"], tmp_path / "d")
    assert len(rows) == 1
    with pytest.raises(
        InputError, match=rf"record {rows[0] - 20} cannot be .* config.data.on_damage to 'skip'"
    ) as error:
        take(ordered([open_dataset(path)], seed=3), "text")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_skipping_changes_no_other_row_and_no_order(tmp_path, whole, kind):
    path, rows = damaged_copy(whole[kind], tmp_path / "d")
    told = []
    order = ordered([open_dataset(path)], seed=3, on_damage=lambda *what: told.append(what))
    clean = ordered([open_dataset(whole[kind])], seed=3)
    places = [order.place(g)[1] for g in range(160)]
    assert places == [clean.place(g)[1] for g in range(160)]
    ones, others = take(order, kind), take(clean, kind)
    replaced = np.concatenate([batch.pop("replaced") for batch in ones])
    assert [places[g] for g in np.flatnonzero(replaced)] == [row for row in places if row in rows]
    assert replaced.sum() > 0
    for g in np.flatnonzero(~replaced):
        step, j = divmod(int(g), 8)
        assert all(np.array_equal(ones[step][name][j], others[step][name][j]) for name in others[step])
    assert sorted(g for g, _, _ in told) == np.flatnonzero(replaced).tolist()
    assert all("cannot be read" in cause and "stands in" in action for _, cause, action in told)


@pytest.mark.parametrize("kind", KINDS)
def test_stand_ins_are_the_same_on_any_number_of_hosts_and_from_any_start(tmp_path, whole, kind):
    path, _ = damaged_copy(whole[kind], tmp_path / "d")
    again = lambda: ordered([open_dataset(path)], seed=3, on_damage=lambda *_: None)
    one = take(again(), kind)
    halves = [take(again(), kind, only=rows, start_step=5) for rows in ([0, 3, 5], [1, 2, 4, 6, 7])]
    assert any(batch["replaced"].any() for batch in one[5:])
    for batch, first, second in zip(one[5:], *halves, strict=True):
        assert equal({name: x[[0, 3, 5]] for name, x in batch.items()}, first)
        assert equal({name: x[[1, 2, 4, 6, 7]] for name, x in batch.items()}, second)


def test_a_dataset_of_which_nothing_can_be_read_stops_in_spite_of_skipping(tmp_path, whole):
    shutil.copytree(whole["text"], tmp_path / "d")
    for path in (tmp_path / "d").glob("rows-*"):
        path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(InputError, match="100 rows drawn from it cannot be read"):
        take(ordered([open_dataset(tmp_path / "d")], seed=3, on_damage=lambda *_: None), "text")


# Whole runs.


@pytest.fixture
def run(make_tiny_run, whole, tmp_path):
    shutil.copytree(whole["text"], tmp_path / "data")
    shutil.copytree(whole["text"], tmp_path / "more")
    config = make_tiny_run()
    config.data.path, config.data.row_length = str(tmp_path / "data"), 64
    config.data.mixture = ((str(tmp_path / "more"), 0.5),)
    config.train.update(dict(steps=8, log_every=4, eval_every=0))
    config.optimizer.schedule = (("constant", 1e-3, "100%"),)
    return config


def test_a_damaged_row_stops_a_run_and_a_run_that_skips_goes_on_and_counts(run, tmp_path, capsys):
    for shard in (tmp_path / "data").glob("rows-*"):
        for at in range(200, 1500, 150):
            flip(shard, at)
    with pytest.raises(RunFailed, match="data/rows-0000.-of-00003.arrayrecord: record .* cannot be read") as error:
        train.train(run, tmp_path / "w")
    assert "\n" not in str(error.value)
    run.data.on_damage = "skip"
    train.train(run, tmp_path / "w")
    lines = [json.loads(line) for line in (tmp_path / "w" / "metrics.jsonl").read_text().splitlines()]
    events = [json.loads(line) for line in (tmp_path / "w" / "events.jsonl").read_text().splitlines()]
    damaged = [event for event in events if event["event"] == "damaged row"]
    assert sum(line["5_data/replaced_rows"] for line in lines) == len(damaged) > 2
    for event in damaged:
        assert 1 <= event["step"] <= 8 and re.search(r"data/rows-.*: record \d+ cannot be read", event["cause"])
        assert re.fullmatch(r"row \d+ of the dataset stands in for row \d+", event["action"])
    assert damaged[0]["cause"] in capsys.readouterr().err


def test_a_policy_that_is_none_is_named(run, tmp_path):
    run.data.on_damage = "ignore"
    with pytest.raises(InputError, match="config.data.on_damage is 'ignore'; it must be one of stop, skip"):
        train.train(run, tmp_path / "w")
    assert not (tmp_path / "w").exists()


def saved(run, workdir):
    """A workdir with a checkpoint, which makes it the run's."""
    run.train.steps = 2
    train.train(run, workdir)


def begun(run, workdir, monkeypatch):
    """As far as a run gets before its first step."""
    with monkeypatch.context() as patch:
        patch.setattr(train.checkpoint, "Checkpointer", _stop)
        with pytest.raises(KeyboardInterrupt):
            train.train(run, workdir)


def _stop(*_, **__):
    raise KeyboardInterrupt


CHANGES = {
    "another preparation": ("data/manifest.json", lambda d: rewrite(d, ["other"] * 60), "changed"),
    "of the mixture": ("more/manifest.json", lambda d: rewrite(d, ["other"] * 60), "changed"),
    "the manifest": ("data/manifest.json", lambda d: append(d / "manifest.json"), "changed"),
    "settings of the tokenizer": (
        "data/tokenizer_config.json", lambda d: append(d / "tokenizer_config.json"), "changed",
    ),
    "a template": ("data/chat_template.jinja", lambda d: (d / "chat_template.jinja").write_text("x"), "is new"),
    "a file gone": ("data/special_tokens_map.json", lambda d: (d / "special_tokens_map.json").unlink(), "is gone"),
}  # fmt: skip


def append(path):
    path.write_text(path.read_text() + "\n")


def rewrite(directory, texts):
    shutil.rmtree(directory)
    prepared(directory, items=texts, row_length=64)


@pytest.mark.parametrize("change", CHANGES)
def test_data_that_changed_since_the_run_began_is_refused(run, tmp_path, monkeypatch, change):
    saved(run, tmp_path / "w")
    begun(run, tmp_path / "w", monkeypatch)
    file, damage, what = CHANGES[change]
    shutil.copytree(tmp_path / file.split("/")[0], tmp_path / "kept")
    damage(tmp_path / file.split("/")[0])
    words = f"{file}: {what} since the run in .*w began; restore it, or choose another --workdir"
    kept = {path.name: path.read_bytes() for path in (tmp_path / "w" / "tokenizer").iterdir()}
    with pytest.raises(InputError, match=words) as error:
        train.train(run, tmp_path / "w")
    assert "\n" not in str(error.value)
    assert kept == {path.name: path.read_bytes() for path in (tmp_path / "w" / "tokenizer").iterdir()}
    shutil.rmtree(tmp_path / file.split("/")[0])
    (tmp_path / "kept").rename(tmp_path / file.split("/")[0])
    begun(run, tmp_path / "w", monkeypatch)


def test_a_tokenizer_that_is_not_that_of_the_dataset_is_refused(run, tmp_path):
    tokenizer = tmp_path / "data" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    with pytest.raises(InputError, match="data/tokenizer.json: not the tokenizer that this dataset was made with"):
        train.train(run, tmp_path / "w")


def test_data_is_read_as_it_was_prepared_and_another_preparation_is_refused(make_tiny_run, tmp_path, monkeypatch):
    run, book = make_tiny_run(), tmp_path / "book.txt"
    book.write_text("\n".join(TEXTS))
    run.data.files, run.data.documents = str(book), "line"
    saved(run, tmp_path / "w")
    book.write_text("\n".join(reversed(TEXTS)))
    begun(run, tmp_path / "w", monkeypatch)  # the file is not looked at again
    shutil.rmtree(tmp_path / "w" / "data")
    with pytest.raises(InputError, match="w/data/manifest.json: changed since the run in .*w began"):
        train.train(run, tmp_path / "w")
    shutil.rmtree(tmp_path / "w" / "data")
    shutil.move(tmp_path / "w", tmp_path / "moved")
    book.write_text("\n".join(TEXTS))
    begun(run, tmp_path / "moved", monkeypatch)
