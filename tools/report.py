"""Makes DIR/report.html, one page without external parts, from DIR/report.json and the metrics.

python tools/report.py --workdir=DIR

The page reads without JavaScript; only the replay of the denoising needs it. A part of the report
that the run did not measure is left out of the page.
"""

import html
import json
import math
import re
import statistics
from pathlib import Path
from string import Template

from absl import flags

from llada_jax import cli
from llada_jax.fields import InputError

MASK = "▒"
SMOOTH, RAW = "1_loss/smooth_elbo_nats_per_token", "1_loss/loss"
SPEED, RATIO = "4_speed/tokens_per_second", "2_ce_by_mask_ratio/"
NAMES = {"llada": "LLaDA", "arm": "Autoregressive control"}


def render(workdir: str | Path) -> Path:
    """Writes workdir/report.html, whole or not at all; returns its path.

    Raises InputError if report.json, or the metrics.jsonl of a run it names, is missing or broken.
    """
    workdir = Path(workdir)
    report = _read_report(workdir / "report.json")
    runs = {name: _read_metrics(workdir / run / "metrics.jsonl") for name, run in report.get("runs", {}).items()}
    sections = [
        _reversal(report), _trajectories(report), _examples(report), _questions(report),
        _losses(runs), _ratios(runs), _times(report),
    ]  # fmt: skip
    page = Template(_PAGE).substitute(
        css=_beside("report.css"), head=_head(report), body="".join(sections), script=_script(report)
    )
    output = workdir / "report.html"
    temporary = workdir / "report.html.tmp"
    temporary.write_bytes(page.encode())
    temporary.replace(output)
    return output


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


def _head(report: dict) -> str:
    facts = [f"config {report['config']}"] if "config" in report else []
    facts += [f"seed {report['seed']}"] if "seed" in report else []
    facts += [f"{report['couplets']:,} couplets"] if "couplets" in report else []
    facts += [f"{_duration(report['seconds'])} in all"] if "seconds" in report else []
    models = "".join(
        f"<li class={_kind(name)}><b>{_name(name)}</b> {m['parameters']:,} parameters, "
        f"{m['layers']} layers, width {m['d_model']:,}</li>"
        for name, m in report.get("models", {}).items()
    )
    return f"""<header><p class=facts>{_text(" · ".join(facts))}</p>
<h1>Forwards and backwards</h1>{_claim(report)}<ul class=models>{models}</ul></header>"""


def _claim(report: dict) -> str:
    """What was measured, in one sentence (and what tempers it in a second)."""
    reversal = report.get("reversal", {})
    if "llada" not in reversal:
        return ""
    ours = reversal["llada"]
    claim = (
        "Given one line of a couplet, LLaDA, a masked-diffusion language model, writes the next "
        f"line in <b>{_percent(ours['forward'])}</b> and the previous line in "
        f"<b>{_percent(ours['backward'])}</b> of {reversal['count']:,} cases"
    )
    if "arm" in reversal:
        arm = reversal["arm"]
        claim += (
            f"; its autoregressive control in <b>{_percent(arm['forward'])}</b> and <b>{_percent(arm['backward'])}</b>"
        )
    if "arm_ranking" in reversal:
        ranking = _percent(reversal["arm_ranking"]["backward"])
        claim += f". Asked to rank lines instead of writing one, the control finds {ranking} of the previous lines"
    return f"<p class=claim>{claim}.</p>"


def _reversal(report: dict) -> str:
    reversal = report.get("reversal")
    if not reversal:
        return ""
    rows = []
    for name in ("llada", "arm", "arm_ranking"):
        if name in reversal:
            label = "The control, <em>ranking</em> lines, not writing one"
            shares = [reversal[name]["forward"], reversal[name]["backward"]]
            rows.append((label if name == "arm_ranking" else _name(name), name, shares))
    ways = {"Forward": "the next line", "Backward": "the previous line"}
    return _section(
        "Both lines of a couplet",
        _table([f"{way}<small>{meaning}</small>" for way, meaning in ways.items()], rows),
        f"Share of {reversal['count']:,} couplets completed correctly, after Table 4 of "
        "<a href='https://arxiv.org/abs/2502.09992'>arXiv 2502.09992</a>. One run with one seed: "
        "differences of a few points mean nothing.",
        kind="tab",
        after=_protocols(report),
    )


def _protocols(report: dict) -> str:
    """How each number was asked for, in small print."""
    titles = {
        "llada": NAMES["llada"],
        "arm_forward": "Control, forward",
        "arm_backward": "Control, backward",
        "arm_ranking": "Control, ranking",
    }
    notes = "".join(
        f"<div><dt>{_text(titles.get(key, key))}</dt><dd>{_text(text)}</dd></div>"
        for key, text in report.get("protocols", {}).items()
    )
    return f"<dl class=protocols>{notes}</dl>" if notes else ""


def _questions(report: dict) -> str:
    questions = report.get("questions")
    if not questions:
        return ""
    groups = [(group, question) for group in ("seen", "unseen") for question in ("forward", "backward")]
    counts = {group: next(iter(questions.values()))[group]["count"] for group in ("seen", "unseen")}
    titles = {"seen": "Asked in training", "unseen": "Never asked"}
    columns = [f"{titles[g]}<small>{counts[g]:,} couplets, {way}</small>" for g, way in groups]
    rows = [(_name(name), name, [scores[group][way] for group, way in groups]) for name, scores in questions.items()]
    return _section(
        "Questions, after fine-tuning",
        _table(columns, rows),
        "Share of questions answered with the right line. The couplets of the last two columns "
        "were in no question of the fine-tuning; low numbers there are shown as they are.",
        kind="tab",
    )


def _table(columns: list[str], rows: list[tuple[str, str, list]]) -> str:
    """Rows of (label, key, shares); under each share a bar of that length."""
    body = ""
    for label, key, shares in rows:
        cells = "".join(f"<td>{_percent(share)}{_bar(share or 0)}</td>" for share in shares)
        ranking = " ranking" if key == "arm_ranking" else ""
        body += f"<tr class='{_kind(key)}{ranking}'><th scope=row>{label}</th>{cells}</tr>"
    heads = "".join(f"<th scope=col>{column}</th>" for column in columns)
    return f"<table class=n{len(columns)}><thead><tr><td></td>{heads}</tr></thead><tbody>{body}</tbody></table>"


def _bar(share: float) -> str:
    return f"<span class=bar><i style='width:{100 * share:.1f}%'></i></span>"


def _trajectories(report: dict) -> str:
    trajectories = report.get("trajectories")
    if not trajectories:
        return ""
    return _section(
        "From masks to a line",
        f"<div class=grid>{''.join(map(_trajectory, trajectories))}</div>",
        "The reply starts as masks and each step fills some of them in. A small number is the step "
        "that wrote the token; the tint is the model's confidence in it, <span class=scale>low"
        "<i></i>high</span>; “∙” is end-of-text or another special token.",
    )


def _trajectory(trajectory: dict) -> str:
    """The last frame; the controls appear, and the frames play, where there is JavaScript."""
    frames, tokens = trajectory["frames"], ""
    for i, piece in enumerate(frames[-1]):
        written = max(
            (k for k in range(1, len(frames)) if frames[k - 1][i] == MASK != frames[k][i]),
            default=0,
        )
        confidence = trajectory["confidence"][i] or 0
        kind = "t mask" if piece == MASK else "t end" if _shown(piece) == "∙" else "t"
        tokens += (
            f"<span class='{kind}' style='--c:{confidence:.3f}' title='step {written}, "
            f"confidence {confidence:.2f}'><b>{_text(_shown(piece))}</b><i>{written}</i></span>"
        )
    last = len(frames) - 1
    prompt = trajectory.get("prompt")
    return f"""<div class=play><h3 lang=zh-Hans>{_text(trajectory["title"])}</h3>
{f"<p class=prompt lang=zh-Hans>{_text(prompt)}</p>" if prompt else ""}
<p class=tokens lang=zh-Hans>{tokens}</p>
<div class=controls hidden><button type=button>Play</button><input type=range min=0 max={last}
 value={last} aria-label=Step><output>step {last} of {last}</output></div></div>"""


def _shown(piece: str) -> str:
    """The piece as the page writes it: special tokens and line ends as one quiet sign."""
    if re.fullmatch(r"<[|/a-zA-Z][^<>\s]*>", piece):  # <|endoftext|>, </s>; not a byte, <0xE5>
        return "∙"
    return piece.replace("\n", "↵")


def _script(report: dict) -> str:
    """The frames, as JSON that no text can break out of, and the player of them."""
    trajectories = report.get("trajectories")
    if not trajectories:
        return ""
    frames = [[[_shown(piece) for piece in frame] for frame in t["frames"]] for t in trajectories]
    data = json.dumps(frames, ensure_ascii=False, separators=(",", ":"))
    data = data.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
    return f"<script type=application/json id=frames>{data}</script><script>{_beside('report.js')}</script>"


def _examples(report: dict) -> str:
    examples = report.get("examples")
    if not examples:
        return ""
    return _section(
        "In their own words",
        "".join(map(_example, examples)),
        "Answers as they were written. ✓: the expected line stands in the answer; ✗: it doesn't.",
    )


def _example(example: dict) -> str:
    verse = lambda text: f"<dd class=verse lang=zh-Hans>{_text(text)}</dd>"  # noqa: E731
    cells = f"<div><dt>Given</dt>{verse(example['given'])}</div>"
    cells += f"<div><dt>Expected</dt>{verse(example['expected'])}</div>"
    for name in NAMES:
        if name in example:
            right = example["expected"] in example[name]
            mark = "<span class=yes>✓ right</span>" if right else "<span class=no>✗ wrong</span>"
            short = "Control" if name == "arm" else NAMES[name]
            cells += f"<div class={name}><dt>{short} {mark}</dt>{verse(example[name])}</div>"
    way = f"<small>{_text(example['direction'])}</small>" if "direction" in example else ""
    return f"<div class=example><h3>{_text(example['title'])}{way}</h3><dl>{cells}</dl></div>"


def _losses(runs: dict[str, dict]) -> str:
    charts = "".join(_loss(name, run) for name, run in runs.items() if run.get(SMOOTH))
    if not charts:
        return ""
    return _section(
        "Loss curves",
        f"<div class=grid>{charts}</div>",
        "Bold: smooth; thin: the raw loss of single steps, cut at the frame. LLaDA's loss weights "
        "a row with mask ratio t by 1/t, so rows with few masks speak loudly and the raw curve is "
        "noisy; the smooth ELBO is the same quantity averaged by mask ratio over recent steps. "
        "Don't compare the two models by height: LLaDA's is an upper bound of the negative "
        "log-likelihood, the control's is the negative log-likelihood itself. Hence side by side, "
        "each on its own scale.",
    )


def _loss(name: str, run: dict) -> str:
    """One run's panel: what is drawn in words, then the curves."""
    quantity = "exact loss" if _kind(name) == "arm" else "upper bound (ELBO)"
    stage = "fine-tuning" if name.endswith("_sft") else "pre-training"
    speeds = [value for _, value in run.get(SPEED, [])]
    aside = f", {statistics.median(speeds):,.0f} tokens/s" if speeds else ""
    return (
        f"<div class={_kind(name)}><h3>{_name(name)}, {stage}<small>{quantity}, nats per token, "
        f"by step{aside}</small></h3>{_curves(_thin(run[SMOOTH]), _thin(run.get(RAW, [])))}</div>"
    )


def _curves(smooth: list, raw: list) -> str:
    """SVG of the smooth curve before the raw one; what of the raw one is above the frame is cut."""
    left, top, width, height = 34, 8, 360, 178  # of the frame, inside 400 × 210
    most, last = 1.1 * max(value for _, value in smooth) or 1.0, max(smooth[-1][0], 1)
    x = lambda step: width * step / last  # noqa: E731
    y = lambda value: height * (1 - value / most)  # noqa: E731
    line = lambda points: " ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in points)  # noqa: E731
    axes = "".join(
        f"<line x2={width} y1={y(v):.1f} y2={y(v):.1f} /><text x=-6 y={y(v) + 4:.1f} text-anchor=end>{v:g}</text>"
        for v in _ticks(most, 4)
    )
    for step in _ticks(last, 4):
        anchor = "end" if step > 0.95 * last else "middle"
        axes += f"<text x={x(step):.1f} y={height + 17} text-anchor={anchor}>{step:,.0f}</text>"
    end = smooth[-1][1]
    return f"""<svg viewBox="0 0 400 210" role=img aria-label="Loss curve, at the end {end:.3f}">
<g transform="translate({left} {top})"><g class=axes>{axes}</g>
<svg width={width} height={height}><polyline class=raw points="{line(raw)}" />
<polyline class=smooth points="{line(smooth)}" /></svg><circle cx={width} cy={y(end):.1f} r=3 />
<text class=value x={width} y={y(end) - 9:.1f} text-anchor=end>{end:.3f}</text></g></svg>"""


def _ratios(runs: dict[str, dict]) -> str:
    """Cross-entropy by mask ratio: the last values of LLaDA's pre-training."""
    run = runs.get("llada", {})
    last = {name.removeprefix(RATIO): v[-1][1] for name, v in run.items() if name.startswith(RATIO)}
    if not last:
        return ""
    last = dict(sorted(last.items(), key=lambda item: float(item[0].split("-")[0])))
    base, slot, most, bars = 160, 640 / len(last), max(last.values()) or 1.0, ""
    for i, (ratio, nats) in enumerate(last.items()):
        height, middle = (base - 24) * nats / most, (i + 0.5) * slot
        low, high = (f"{float(edge) * 100:.0f}" for edge in ratio.split("-"))
        bars += (
            f"<rect x={i * slot + 7:.1f} y={base - height:.1f} width={slot - 14:.1f} "
            f"height={height:.1f} rx=2 /><text class=value x={middle:.1f} "
            f"y={base - height - 6:.1f}>{nats:.2f}</text>"
            f"<text x={middle:.1f} y={base + 18}>{low}–{high}</text>"
        )
    return _section(
        "Loss by mask ratio",
        f"""<div class='llada wide'><svg viewBox="0 0 640 {base + 26}" text-anchor=middle role=img
 aria-label="Cross-entropy by mask ratio">{bars}<line class=base x2=640 y1={base} y2={base} />
</svg></div>""",
        "LLaDA at the end of pre-training: cross-entropy in nats per masked token, by the "
        "percentage of tokens that were masked. The mean of the bars is the smooth ELBO.",
    )


def _times(report: dict) -> str:
    stages = report.get("stages")
    if not stages:
        return ""
    longest = max(stage["seconds"] for stage in stages) or 1
    rows = "".join(
        f"<tr><th scope=row>{_text(s['name'])}</th><td>{_duration(s['seconds'])}</td>"
        f"<td class=long>{_bar(s['seconds'] / longest)}</td></tr>"
        for s in stages
    )
    total = f"All in all {_duration(report['seconds'])}." if "seconds" in report else ""
    return _section("Where the time went", f"<table class=times>{rows}</table>", total, kind="tab")


def _section(title: str, figure: str, caption: str, kind: str = "fig", after: str = "") -> str:
    """A figure and its caption; `kind` tab or fig numbers it as a table or a figure."""
    caption = f"<figcaption class={kind}>{caption}</figcaption>"
    return f"<section><h2>{title}</h2><figure>{figure}{caption}</figure>{after}</section>"


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


def _name(name: str) -> str:
    return NAMES[_kind(name)]


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


def _text(value: object) -> str:
    return html.escape(str(value))


_PAGE = """<!doctype html>
<html lang=en><head><meta charset=utf-8>
<meta name=viewport content="width=device-width,initial-scale=1">
<meta http-equiv=Content-Security-Policy
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline';
 img-src data:">
<meta name=color-scheme content="light dark"><link rel=icon href="data:,">
<title>llada_jax: forwards and backwards</title><style>$css</style></head>
<body><main>$head$body<footer>Made by llada_jax from report.json and the runs' metrics.jsonl; this
page loads nothing from elsewhere.</footer></main>$script</body></html>
"""


def main(_argv: list[str]) -> None:
    print(render(flags.FLAGS.workdir))


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Directory that holds report.json.", required=True)
    cli.run(main)
