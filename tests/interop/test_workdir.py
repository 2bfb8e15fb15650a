"""The model of a workdir: from the newest checkpoint that is as its checksums say."""

import os
import random
import shutil

import jax
import pytest
from orbax.checkpoint import v1 as ocp
from reference import load

from llada_jax.fields import InputError
from llada_jax.files import CHECKSUMS, COMMIT, write_checksums
from llada_jax.interop import hf, workdir
from llada_jax.model.config import PRESETS
from llada_jax.parallel.mesh import make_mesh
from llada_jax.tools import convert_checkpoint


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A workdir with checkpoints of steps 0, 3 and 20, each of other numbers, as runs save them."""
    directory = tmp_path_factory.mktemp("whole") / "w"
    model = load("ckpt_b_gqa_tied")
    hf.save_workdir(model, directory)
    for step in (3, 20):
        leaves = {name: x + step for name, x in workdir.named_leaves(model)}
        place = directory / "checkpoints" / str(step)
        with workdir.frugal(leaves.values()):
            ocp.save_checkpointables(str(place), {"model": leaves, "optimizer": {"mu": leaves["wte"]}})
        write_checksums(place)
    return directory


@pytest.fixture
def place(whole, tmp_path):
    """The newest checkpoint in a copy of it."""
    shutil.copytree(whole, tmp_path / "w")
    return tmp_path / "w" / "checkpoints" / "20"


@pytest.mark.parametrize("seed", range(4))
def test_a_workdir_made_by_conversion_has_checksums_too(tmp_path, seed):
    hf.save_workdir(load("ckpt_b_gqa_tied"), tmp_path / "w")
    draw = random.Random(seed)
    files = sorted(path for path in (tmp_path / "w" / "checkpoints").rglob("*") if path.is_file())
    flip(draw.choice([path for path in files if path.stat().st_size]), draw)
    with pytest.raises(InputError, match="step 0 is damaged"):
        hf.load(tmp_path / "w")


def step_of(model):
    return round(float(model.ln_f[0] - load("ckpt_b_gqa_tied").ln_f[0]))


def flip(path, draw):
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


@pytest.mark.parametrize("seed", range(12))
def test_no_flipped_bit_of_a_file_of_the_model_is_read(place, capsys, seed):
    draw = random.Random(seed)
    files = [p for p in [*place.rglob("model/**/*"), *place.glob("*")] if p.is_file() and p.name != COMMIT]
    files = [p for p in files if p.stat().st_size]
    path = draw.choice(sorted(files))
    flip(path, draw)
    assert step_of(hf.load(place.parents[1])) == 3
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "step 20 is damaged (" in said and "the model of step 3 is taken" in said


def remove_checksums(place):
    (place / CHECKSUMS).unlink()


DAMAGE = {
    "a file shorter": lambda place: (place / "model" / "_METADATA").write_bytes(b"{"),
    "a file gone": lambda place: (place / "model" / "manifest.ocdbt").unlink(),
    "no model": lambda place: shutil.rmtree(place / "model"),
    "an empty directory": lambda place: [shutil.rmtree(place), place.mkdir()],
    "a FIFO": lambda place: [(place / "model" / "_METADATA").unlink(), os.mkfifo(place / "model" / "_METADATA")],
    "a directory for a file": lambda p: [(p / "model" / "_METADATA").unlink(), (p / "model" / "_METADATA").mkdir()],
    "FIFO checksums": lambda place: [remove_checksums(place), os.mkfifo(place / CHECKSUMS)],
    "checksums without end": lambda place: [remove_checksums(place), (place / CHECKSUMS).symlink_to("/dev/zero")],
    "checksums gone to nowhere": lambda place: [remove_checksums(place), (place / CHECKSUMS).symlink_to("gone")],
    "a directory for checksums": lambda place: [remove_checksums(place), (place / CHECKSUMS).mkdir()],
    **{
        f"checksums {text[:30]!r}": lambda place, text=text: (place / CHECKSUMS).write_text(text)
        for text in (
            "", "[]", "{", "7", "[" * 10**5, '{"a":' * 10**5, '{"a": 1}', '{"a": [1]}', '{"a": ["1", 2]}',
            '{"a": [true, "x"]}', '{"a": {"b": 1}}', '{"model/a\\u0000b": [1, "x"]}', '{"model/\\ud800": [1, "x"]}',
            '{"model/../../3/model/_METADATA": [1, "x"]}', f'{{"{"x" * 5000}": [1, "x"]}}', '{"model/": [1, "x"]}',
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_an_older_checkpoint_stands_in_for_a_damaged_one_and_nothing_hangs(place, capsys, name):
    DAMAGE[name](place)
    assert step_of(workdir.load_model(place.parents[1])) == 3
    assert capsys.readouterr().err.count("\n") == (name != "an empty directory")  # which is no checkpoint


def test_every_way_to_load_weights_compares_checksums(place, tmp_path, capsys):
    flip(place / "model" / "_METADATA", random.Random(0))
    source = place.parents[1]
    convert_checkpoint.convert(source, tmp_path / "hf", "hf", None, "5GB", verify=False)
    assert step_of(hf.load(tmp_path / "hf")) == 3
    mesh = make_mesh(dict(data=1, fsdp=4, tensor=2, context=1))
    model = hf.load(source, "bfloat16", mesh)
    assert model.wte.dtype == model.config.dtype == "bfloat16"
    assert len(model.wte.sharding.device_set) == 8
    assert capsys.readouterr().err.count("the model of step 3 is taken") == 2
    flip(place.parent / "3" / "model" / "_METADATA", random.Random(0))
    shutil.rmtree(place.parent / "0")
    with pytest.raises(InputError, match="step 20 is damaged .*; step 3 is damaged .*no other checkpoint") as error:
        hf.load(source)
    assert "\n" not in str(error.value)


def test_only_what_is_read_is_compared_and_an_undamaged_checkpoint_needs_no_words(place, capsys):
    for path in (place / "optimizer").rglob("*"):
        path.write_bytes(b"x") if path.is_file() else None
    assert step_of(hf.load(place.parents[1])) == 20
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["²", "٣٤", "020", "99.writing", "-1", "1e3"])
def test_a_directory_that_is_no_step_is_none(place, name):
    shutil.copytree(place, place.parent / name)
    assert sorted(workdir.saved_steps(place.parent)) == [0, 3, 20]


def test_an_abstract_model_allocates_nothing():
    before = {id(x) for x in jax.live_arrays()}
    like = workdir.abstract_model(PRESETS["llada_8b"], make_mesh(dict(data=1, fsdp=8, tensor=1, context=1)))
    workdir.abstract_model(PRESETS["illada_8b"], None)
    assert all(x.size < 10 for x in jax.live_arrays() if id(x) not in before)
    leaves = jax.tree.leaves(like)
    assert all(isinstance(x, jax.ShapeDtypeStruct) and x.sharding.mesh.size == 8 for x in leaves)
    assert sum(x.size for x in leaves) == 8_015_581_184


def test_a_path_that_is_not_utf8_is_refused_where_checkpoints_cannot_have_it(whole, tmp_path):
    odd = tmp_path / os.fsdecode(b"w\xff\xfe")
    for write in (
        lambda: hf.save_workdir(load("ckpt_b_gqa_tied"), odd),
        lambda: convert_checkpoint.convert(whole, odd, "orbax", None, "5GB", verify=False),
    ):
        with pytest.raises(InputError, match="w\udcff\udcfe: checkpoints need a path in UTF-8"):
            write()
    assert list(tmp_path.iterdir()) == []
    shutil.copytree(whole, odd)
    with pytest.raises(InputError, match="checkpoints need a path in UTF-8"):
        hf.load(odd)
