"""One of the processes of tests/test_processes.py: does the jobs that JOBS names and writes what it saw.

python tests/several.py --jobs=JOBS.json --out=DIR --coordinator=HOST:PORT --num_processes=N --process_id=I
"""

import hashlib
import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from faults import nan_batches
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from llada_jax import cli, sample
from llada_jax.data import pipeline
from llada_jax.data.tokenizer import load_tokenizer
from llada_jax.evaluation import likelihood, reversal
from llada_jax.fields import InputError, RunFailed
from llada_jax.interop import hf
from llada_jax.interop.workdir import load_model
from llada_jax.objectives import OBJECTIVES
from llada_jax.parallel import join, processes
from llada_jax.parallel.mesh import AXES, global_batch, make_mesh, rows_of_process
from llada_jax.storage.mirror import Workdir
from llada_jax.streams import stream
from llada_jax.training import run as train
from llada_jax.training.monitor import Events


def main(_argv):
    jobs, out = Path(flags.FLAGS.jobs), Path(flags.FLAGS.out)
    results = []
    for name, arguments in json.loads(jobs.read_text()):
        try:
            results.append({"result": JOBS[name](**arguments)})
        except (InputError, RunFailed) as error:
            if not getattr(error, "shared", False):
                raise
            results.append({"error": str(error)})
    (out / f"{jax.process_index()}.json").write_text(json.dumps(results))


def meet(sizes):
    """Sums over all axes and groups of axes: Gloo connects them at first use, and gives up after 30 seconds.

    Of programs that take long to compile, the processes of a busy machine reach the first use too far apart.
    """
    mesh = make_mesh(sizes)
    with jax.set_mesh(mesh):
        ones = jax.make_array_from_callback(
            mesh.devices.shape, NamedSharding(mesh, P(*AXES)), lambda index: np.ones((1,) * 4, np.float32)
        )
        groups = [group for count in (1, 2, 3, 4) for group in itertools.combinations(range(4), count)]
        jax.block_until_ready(jax.jit(lambda x: [jnp.sum(x, group) for group in groups])(ones))


def run(config, workdir, differs=False, broken=None):
    """Trains; the rows that this process read of the training data, in order."""
    read, original = [], pipeline.RowSource.__getitem__
    config = ConfigDict(config)
    if differs:
        config.train.seed = jax.process_index()

    def counted(source, index):
        if source.path.name != "validation":
            read.append(int(index))
        if len(read) > 20 and jax.process_index() == broken:
            raise InputError("row 7 can't be read")
        return original(source, index)

    pipeline.RowSource.__getitem__ = counted
    try:
        train.train(config, workdir)
    finally:
        pipeline.RowSource.__getitem__ = original
    return read


def sick(config, workdir, batches):
    """Trains on data of which some batches give a loss of NaN."""
    with nan_batches(batches):
        train.train(ConfigDict(config), workdir)


def masks(config, workdir, steps):
    """Digests of the tokens and the masks of each step, put together from all processes."""
    config = ConfigDict(config)
    mesh = make_mesh(dict(config.mesh))
    tokenizer, order, _ = train.open_data(config, Workdir(Path(workdir)))
    model = train.fit_to_tokenizer(config, tokenizer)
    objective = OBJECTIVES[config.objective.name].corrupt
    key = stream(config.train.seed, "train")
    digests = []
    with jax.set_mesh(mesh):
        noisy = jax.jit(lambda batch, step: objective(batch, jax.random.fold_in(key, step), model, config.objective))
        batches = train._batches(config, order, tokenizer, steps[0], mesh)
        for step, batch in zip(range(*steps), batches, strict=False):
            arrays = [batch["tokens"], *jax.tree.leaves(noisy(batch, step))]
            whole = [np.asarray(multihost_utils.process_allgather(x, tiled=True)) for x in arrays]
            digests.append(hashlib.sha256(b"".join(x.tobytes() for x in whole)).hexdigest())
    return digests


def place(sizes, order, batch_size):
    """The rows of this process, and whether a batch placed by it is the whole batch, for any order of the devices."""
    devices = [jax.devices()[i] for i in order]
    mesh = make_mesh(sizes, devices)
    rows = rows_of_process(mesh, batch_size)
    whole = np.arange(batch_size * 8, dtype=np.int32).reshape(batch_size, 8)
    with jax.set_mesh(mesh):
        placed = global_batch(whole[rows], mesh, batch_size)
        replicated = jax.jit(lambda x: jax.sharding.reshard(x, P(None, None)))(placed)
    return [rows.tolist(), bool((np.asarray(replicated.addressable_data(0)) == whole).all())]


def evaluate(workdir, sizes, couplets):
    """What a model writes and how likely it finds things, with its parameters split over all processes."""
    mesh = make_mesh(sizes)
    tokenizer = load_tokenizer(Path(workdir) / "tokenizer")
    with jax.set_mesh(mesh):
        model = load_model(workdir, mesh)
        lines, _ = reversal.fill_lines(model, tokenizer, couplets, "backward")
        prompt, answer = (tokenizer.encode(line) for line in couplets[0])
        score = likelihood.log_likelihood(model, prompt, answer, mc_num=8, batch_size=8)
    return [lines, score]


def complete(workdir, prompt):
    """The command of that name, which prints on the first process."""
    flags.FLAGS.checkpoint, flags.FLAGS.prompt = workdir, [prompt]
    sample.main([])


def save(workdir, target, full_disk=False):
    """A published checkpoint of a model that is split over all processes."""
    mesh = make_mesh(dict(data=1, fsdp=8, tensor=1, context=1))
    if full_disk:

        def write_file(*_):
            raise OSError(28, "No space left on device")

        hf.files.write_file = write_file
    with jax.set_mesh(mesh):
        hf.save_hf(load_model(workdir, mesh), target)


def fail(process, number=None, text="row 7 can't be read"):
    """One process raises what no other does, inside `all_or_none`; the exit code that each would end with."""
    try:
        with processes.all_or_none():
            if jax.process_index() == process:
                raise InputError(text) if number is None else OSError(number, text, "file")
    except Exception as error:
        return [cli.report(error), str(error)]


def tell(workdir):
    """Every process has an event of its own."""
    events = Events(workdir)
    processes.on_first_process(Path(workdir).mkdir)
    events.write("damaged row", step=jax.process_index(), cause="c", action="a", own=True)
    with processes.all_or_none():
        pass  # all have sent theirs
    if processes.is_first():
        events.collect()


JOBS = {
    "meet": meet,
    "run": run,
    "sick": sick,
    "masks": masks,
    "place": place,
    "evaluate": evaluate,
    "sample": complete,
    "save": save,
    "fail": fail,
    "tell": tell,
}

if __name__ == "__main__":
    join.define_flags()
    flags.DEFINE_string("jobs", None, "A JSON file: pairs of a job and its arguments.")
    flags.DEFINE_string("out", None, "Where the results go.")
    cli.run(join.joined(main))
