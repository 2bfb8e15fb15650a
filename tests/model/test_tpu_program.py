"""The step compiled ahead of time for TPUs that are not here: its kernels, its memory, its compiler options."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from llada_jax.config import run_config
from llada_jax.fields import InputError
from llada_jax.model.attention import attention
from llada_jax.model.config import PRESETS
from llada_jax.model.masks import Mask
from llada_jax.model.products import PRODUCTS, times
from llada_jax.objectives import OBJECTIVES
from llada_jax.parallel import chips
from llada_jax.parallel.mesh import BATCH, HIDDEN, TOKENS, make_mesh
from llada_jax.training import optimizer
from llada_jax.training.step import init_state, make_train_step

MESH = dict(data=1, fsdp=2, tensor=1, context=2)
ROWS, LENGTH = 2, 1024
CONFIG = dataclasses.replace(
    PRESETS["tiny"], d_model=1024, n_heads=16, n_kv_heads=2, n_layers=2, vocab_size=1024, embedding_size=1024,
    dtype="bfloat16", remat="attention",
)  # fmt: skip


@pytest.fixture
def topology(monkeypatch):
    """(name, slices=1) -> devices. No cache of compiled programs: those for absent devices can't be read back."""
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    directory = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    describe = functools.partial(topologies.get_topology_desc, platform="tpu")
    yield lambda name, slices=1: list(describe(topology_name=name, num_slices=slices).devices)
    jax.config.update("jax_compilation_cache_dir", directory)
    compilation_cache.reset_cache()


def lowered_step(mesh, config, attention="padding"):
    """The step of `config` for the devices of `mesh`, lowered: no array is made."""
    with jax.set_mesh(mesh):
        update = optimizer.make_optimizer(run_config("tiny").optimizer, total_steps=10, tokens_per_step=1)
        key = jax.eval_shape(lambda: jax.random.key(0))
        state = jax.eval_shape(jax.jit(init_state, static_argnums=(0, 1)), config, update, key)
        place = lambda x, axes: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, axes))
        state = jax.tree.map(lambda x: place(x, P() if x.sharding is None else x.sharding.spec), state)
        rows = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
        tokens, length = place(rows, TOKENS), place(jax.ShapeDtypeStruct((ROWS,), jnp.int32), P())
        maskable = place(rows.update(dtype=jnp.bool_), TOKENS)
        batch = dict(tokens=tokens, segment_ids=tokens, maskable=maskable, answer_length=length)
        options, refused = chips.of_mesh(mesh)
        assert not refused
        objective = ConfigDict(dict(eps=1e-3, stratified=False, balanced=True, attention=attention))
        step = make_train_step(update, OBJECTIVES["pretrain"], objective, compiler_options=options)
        return step.lower(state, batch, place(key, P()))


@pytest.mark.parametrize("attention, segmented", [("full", ""), ("padding", "_segmented")])
def test_a_step_for_tpus_runs_splash(topology, attention, segmented):
    text = lowered_step(make_mesh(MESH, topology("v5e:2x2")), CONFIG, attention).as_text()
    # The saved output and log of sums leave no second forward kernel to the backward pass.
    assert text.count(f'kernel_name = "splash_mha_fwd{segmented}_residuals"') == 1
    assert text.count(f'kernel_name = "splash_mha_dkv{segmented}_no_residuals"') == 1
    assert text.count("tpu_custom_call") == 2
    # The seven products of a layer are held in rows, q, k and v in tiles besides: forward, again for the backward pass
    # (all but the last), and their gradients.
    assert text.count("@LayoutConstraint") == 10 + 9 + 10


@pytest.mark.parametrize(
    "sizes",
    [
        dict(data=1, fsdp=4, tensor=1, context=1),
        pytest.param(dict(data=1, fsdp=1, tensor=2, context=2), marks=pytest.mark.slow),
    ],
)
def test_masks_of_blocks_compile_for_tpus(topology, sizes):
    """Computed inside of the kernel: no [L, S] array, whatever the length."""
    mesh = make_mesh(sizes, topology("v5e:2x2"))
    place = lambda shape, axes, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, axes))
    heads = P(BATCH, "tensor", "context", None)
    q, k = (place((4, n, 4096, 128), heads, jnp.bfloat16) for n in (4, 2))
    ids = place((4, 4096), TOKENS, jnp.int32)

    def loss(q, k, v, ids):
        return jnp.sum(attention(q, k, v, Mask("noisy_and_clean", ids, block=32)).astype(jnp.float32))

    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, k, ids).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4096 * 4096


def test_a_step_compiled_for_v5e_holds_no_scores(topology):
    compiled = lowered_step(make_mesh(MESH, topology("v5e:2x2")), CONFIG).compile()
    scores = 4 * CONFIG.n_heads * (LENGTH // 2) * LENGTH  # bytes of one row on one device, float32
    assert compiled.memory_analysis().temp_size_in_bytes < scores


def test_slices_are_spanned_by_data(topology):
    devices = topology("v5e:2x2", 2)
    mesh = make_mesh(dict(data=2, fsdp=-1, tensor=1, context=2), devices)
    assert dict(mesh.shape) == dict(data=2, fsdp=2, tensor=1, context=2)
    for i, part in enumerate(mesh.devices):
        assert {device.slice_index for device in part.flat} == {i}
    with pytest.raises(InputError, match="the devices are in 2 slices or hosts; data x fsdp must be a multiple of"):
        make_mesh(dict(data=1, fsdp=1, tensor=-1, context=1), devices)


def test_an_option_that_the_compiler_does_not_know_is_reported(topology, monkeypatch):
    mesh = make_mesh(dict(data=1, fsdp=-1, tensor=1, context=1), topology("v6e:2x2"))
    known, lines = chips.of_mesh(mesh)
    assert known["xla_tpu_scoped_vmem_limit_kib"] == 98304 and not lines
    monkeypatch.setattr(chips, "compiler_options_for", lambda kind: {**known, "xla_tpu_nonsense": True})
    assert chips.of_mesh(mesh)[0] == known
    assert chips.of_mesh(mesh)[1] == [
        "compiler option xla_tpu_nonsense is left out: INVALID_ARGUMENT: No such compile option: 'xla_tpu_nonsense'"
    ]


def test_every_chip_has_its_options():
    assert chips.compiler_options_for("unheard of") == {}
    for kind in ("cpu", "TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x", "NVIDIA H100 80GB HBM3"):
        assert chips.compiler_options_for(kind)


@pytest.mark.parametrize("chip, axes", [("v5e:2x2", 3), ("v6e:2x2", 2)])
def test_weights_of_heads_are_gathered_as_rows_but_on_v5e(topology, chip, axes):
    mesh = make_mesh(dict(data=1, fsdp=4, tensor=1, context=1), topology(chip))
    place = lambda shape, spec: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))
    x, weight = place((4, 16, 512), HIDDEN), place((4, 128, 512), P("tensor", None, "fsdp"))
    out = P(BATCH, "context", "tensor", None)
    with jax.set_mesh(mesh):
        found = jax.make_jaxpr(lambda x, w: times(x, w, PRODUCTS["q_proj"], out))(x, weight)
    gathers = [e for e in found.jaxpr.eqns if e.primitive.name == "reshard"]
    assert gathers[0].invars[0].aval.ndim == axes
