"""The report shows what was measured, only that, and needs nothing but its own file."""

import copy
import dataclasses
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import jax
import pytest
from tiny import TINY

from llada_jax.data.train_tokenizer import train_tokenizer
from llada_jax.fields import InputError
from llada_jax.interop import hf
from llada_jax.model.transformer import Transformer
from llada_jax.tools import report as page

ROOT = Path(__file__).parents[2]

HOSTILE = "</script><script>alert('x')</script> & <img src=https://example.com/x.png>"
REPORT = {
    "config": "quickstart", "seed": 3, "couplets": 117, "seconds": 4205.0,
    "stages": [{"name": "LLaDA pre-training", "seconds": 200.2}, {"name": "Data", "seconds": 7.25}],
    "models": {
        "llada": {"parameters": 1912345, "layers": 2, "d_model": 288},
        "arm": {"parameters": 1812345, "layers": 3, "d_model": 272},
    },
    "runs": {"llada": "llada/pretrain", "arm": "arm/pretrain"},
    "reversal": {
        "llada": {"forward": 0.971, "backward": 0.982},
        "arm": {"forward": 0.963, "backward": 0.014},
        "arm_ranking": {"forward": 0.995, "backward": 0.946}, "count": 119,
    },
    "protocols": {"llada": "Greedy & calm.", "arm_ranking": "Picks, <writes> nothing."},
    "questions": {
        "llada": {
            "seen": {"forward": 0.917, "backward": 0.928, "count": 96},
            "unseen": {"forward": 0.113, "backward": 0.054, "count": 31},
        },
        "arm": {
            "seen": {"forward": 0.935, "backward": 0.946, "count": 96},
            "unseen": {"forward": 0.157, "backward": 0.008, "count": 31},
        },
    },
    "examples": [
        {
            "title": "Next", "given": "床前明月光", "expected": "疑是地上霜",
            "llada": "疑是地上霜", "arm": HOSTILE,
        }
    ],
    "trajectories": [
        {
            "title": "下一句", "prompt": "", "confidence": [0.93, 0.52, 0.31],
            "commit_step": [1, 0, 1],
            "frames": [["▒", "▒", "▒"], ["▒", "霜", "▒"], [HOSTILE, "霜", "␃"]],
        }
    ],
}  # fmt: skip
SECTIONS = {
    "reversal": "Both lines of a couplet", "trajectories": "From masks to a line",
    "runs": "Loss curves", "examples": "In their own words",
    "questions": "Questions, after fine-tuning", "stages": "Where the time went",
}  # fmt: skip


def workdir(path, report=REPORT):
    (path / "report.json").write_text(json.dumps(report))
    for run, scale in (("llada", 1.0), ("arm", 0.5)):
        (path / run / "pretrain").mkdir(parents=True)
        lines = [{"step": 10, "0_validation/elbo_nats_per_token": 4.0}]
        for step in (10, 20, 30):
            line = {
                "step": step,
                page.SMOOTH: scale * 20.5 / step,
                page.RAW: None,
                page.SPEED: 5432.1,
            }
            if run == "llada":
                line |= {f"{page.RATIO}0.0-0.1": 0.17, f"{page.RATIO}0.1-0.2": 1.23}
            lines.append(line)
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (path / run / "pretrain" / "metrics.jsonl").write_text(text)
    return path


class Page(HTMLParser):
    """Tags with their attributes, and the text outside style and script."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self._open = [], "", []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._open.append(tag)

    def handle_endtag(self, tag):
        self._open.append("/" + tag)

    def handle_data(self, data):
        if self._open[-1:] not in (["style"], ["script"]):
            self.text += data


@pytest.fixture
def rendered(tmp_path):
    return page.render(workdir(tmp_path)).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "piece, shown",
    [("␃", "∙"), ("␄", "∙"), ("</s>", "∙"), ("<|eot_id|>", "∙"), ("⏎", "↵"), ("‹E5›", "‹E5›"), ("霜", "霜")],
)
def test_special_tokens_are_a_sign_that_every_font_has(piece, shown):
    assert page._shown(piece) == shown


def test_every_number_is_on_the_page(rendered):
    text = Page(rendered).text
    shares = "97.1 98.2 96.3 1.4 99.5 94.6 91.7 92.8 11.3 5.4 93.5 94.6 15.7 0.8".split()
    counts = ["seed 3", "117 couplets", "119 couplets", "119 cases", "96 couplets", "31 couplets"]
    models = [
        "1,912,345 parameters, 2 layers, width 288",
        "1,812,345 parameters, 3 layers, width 272",
    ]
    times = ["1 h 10 min", "3 min 20 s", "7.2 s"]
    losses = ["0.683", "0.342", "0.17", "1.23", "5,432 tokens/s"]
    for number in [*(f"{share}%" for share in shares), *counts, *models, *times, *losses]:
        assert number in text, number
    assert "--c:0.930" in rendered and "confidence 0.52" in rendered


def test_text_is_text(rendered):
    parsed = Page(rendered)
    assert "Picks, <writes> nothing." in parsed.text
    assert HOSTILE in parsed.text
    assert "img" not in [tag for tag, _ in parsed.tags]
    assert [tag for tag, _ in parsed.tags].count("script") == 2  # the frames, the player


def test_the_frames_survive_as_json(rendered):
    data = re.search(r"<script type=application/json id=frames>(.*?)</script>", rendered).group(1)
    assert json.loads(data) == [[["▒"] * 3, ["▒", "霜", "▒"], [HOSTILE, "霜", "∙"]]]


def test_nothing_is_loaded_from_elsewhere(rendered):
    for tag, attributes in Page(rendered).tags:
        assert not {"src", "srcset", "data", "poster", "action", "xlink:href"} & set(attributes)
        assert tag == "a" or attributes.get("href", "data:,").startswith("data:")
    style = re.search(r"<style>(.*?)</style>", rendered, re.DOTALL).group(1)
    assert "@import" not in style and "url(" not in style
    assert "default-src 'none'" in rendered


def test_the_last_frame_stands_without_javascript(rendered):
    tokens = [attrs["class"] for tag, attrs in Page(rendered).tags if "t" in attrs.get("class", "").split()]
    assert tokens == ["t", "t", "t end"]
    assert "<div class=controls hidden>" in rendered


@pytest.mark.parametrize("missing", SECTIONS)
def test_what_was_not_measured_is_left_out(tmp_path, missing):
    report = {key: value for key, value in REPORT.items() if key != missing}
    text = page.render(workdir(tmp_path, report)).read_text(encoding="utf-8")
    assert [key for key, title in SECTIONS.items() if f"<h2>{title}</h2>" not in text] == [missing]
    assert ("<script" in text) == (missing != "trajectories")


def test_without_the_control(tmp_path):
    report = copy.deepcopy(REPORT)
    for part in (report["models"], report["runs"], report["questions"], report["examples"][0]):
        part.pop("arm")
    report["reversal"] = {"llada": {"forward": 0.9, "backward": None}, "count": 4}
    text = page.render(workdir(tmp_path, report)).read_text(encoding="utf-8")
    assert "its autoregressive control" not in text and "class='arm" not in text
    assert "–" in Page(text).text


def test_a_bare_report_is_a_page(tmp_path):
    text = page.render(workdir(tmp_path, {})).read_text(encoding="utf-8")
    assert "<h1>" in text and "<section>" not in text


def test_a_repeated_step_counts_once(tmp_path):
    metrics = workdir(tmp_path) / "llada" / "pretrain" / "metrics.jsonl"
    with metrics.open("a") as file:  # resumed from step 20
        file.write(json.dumps({"step": 30, page.SMOOTH: 0.777}) + "\n")
    text = page.render(tmp_path).read_text(encoding="utf-8")
    assert "0.777" in text and "0.683" not in text


@pytest.mark.parametrize(
    ("file", "content", "match"),
    [
        ("report.json", None, "no .*report.json"),
        ("report.json", "{", "not JSON"),
        ("report.json", "[]", "list, not an object"),
        ("arm/pretrain/metrics.jsonl", None, "no .*metrics.jsonl"),
        ("arm/pretrain/metrics.jsonl", '{"step": 1}\n{"st', "line 2"),
        ("arm/pretrain/metrics.jsonl", "[1]\n", "line 1"),
    ],
)
def test_a_broken_input_is_named_and_the_old_page_stays(tmp_path, file, content, match):
    workdir(tmp_path)
    (tmp_path / "report.html").write_text("old")
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_text(content)
    with pytest.raises(InputError, match=match) as raised:
        page.render(tmp_path)
    assert "\n" not in str(raised.value)
    assert (tmp_path / "report.html").read_text() == "old"


def test_a_page_is_whole_or_absent(tmp_path, monkeypatch):
    def full(self, data):
        self.touch()
        raise OSError(28, "No space left on device")

    workdir(tmp_path)
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        page.render(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_ticks_are_round_and_few():
    for top in (0.013, 0.9, 7.4, 100, 31234):
        ticks = page._ticks(top, 4)
        assert ticks[0] == 0 and 2 <= len(ticks) <= 5 and ticks[-1] <= top


def test_command_line(tmp_path):
    command = [sys.executable, ROOT / "tools" / "report.py"]
    for words, message in (((), "error: say which runs"), ((tmp_path,), "error: no ")):
        done = subprocess.run([*command, *words], capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr.startswith(message) and done.stderr.count("\n") == 1
    workdir(tmp_path)
    for flag, made in ((), "report.html"), ((f"--output={tmp_path / 'page.html'}",), "page.html"):
        done = subprocess.run([*command, f"--workdir={tmp_path}", *flag], capture_output=True, text=True)
        assert (done.returncode, done.stdout.strip()) == (0, str(tmp_path / made))
        assert (tmp_path / made).exists()


@pytest.fixture
def two_runs(tmp_path):
    """The runs of a quickstart, with what any run writes besides."""
    workdir(tmp_path)
    for name, seconds in (("llada", 120.0), ("arm", 30.0)):
        run = tmp_path / name / "pretrain"
        (run / "goodput.json").write_text(json.dumps({"seconds": {"step": seconds, "compile": 10.0, "down": 0.0}}))
        event = {"time": 1.0, "step": 7, "event": "save failed", "cause": f"<{name}> full", "action": "the run goes on"}
        (run / "events.jsonl").write_text(json.dumps(event) + "\n")
    return [str(tmp_path / name / "pretrain") for name in ("llada", "arm")]


def test_runs_stand_side_by_side(two_runs, tmp_path):
    made = page.render_runs(two_runs, tmp_path / "both.html")
    text = made.read_text()
    assert made == tmp_path / "both.html" and text.count("</svg></div>") >= 1
    assert all(f"{run}</b>" in text for run in two_runs)  # whole paths: both end with "pretrain"
    for number in ("0.683", "0.342", "5,432", "2 min 00 s", "30.0 s", "Loss by mask ratio", "1.23", "4.000"):
        assert number in text, number
    assert "&lt;llada&gt; full: the run goes on" in text and "&lt;arm&gt; full" in text
    assert "Both lines of a couplet" not in text and "From masks to a line" not in text
    assert not re.search(r"(?:src|href)=.?(?:https?:)?//", text)


def test_one_run_has_a_page_in_its_workdir(two_runs):
    made = page.render_runs(two_runs[:1])
    assert made == Path(two_runs[0]) / "report.html" and "<h1>pretrain</h1>" in made.read_text()


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("metrics.jsonl", None, "names a quickstart or runs that have begun"),
        ("metrics.jsonl", "{", "line 1 is not a line of metrics"),
        ("events.jsonl", "[1]", "holds a line that is no event"),
    ],
)
def test_a_broken_run_is_named(two_runs, name, content, message):
    path = Path(two_runs[0]) / name
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(InputError, match=message):
        page.render_runs(two_runs)
    assert not (Path(two_runs[0]) / "report.html").exists()


def test_a_model_continues_the_prompt_on_the_page(tmp_path):
    tokenizer = train_tokenizer(["床前明月光\n"] * 9, tmp_path / "tokenizer.model", 300, "char")
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_id") for name in ("mask", "bos", "eos", "pad", "eot")}
    c = dataclasses.replace(TINY, vocab_size=tokenizer.vocab_size, embedding_size=320, **ids)
    hf.save_workdir(Transformer(c, jax.random.key(0)), tmp_path / "run")
    tokenizer.save(tmp_path / "run" / "tokenizer")
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "1_loss/loss": 2.5}\n')
    text = page.render_runs([str(tmp_path / "run")], prompt="床前").read_text()
    frames = json.loads(re.search(r"id=frames>(.*?)</script>", text)[1])
    assert set(frames[0][0]) == {"▒"} and "▒" not in frames[0][-1] and len(frames[0]) == 33
    with pytest.raises(InputError, match="--prompt has 71 tokens; they leave no room"):
        page.render_runs([str(tmp_path / "run")], prompt="光" * 70)
