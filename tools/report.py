"""Makes DIR/report.html, one page without external parts, from DIR/report.json and the metrics.

python tools/report.py --workdir=DIR

The page reads without JavaScript; only the replay of the denoising needs it. A part of the report
that the run did not measure is left out of the page. Its markup is in report.html.j2.
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
from llada_jax.storage.buckets import is_bucket

MASK = "▒"
SMOOTH, RAW = "1_loss/smooth_elbo_nats_per_token", "1_loss/loss"
SPEED, RATIO = "4_speed/tokens_per_second", "2_ce_by_mask_ratio/"
NAMES = {"llada": "LLaDA", "arm": "Autoregressive control"}
BASE = 160  # of the bars by mask ratio: the height at which they stand


def render(workdir: str | Path) -> Path:
    """Writes workdir/report.html, whole or not at all; returns its path.

    Raises InputError if report.json, or the metrics.jsonl of a run it names, is missing or broken.
    """
    if is_bucket(workdir):
        raise InputError(f"{workdir}: the report is made on the machine of the quickstart; give its directory there")
    workdir = Path(workdir)
    report = _read_report(workdir / "report.json")
    runs = {name: _read_metrics(workdir / run / "metrics.jsonl") for name, run in report.get("runs", {}).items()}
    page = _template().render(
        report=report,
        facts=_facts(report),
        trajectories=[_trajectory(trajectory) for trajectory in report.get("trajectories") or ()],
        losses=[_loss(name, run) for name, run in runs.items() if run.get(SMOOTH)],
        bars=_ratios(runs.get("llada", {})),
        base=BASE,
        css=_beside("report.css"),
        js=_beside("report.js"),
    )
    output = workdir / "report.html"
    temporary = workdir / "report.html.tmp"
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
        "number": format, "percent": _percent, "duration": _duration,
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


def _read_metrics(path: Path) -> dict[str, list[tuple[int, float]]]:
    """The points (step, value) of each scalar, by step; of a repeated step the last one counts."""
    points: dict[str, dict[int, float]] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise InputError(f"no {path}, which report.json names among its runs") from None
    for number, line in enumerate(lines, 1):
        try:
            scalars = json.loads(line)
            step = scalars.pop("step")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path}, line {number} is not a line of metrics: {error}") from None
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
    """The piece as the page writes it: special tokens and line ends as one quiet sign."""
    if re.fullmatch(r"<[|/a-zA-Z][^<>\s]*>", piece):  # <|endoftext|>, </s>; not a byte, <0xE5>
        return "∙"
    return piece.replace("\n", "↵")


def _loss(name: str, run: dict) -> dict:
    """One run's panel: the smooth curve and the raw one as points of an SVG, and the ticks of its axes."""
    smooth, raw, speeds = _thin(run[SMOOTH]), _thin(run.get(RAW, [])), [value for _, value in run.get(SPEED, [])]
    width, height = 360, 178  # of the frame, inside 400 × 210
    most, last = 1.1 * max(value for _, value in smooth) or 1.0, max(smooth[-1][0], 1)
    x = lambda step: width * step / last  # noqa: E731
    y = lambda value: height * (1 - value / most)  # noqa: E731
    line = lambda points: " ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in points)  # noqa: E731
    return {
        "name": name, "speed": statistics.median(speeds) if speeds else None,
        "width": width, "height": height, "smooth": line(smooth), "raw": line(raw),
        "levels": [(y(value), value) for value in _ticks(most, 4)],
        "steps": [(x(step), step) for step in _ticks(last, 4)],
        "end": smooth[-1][1], "end_y": y(smooth[-1][1]),
    }  # fmt: skip


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


def main(_argv: list[str]) -> None:
    print(render(flags.FLAGS.workdir))


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Directory that holds report.json.", required=True)
    cli.run(main)
