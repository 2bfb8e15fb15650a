"""Damaged and hostile files of every format that a user can hand in: what was there, or one clear line; nothing else.

python tests/fuzz.py [--inputs=10000] [--formats=parquet,manifest] [--seed=0]

Every input is one change or several of one valid file; input i of a format is a function of (seed, format, i). They
are read in another process, so that a crash of a native library, or a hang, is a result like another. A class that is
unpickled on the way is one, too.
"""

import argparse
import json
import os
import pickle
import random
import resource
import select
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

HANG_SECONDS, START_SECONDS = 20, 180  # for one input, and before the first
MEMORY = 6 * 2**30  # bytes that a reader may ask for before it is told that there is no more
NASTY = (
    None, True, False, -1, 0, 1, 2, 2**31 - 1, 2**31, 2**63, 2**64, -(2**63), 10**400, 0.5, 1e308, float("nan"), "",
    "x", "..", "../x", "/etc/passwd", "a/b", "a\0b", "\ud800", "{{ 1 }}", "x" * 5000, [], {}, [[]], [None], ["x"] * 300,
    {"x": 1}, {"content": 1}, {"__class__": "os.system"},
)  # fmt: skip
_CPU = os.environ | {"JAX_PLATFORMS": "cpu"}
DEEP = "[" * 20000
NUMBERS = (0, 1, 2**7, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**60, 2**63 - 1, 2**63, 2**64 - 1)


def mutated(draw: random.Random, name: str, data: bytes) -> bytes:
    """`data` with one to four changes: of the values where the file is JSON, else of the bytes."""
    changes = draw.choice((1, 1, 1, 2, 4))
    if name.endswith((".json", ".jsonl")) and draw.random() < 0.75:
        lines = data.decode().split("\n") if name.endswith(".jsonl") else [data.decode()]
        for _ in range(changes):
            at = draw.randrange(len(lines))
            lines[at] = _changed_json(draw, lines[at])
        return "\n".join(lines).encode(errors="surrogatepass")
    for _ in range(changes):
        data = _changed_bytes(draw, data)
    return data


def _changed_json(draw: random.Random, text: str) -> str:
    try:
        root = [json.loads(text)]
    except (ValueError, RecursionError):  # by an earlier change
        return text
    if draw.random() < 0.01:
        return DEEP
    parents = []
    pending = [root]
    while pending:
        node = pending.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node))
        parents += [(node, key) for key in keys]
        pending += [node[key] for key in keys if isinstance(node[key], (dict, list))]
    node, key = draw.choice(parents) if len(parents) == 1 or draw.random() < 0.98 else parents[0]
    kind = draw.randrange(6)
    if kind == 0 and node is not root:
        del node[key]
    elif kind == 1 and isinstance(node, dict):
        node[draw.choice(("x", "", "..", "shape", "model", "text", key.upper()))] = node.pop(key)
    elif kind == 2:
        node[key] = draw.choice(draw.choice(parents)[:1])  # another part of the file, perhaps itself
    elif kind == 3 and isinstance(node[key], int):
        node[key] = node[key] + draw.choice((-1, 1, 2**16, -(2**33)))
    elif kind == 4 and isinstance(node[key], str):
        node[key] = _changed_bytes(draw, node[key].encode(errors="ignore")).decode(errors="replace")
    else:
        node[key] = draw.choice(NASTY)
    try:
        return json.dumps(root[0])
    except (ValueError, RecursionError):  # it holds itself
        return text


def _changed_bytes(draw: random.Random, data: bytes) -> bytes:
    if not data:
        return draw.randbytes(draw.randrange(20))
    places = [draw.randrange(len(data)) for _ in range(30)]
    at = next((at for at in places if data[at]), places[0])  # files are padded with zeros
    kind = draw.randrange(9)
    end = min(len(data), at + draw.choice((1, 4, 16, 300)))
    if kind == 0:
        return data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]
    if kind == 1:
        return data[:at] + bytes([draw.choice((0, 0xFF, 0x7F, 0x80, draw.randrange(256)))]) + data[at + 1 :]
    if kind == 2:
        width = draw.choice((1, 2, 4, 8))
        number = draw.choice(NUMBERS) % 2 ** (8 * width)
        return data[:at] + number.to_bytes(width, draw.choice(("little", "big"))) + data[at + width :]
    if kind == 3:
        return data[:at]
    if kind == 4:
        return data[:at] + data[end:]
    if kind == 5:
        return data[:at] + data[at:end] * draw.choice((2, 3, 1000)) + data[end:]
    if kind == 6:
        return data[:at] + draw.randbytes(end - at) + data[end:]
    if kind == 7:
        return data[:at] + bytes(end - at) + data[end:]
    start = draw.choice((0, max(0, len(data) - 200)))  # headers and footers
    at = min(len(data) - 1, start + draw.randrange(200))
    return data[:at] + bytes([draw.randrange(256)]) + data[at + 1 :]


def place(draw: random.Random, path: Path, data: bytes) -> None:
    """Puts a mutation of `data` at `path`; now and then something that is no such file."""
    path.unlink()
    kind = draw.randrange(60)
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        path.symlink_to("gone")
    elif kind == 2:
        os.mkfifo(path)
    elif kind == 3:
        path.write_bytes(b"")
    elif kind == 4:
        path.symlink_to("/dev/zero")
    elif kind > 5:  # 5: nothing is there
        path.write_bytes(mutated(draw, path.name, data))


def child(name: str, start: int, stop: int, seed: int, out) -> None:
    """Reads inputs start, …, stop - 1 of a format; writes a line for each, and the peak memory."""
    from fuzz_formats import FORMATS, WRONG

    make, read = (FORMATS | WRONG)[name]
    unpickled = _watch_for_pickles()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as directory:
        root = Path(directory) / "in"
        root.mkdir()
        valid = {path: path.read_bytes() for path in make(root)}
        read(root)
        read(root)
        before = _memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
        for i in range(start, stop):
            draw = random.Random(f"{seed} {name} {i}")
            path = draw.choice(list(valid))
            place(draw, path, valid[path])
            outcome = _outcome(read, root)
            if unpickled:
                outcome = f"unpickled {unpickled.pop()}"
            print(f"{name} {i} {path.relative_to(root)}: {outcome}", file=out)
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
            path.write_bytes(valid[path])
        print(f"{name} peak: {_memory('VmHWM') - before}", file=out)


def _watch_for_pickles() -> list:
    """Every class that a pickle asks for from now on, whoever reads it: Python reports them to its audit hooks."""
    found = []
    sys.addaudithook(lambda event, args: found.append(args) if event == "pickle.find_class" else None)
    pickle.loads(pickle.dumps(Counter()))
    assert found == [("collections", "Counter")]
    found.clear()
    return found


def _outcome(read, root: Path) -> str:
    from llada_jax.fields import InputError

    try:
        read(root)
        return "accepted"
    except InputError as error:
        return "refused" if "\n" not in str(error) else f"several lines: {str(error)[:300]!r}"
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # Rust's panics are no Exception
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "llada_jax" in f.filename]
        places = " ".join(f"{Path(f.filename).name}:{f.lineno}" for f in frames[-2:])
        return f"{type(error).__name__} at {places}: {' '.join(str(error).split())[:200]}"


def _memory(field: str) -> int:
    """Bytes, as the kernel counts them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def fuzz(names: Sequence[str], inputs: int, seed: int = 0) -> dict[str, dict]:
    """Reads so many inputs of each format: {name: {"accepted", "refused", "else": {outcome: input}, "seconds", …}}."""
    told = {name: {"accepted": 0, "refused": 0, "else": {}, "seconds": 0.0, "peak": 0} for name in names}
    left, start = list(names), 0
    while left:
        command = [sys.executable, __file__, f"--child={','.join(left)}", f"--start={start}", f"--inputs={inputs}"]
        with (
            tempfile.TemporaryFile() as errors,
            subprocess.Popen([*command, f"--seed={seed}"], stdout=subprocess.PIPE, stderr=errors, env=_CPU) as process,
        ):
            since = time.monotonic()
            for line in _lines(process):
                place, _, outcome = line.partition(": ")
                name, what = place.split(" ", 1)
                found, now = told[name], time.monotonic()
                found["seconds"], since = found["seconds"] + now - since, now
                if what == "peak":
                    found["peak"] = max(found["peak"], int(outcome))
                    left, start = left[1:], 0
                    continue
                start = int(what.split()[0]) + 1
                if outcome in ("accepted", "refused"):
                    found[outcome] += 1
                else:
                    found["else"].setdefault(outcome, what)
            if code := process.wait():
                errors.seek(0)
                tail = errors.read().decode(errors="replace")[-1500:]
                name = left[0] if left else names[-1]  # or at its very end
                told[name]["else"][f"{'hang' if code == -9 else 'crash'} of code {code}: {tail}"] = str(start)
                start += 1
                if start >= inputs or sum(len(told[name]["else"]) for name in names) > 20:
                    left, start = left[1:], 0
    return told


def _lines(process):
    """The lines that a child prints; it is killed if none comes for long."""
    pending, patience = b"", START_SECONDS
    while select.select([process.stdout], [], [], patience)[0]:
        data = os.read(process.stdout.fileno(), 2**16)
        if not data:
            return
        *lines, pending = (pending + data).split(b"\n")
        yield from (line.decode(errors="replace") for line in lines)
        patience = HANG_SECONDS
    process.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--formats", default="")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", default="")
    parser.add_argument("--start", type=int, default=0)
    given = parser.parse_args()
    if given.child:
        out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)  # what libraries print is not among our lines
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        for i, name in enumerate(given.child.split(",")):
            child(name, given.start if i == 0 else 0, given.inputs, given.seed, out)
        os._exit(0)  # at once: threads of libraries may be reading still
    from fuzz_formats import FORMATS

    print("| format | inputs | accepted | refused with a clear line | anything else | seconds | peak MB |")
    print("|---|---|---|---|---|---|---|", flush=True)
    failed = False
    for name in given.formats.split(",") if given.formats else FORMATS:
        told = fuzz([name], given.inputs, given.seed)[name]
        other = given.inputs - told["accepted"] - told["refused"]
        print(
            f"| {name} | {given.inputs} | {told['accepted']} | {told['refused']} | {other} | {told['seconds']:.0f} | "
            f"{told['peak'] / 1e6:.0f} |"
        )
        for outcome, example in told["else"].items():
            print(f"    {example}: {outcome}")
        sys.stdout.flush()
        failed = failed or other > 0 or bool(told["else"])
    sys.exit(failed)


if __name__ == "__main__":
    main()
