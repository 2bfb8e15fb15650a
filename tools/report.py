"""Makes report.html, one page without external parts: of a quickstart, of any run, or of several side by side.

python tools/report.py DIR
python tools/report.py runs/a runs/b --prompt='床前明月光，' --output=compared.html

The page reads without JavaScript; only the replay of the denoising needs it. What was not measured is left out of it.
With --prompt every model continues that text, and the page shows how. The markup is in report.html.j2.
"""

import json
import math
import re
import statistics
from pathlib import Path

import jinja2
from absl import flags

from llada_jax import cli
from llada_jax.fields import InputError
from llada_jax.files import read_json
from llada_jax.storage.buckets import is_bucket
from llada_jax.storage.mirror import opened

MASK = "▒"
SMOOTH, RAW = "1_loss/smooth_elbo_nats_per_token", "1_loss/loss"
SPEED, RATIO = "4_speed/tokens_per_second", "2_ce_by_mask_ratio/"
NAMES = {"llada": "LLaDA", "arm": "Autoregressive control"}
CHARTS = (  # title, unit, and the names under which a run may have it
    ("Loss", "nats per token, smooth", (SMOOTH, "1_loss/smooth_ce_nats_per_token")),
    ("Validation", "nats per token", ("0_validation/elbo_nats_per_token", "0_validation/ce_nats_per_token")),
    ("Learning rate", "", ("3_optimizer/learning_rate",)),
    ("Gradient", "norm", ("3_optimizer/grad_norm",)),
    ("Throughput", "tokens/s", (SPEED,)),
    ("Model FLOPs", "share of the peak", ("4_speed/mfu",)),
    ("Goodput", "share of the time in steps that count", ("4_speed/goodput",)),
)
MOST_EVENTS = 50  # of a run that are shown, the last ones
BASE = 160  # of the bars by mask ratio: the height at which they stand


def render(workdir: str | Path, output: str | Path | None = None) -> Path:
    """Writes the page of a quickstart, by default report.html in its workdir, whole or not at all; returns its path.

    Raises InputError if report.json, or the metrics.jsonl of a run it names, is missing or broken.
    """
    workdir = Path(workdir)
    report = _read_report(workdir / "report.json")
    runs = {name: _read_metrics(workdir / run / "metrics.jsonl") for name, run in report.get("runs", {}).items()}
    losses = [_loss(name, run) for name, run in runs.items() if run.get(SMOOTH)]
    return _write(
        Path(output or workdir / "report.html"), title="Forwards and backwards", report=report, facts=_facts(report),
        losses=losses, bars=_ratios(runs.get("llada", {})),
        trajectories=list(map(_trajectory, report.get("trajectories") or ())), runs=[], charts=[],
    )  # fmt: skip


def render_runs(workdirs: list[str], output: str | Path | None = None, prompt: str = "") -> Path:
    """Writes a page about runs, by default into the workdir of the first one; returns its path.

    workdirs: directories of this machine or in buckets. prompt: a text that each model continues; "": none. Raises
    InputError where a workdir holds no metrics.
    """
    names = _short_names(workdirs)
    if not output and is_bucket(workdirs[0]):
        raise InputError(f"{workdirs[0]} is in a bucket; say with --output where the page goes on this machine")
    metrics, runs = [], []
    for name, workdir in zip(names, workdirs, strict=True):
        with opened(workdir) as files:
            files.fetch()
            metrics.append(_read_metrics(files.local / "metrics.jsonl", workdir))
            own = {"times": _times(files.local), "events": _events(files.local)}
        runs.append({"name": name, "bars": _ratios(metrics[-1])} | own)
    charts = [_compared(title, unit, keys, metrics) for title, unit, keys in CHARTS]
    trajectories = [_continued(workdir, name, prompt) for workdir, name in zip(workdirs, names, strict=True) if prompt]
    return _write(
        Path(output or Path(workdirs[0]) / "report.html"), title=", ".join(names), report={}, facts=[], losses=[],
        bars=[], trajectories=list(map(_trajectory, trajectories)), runs=runs, charts=list(filter(None, charts)),
    )  # fmt: skip


def _write(output: Path, **context) -> Path:
    page = _template().render(base=BASE, css=_beside("report.css"), js=_beside("report.js"), **context)
    temporary = output.with_name(output.name + ".tmp")
    temporary.write_bytes(page.encode())
    temporary.replace(output)
    return output


def _template() -> jinja2.Template:
    """report.html.j2, which holds all markup; it escapes what it shows."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":")}
    environment.filters |= {
        "number": format, "percent": _percent, "short": _short, "tick": _tick, "duration": _duration,
        "kind": _kind, "name": lambda key: NAMES[_kind(key)],
    }  # fmt: skip
    return environment.from_string(_beside("report.html.j2"))


def _read_report(path: Path) -> dict:
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"no {path}; --workdir is the directory of a finished quickstart") from None
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from None
    if not isinstance(report, dict):
        raise InputError(f"{path} holds a {type(report).__name__}, not an object")
    return report


def _read_metrics(path: Path, run: str | Path | None = None) -> dict[str, list[tuple[int, float]]]:
    """The points (step, value) of each scalar, by step; of a repeated step the last one counts.

    run: the workdir that the user named, for messages, where `path` is a copy.
    """
    place = f"{str(run or path.parent).rstrip('/')}/{path.name}"
    points: dict[str, dict[int, float]] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise InputError(f"no {place}; --workdir names a quickstart or runs that have begun") from None
    for number, line in enumerate(lines, 1):
        try:
            scalars = json.loads(line)
            step = scalars.pop("step")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{place}, line {number} is not a line of metrics: {error}") from None
        for name, value in scalars.items():
            if value is not None:
                points.setdefault(name, {})[step] = value
    return {name: sorted(values.items()) for name, values in points.items()}


def _facts(report: dict) -> list[str]:
    facts = [f"config {report['config']}"] if "config" in report else []
    facts += [f"seed {report['seed']}"] if "seed" in report else []
    facts += [f"{report['couplets']:,} couplets"] if "couplets" in report else []
    return facts + ([f"{_duration(report['seconds'])} in all"] if "seconds" in report else [])


def _trajectory(trajectory: dict) -> dict:
    """The frames, and each token of the last one with the step that wrote it."""
    frames, tokens = [[_shown(piece) for piece in frame] for frame in trajectory["frames"]], []
    for i, piece in enumerate(frames[-1]):
        written = [k for k in range(1, len(frames)) if frames[k - 1][i] == MASK != frames[k][i]]
        tokens.append(
            {
                "piece": piece,
                "kind": {MASK: " mask", "∙": " end"}.get(piece, ""),
                "written": max(written, default=0),
                "confidence": trajectory["confidence"][i] or 0,
            }
        )
    prompt = trajectory.get("prompt")
    return {
        "title": trajectory["title"], "prompt": prompt, "tokens": tokens, "frames": frames, "last": len(frames) - 1
    }  # fmt: skip


def _shown(piece: str) -> str:
    """A piece of `Tokenizer.piece` as the page writes it: special tokens as one quiet sign that every font has."""
    if piece in ("␂", "␃", "␄") or re.fullmatch(r"<[|/a-zA-Z][^<>\s]*>", piece):  # </s>; not a byte, <0xE5>
        return "∙"
    return piece.replace("⏎", "↵")


def _loss(name: str, run: dict) -> dict:
    """One run's panel: the smooth curve, over the raw one, which is cut at the frame."""
    smooth, speeds = run[SMOOTH], [value for _, value in run.get(SPEED, [])]
    chart = _chart([("raw", run.get(RAW, [])), ("smooth", smooth)], max(value for _, value in smooth))
    return chart | {"name": name, "speed": statistics.median(speeds) if speeds else None}


def _compared(title: str, unit: str, names: tuple[str, ...], runs: list[dict]) -> dict | None:
    """A panel with a curve for each run that has such a scalar; None where none has."""
    found = [next((run[name] for name in names if run.get(name)), []) for run in runs]
    lines = [(f"smooth r{i % 6}", points) for i, points in enumerate(found) if points]
    if not lines:
        return None
    return _chart(lines, max(value for _, points in lines for _, value in points)) | {"title": title, "unit": unit}


def _chart(lines: list[tuple[str, list]], highest: float) -> dict:
    """Curves as points of an SVG, each with its class; the ticks of the axes; where curves end, and with what."""
    width, height = 360, 178  # of the frame, inside 400 × 210
    most, last = 1.1 * highest or 1.0, max(max((points[-1][0] for _, points in lines if points), default=1), 1)
    x = lambda step: width * step / last
    y = lambda value: height * (1 - value / most)
    return {
        "width": width, "height": height,
        "lines": [(kind, " ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in _thin(points))) for kind, points in lines],
        "levels": [(y(value), value) for value in _ticks(most, 4)],
        "steps": [(x(step), step) for step in _ticks(last, 4)],
        "ends": [(x(p[-1][0]), y(p[-1][1]), p[-1][1], kind) for kind, p in lines if p and kind != "raw"],
    }  # fmt: skip


def _short_names(workdirs: list[str]) -> list[str]:
    """The last part of each path; the whole paths where these are not different."""
    short = [Path(workdir).name or Path(workdir).resolve().name for workdir in workdirs]
    return short if len(set(short)) == len(short) else workdirs


def _times(workdir: Path) -> list[dict]:
    """Where a run's time went: phases with their seconds and shares, the longest first."""
    path = workdir / "goodput.json"
    seconds = read_json(path).get("seconds", {}) if path.exists() else {}
    whole = sum(seconds.values()) or 1
    rows = [{"name": name, "seconds": s, "share": s / whole} for name, s in seconds.items() if s > 0]
    return sorted(rows, key=lambda row: -row["seconds"])


def _events(workdir: Path) -> list[dict]:
    path = workdir / "events.jsonl"
    if not path.exists():
        return []
    try:
        found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [{key: event[key] for key in ("step", "event", "cause", "action")} for event in found][-MOST_EVENTS:]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} holds a line that is no event: {error}") from None


def _continued(workdir: str, name: str, prompt: str) -> dict:
    """How a run's model continues a text: a trajectory as in report.json."""
    import numpy as np

    import llada_jax
    from llada_jax.data.tokenizer import load_tokenizer
    from llada_jax.interop import hf
    from llada_jax.sampling.prompts import encode_prompt

    tokenizer, model = load_tokenizer(hf.tokenizer_directory(workdir)), llada_jax.load(workdir)
    ids = encode_prompt(tokenizer, prompt)
    room = min(32, model.config.max_sequence_length - len(ids))
    if room < 1:
        raise InputError(f"--prompt has {len(ids)} tokens; they leave no room in the context of {workdir}")
    _, stats = llada_jax.generate(model, [ids], gen_length=room, return_stats=True)
    frames = np.concatenate([np.full((1, room), tokenizer.mask_id), stats.trajectory()[:, 0, len(ids) :]])
    pieces = [[MASK if id == tokenizer.mask_id else tokenizer.piece(int(id)) for id in frame] for frame in frames]
    confidence = np.asarray(stats.probability)[0, len(ids) :].tolist()
    return {"title": name, "prompt": prompt, "frames": pieces, "confidence": confidence}


def _ratios(run: dict) -> list[dict]:
    """Cross-entropy by mask ratio, the last values of a run: the bars from left to right, 640 wide in all."""
    last = {name.removeprefix(RATIO): v[-1][1] for name, v in run.items() if name.startswith(RATIO)}
    most, bars = max(last.values(), default=0) or 1.0, []
    for i, ratio in enumerate(sorted(last, key=lambda ratio: float(ratio.split("-")[0]))):
        low, high = (float(edge) * 100 for edge in ratio.split("-"))
        width, height = 640 / len(last), (BASE - 24) * last[ratio] / most
        bars.append({"x": i * width, "width": width, "height": height, "nats": last[ratio], "low": low, "high": high})
    return bars


def _thin(points: list, most: int = 800) -> list:
    """At most about `most` of the points, evenly, the last one among them."""
    return points[:: -(-len(points) // most)][:-1] + points[-1:] if len(points) > most else points


def _ticks(top: float, about: int) -> list[float]:
    """Round values from 0 to `top`: steps of 1, 2 or 5 times a power of ten."""
    if top <= 0:
        return [0.0]
    power = 10 ** math.floor(math.log10(top / about))
    step = next(m * power for m in (1, 2, 5, 10) if top / (m * power) <= about)
    return [round(i * step, 10) for i in range(int(top / step) + 1)]


def _kind(name: str) -> str:
    return "arm" if name.startswith("arm") else "llada"


def _short(value: float) -> str:
    """A measured number, as short as it says something."""
    size = abs(value)
    return format(value, ",.0f" if size >= 1000 else ".3f" if size >= 0.01 or not size else ".2g")


def _tick(value: float) -> str:
    """A round number beside an axis: at most five signs."""
    return (
        format(value, "g")
        if not value or abs(value) >= 0.01
        else f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-")
    )


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _beside(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def main(argv: list[str]) -> None:
    workdirs = [*(flags.FLAGS.workdir or ()), *argv[1:]]
    if not workdirs:
        raise InputError("say which runs: report.py WORKDIR [WORKDIR …]")
    if len(workdirs) == 1 and (Path(workdirs[0]) / "report.json").exists() and not flags.FLAGS.prompt:
        print(render(workdirs[0], flags.FLAGS.output))
    else:
        print(render_runs(workdirs, flags.FLAGS.output, flags.FLAGS.prompt))


if __name__ == "__main__":
    flags.DEFINE_list("workdir", None, "The directories, with commas between them, instead of as words.")
    flags.DEFINE_string("output", None, "The page; by default report.html in the first workdir.")
    flags.DEFINE_string("prompt", "", "A text that each run's model continues; the page shows how it denoises.")
    cli.run(main, words=True)
