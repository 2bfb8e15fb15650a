"""The rows of a step are a pure function of (seed, step): any start, any number of processes."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from llada_jax.data import pipeline
from llada_jax.data.dataset import open_dataset
from llada_jax.data.pipeline import batches, ordered
from llada_jax.data.prepare import prepare_dataset
from llada_jax.data.tokenizer import load_tokenizer
from llada_jax.fields import InputError

TOKENIZER = load_tokenizer(Path(__file__).parents[1] / "golden" / "tokenizer")
EOS = TOKENIZER.eos_id
LENGTH = 64


def dialogue(i):
    answer = "yes " * (1 + i % 11)
    return [{"role": "user", "content": f"q {i}"}, {"role": "assistant", "content": answer}]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    common = {"tokenizer": TOKENIZER, "row_length": LENGTH, "workers": 1, "progress": False}
    texts = [f"text {i} " + "a quick fox " * (i % 9) for i in range(60)]
    more = [f"other {i}" for i in range(23)]
    dialogues = [dialogue(i) for i in range(37)]
    prepare_dataset(root / "text", items=texts, packing="document", rows_per_shard=17, **common)
    prepare_dataset(root / "more", items=more, packing="document", **common)
    prepare_dataset(root / "chat", kind="chat", items=dialogues, **common)
    return root


def take(order, **options):
    defaults = {"batch_size": 8, "kind": "text", "start_step": 0, "num_steps": 6, "seed": 1}
    return list(batches(order, eos_id=EOS, **defaults | options))


def equal(ones, others):
    assert len(ones) == len(others)
    for one, other in zip(ones, others, strict=True):
        assert one.keys() == other.keys()
        assert all((one[name] == other[name]).all() for name in one)


def joined(parts):
    """Batches of several processes, put together in the order of the processes."""
    return [
        {name: np.concatenate([batch[name] for batch in step]) for name in step[0]} for step in zip(*parts, strict=True)
    ]


SETTINGS = [
    ("text", ["text"], {}),
    ("text", ["text", "more"], {"random_length_fraction": 0.5, "split_fraction": 0.5}),
    ("chat", ["chat"], {}),
    ("chat", ["chat", "text"], {}),
]


@pytest.mark.parametrize("kind, names, options", SETTINGS)
@pytest.mark.parametrize("processes", [2, 4])
def test_batches_do_not_depend_on_the_number_of_processes(paths, kind, names, options, processes):
    order = ordered([open_dataset(paths / name) for name in names], seed=3)
    shares = np.arange(8).reshape(processes, -1)
    parts = [take(order, kind=kind, only=rows, **options) for rows in shares]
    equal(take(order, kind=kind, **options), joined(parts))


@pytest.mark.parametrize("kind, names, options", SETTINGS)
def test_resuming_continues_as_if_never_stopped(paths, kind, names, options):
    order = ordered([open_dataset(paths / name) for name in names], seed=3)
    whole = take(order, kind=kind, num_steps=20, **options)
    again = ordered([open_dataset(paths / name) for name in names], seed=3)
    equal(whole[13:], take(again, kind=kind, start_step=13, num_steps=20, threads=1, **options))
    assert take(order, kind=kind, start_step=20, num_steps=20, **options) == []


@pytest.mark.parametrize("batch_size", [4, 7])
def test_row_j_of_step_s_is_the_ordered_row(paths, batch_size):
    order = ordered([open_dataset(paths / "text")], seed=3)
    for step, batch in enumerate(take(order, batch_size=batch_size)):
        for j in range(batch_size):
            row, _ = order.read(step * batch_size + j)
            assert (batch["tokens"][j] == row["tokens"]).all()
            assert (batch["segment_ids"][j] == row["segment_ids"]).all()


@pytest.mark.parametrize("epoch", [0, 1, 5])
@pytest.mark.parametrize("table_rows", [2**16, 0])  # small sources by table, large ones by Grain
def test_every_row_once_per_epoch(paths, monkeypatch, epoch, table_rows):
    monkeypatch.setattr(pipeline, "_TABLE_ROWS", table_rows)
    source = open_dataset(paths / "text")
    order = ordered([source], seed=3)
    size = len(source)
    places = [order.place(g) for g in range(epoch * size, (epoch + 1) * size)]
    assert sorted(row for _, row in places) == list(range(size))
    following = [order.place(g + size) for g in range(epoch * size, (epoch + 1) * size)]
    assert places != following


@pytest.mark.parametrize("table_rows", [2**16, 0])
def test_seeds_give_orders_that_have_nothing_in_common(paths, monkeypatch, table_rows):
    monkeypatch.setattr(pipeline, "_TABLE_ROWS", table_rows)
    source = open_dataset(paths / "text")

    def epoch_of(seed, epoch):
        order = ordered([source], seed=seed)
        return [order.place(epoch * len(source) + i) for i in range(len(source))]

    assert epoch_of(3, 0) == epoch_of(3, 0)
    assert len({tuple(epoch_of(seed, epoch)) for seed in (3, 4) for epoch in (0, 1)}) == 4


@pytest.mark.parametrize("weights", [[1.0, 3.0], [0.5, 0.5], [0.97, 0.03]])
def test_mixtures_keep_their_proportions_throughout(paths, weights):
    sources = [open_dataset(paths / name) for name in ("text", "more")]
    order = ordered(sources, weights, seed=3)
    share = weights[1] / sum(weights)
    places = [order.place(g) for g in range(2000)]
    for start in (0, 1000):
        drawn = np.mean([source for source, _ in places[start : start + 1000]])
        assert drawn == pytest.approx(share, abs=0.01)
    counts = Counter(row for source, row in places if source == 1)
    assert max(counts.values()) - min(counts[row] for row in range(len(sources[1]))) <= 1


def test_text_rows_are_maskable_but_for_padding(paths):
    order = ordered([open_dataset(paths / "text")], seed=3)
    for batch in take(order):
        assert batch["tokens"].dtype == batch["segment_ids"].dtype == np.int32
        assert batch["maskable"].dtype == bool and batch["answer_length"].dtype == np.int32
        assert (batch["maskable"] == (batch["segment_ids"] > 0)).all()
        assert (batch["answer_length"] == batch["maskable"].sum(1)).all()
        assert (batch["tokens"][~batch["maskable"]] == EOS).all()


@pytest.mark.parametrize("names", [["chat"], ["chat", "text"]])
def test_answers_are_padded_with_eos_to_the_longest_dialogue(paths, names):
    order = ordered([open_dataset(paths / name) for name in names], seed=3)
    for step, batch in enumerate(take(order, kind="chat")):
        places = [order.place(8 * step + j) for j in range(8)]
        read = [order.read(8 * step + j)[0] for j in range(8)]
        longest = max(row["length"] for (source, _), row in zip(places, read, strict=True) if source == 0)
        for j, ((source, _), row) in enumerate(zip(places, read, strict=True)):
            prompt, length = row["prompt_length"], row["length"]
            end = longest if source == 0 else length
            assert batch["tokens"][j].tolist() == row["tokens"][:length].tolist() + [EOS] * (LENGTH - length)
            assert batch["segment_ids"][j].tolist() == [1] * end + [0] * (LENGTH - end)
            assert batch["maskable"][j].tolist() == (
                [False] * prompt + [True] * (end - prompt) + [False] * (LENGTH - end)
            )
            assert batch["answer_length"][j] == end - prompt


def test_kind_text_reads_dialogues_as_running_text(paths):
    for batch in take(ordered([open_dataset(paths / "chat")], seed=3)):  # iLLaDA's SFT
        assert batch["maskable"][:, 0].all()


def test_mistakes_in_the_call_are_named(paths):
    text, chat = open_dataset(paths / "text"), open_dataset(paths / "chat")
    with pytest.raises(InputError, match="split_fraction is no option of kind 'chat'"):
        take(ordered([chat]), kind="chat", split_fraction=0.3)
    with pytest.raises(InputError, match="kind is 'sft'"):
        take(ordered([chat]), kind="sft")
    for weights in ([1.0], [1.0, 0.0], [1.0, float("inf")], [float("nan"), 1.0], [1.0, "1"]):
        with pytest.raises(InputError, match="weights"):
            ordered([text, chat], weights)


@pytest.mark.parametrize(
    "entry",
    [1, "data", (), ("data",), ("data", 1.0, 2), ("", 1.0), (1, 2), (None, 1), ("data", "x"), ("data", None)]
    + [("data", weight) for weight in (0, -1.0, 1e-9, float("inf"), float("nan"), 10**400, True)]
    + [("a\udcff", 1.0)],
)
def test_a_mixture_that_is_none_is_named(entry):
    with pytest.raises(InputError, match=r"config.data.mixture\[1\]") as error:
        pipeline.parse_mixture((("data", 1), entry))
    assert "\n" not in str(error.value)


def test_a_mixture_is_directories_and_weights():
    assert pipeline.parse_mixture([["a/b", 1], ("c", 0.25)]) == [(Path("a/b"), 1.0), (Path("c"), 0.25)]


def test_sources_of_different_length_or_tokenizer_do_not_mix(paths, tmp_path):
    common = {"items": ["a b c"], "tokenizer": TOKENIZER, "progress": False}
    prepare_dataset(tmp_path / "short", row_length=16, **common)
    with pytest.raises(InputError, match="--row_length"):
        ordered([open_dataset(paths / "text"), open_dataset(tmp_path / "short")])
    other = open_dataset(paths / "more")
    other.manifest["tokenizer"]["fingerprint"] = "else"
    with pytest.raises(InputError, match="--tokenizer"):
        ordered([open_dataset(paths / "text"), other])
