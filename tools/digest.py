"""One SHA-256 over all that a run must not lose, to compare two runs by.

python tools/digest.py --checkpoint=DIR [--step=N]

DIR is a workdir; default of --step: its newest. Parameters, optimizer state, step and data position count: two
checkpoints have the same digest if and only if these are the same bits, on whatever mesh and hosts they were written.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from absl import flags

from llada_jax import cli
from llada_jax.fields import InputError
from llada_jax.files import damage
from llada_jax.interop.workdir import frugal, place_of, readable


def digest(workdir: str | Path, step: int | None = None) -> tuple[int, str]:
    """The step and the digest, in hexadecimal digits. One array at a time is in memory.

    Raises InputError if there is no such checkpoint, or if it is damaged.
    """
    import jax
    import numpy as np
    from orbax.checkpoint import v1 as ocp

    place = place_of(workdir, step)
    if found := damage(place):
        raise InputError(f"{place}: damaged ({found})")
    sha, device = hashlib.sha256(), jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    with readable(place):
        metadata: Any = ocp.checkpointables_metadata(str(place))
        stored = {(part, name): x for part in metadata.metadata for name, x in metadata.metadata[part].items()}
        for (part, name), x in sorted(stored.items()):
            like = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device)
            context = frugal([like])
            context.pytree.loading.partial_load = True
            with context:
                array = np.asarray(ocp.load_checkpointables(str(place), {part: {name: like}})[part][name])
            sha.update(f"{part}.{name} {array.dtype} {array.shape}\n".encode() + array.tobytes())
    train = metadata.custom_metadata["config"]["train"]
    position = {"row": int(place.name) * train["batch_size"], "seed": train["seed"]}
    sha.update(json.dumps(position, sort_keys=True).encode())
    return int(place.name), sha.hexdigest()


def main(_argv: list[str]) -> None:
    if not flags.FLAGS.checkpoint:
        raise InputError("--checkpoint is needed: the workdir of a run")
    step, found = digest(flags.FLAGS.checkpoint, flags.FLAGS.step)
    print(f"{found} step {step}")


if __name__ == "__main__":
    flags.DEFINE_string("checkpoint", None, "The workdir of a run.")
    flags.DEFINE_integer("step", None, "Of the checkpoint; default: the newest.")
    cli.run(main)
