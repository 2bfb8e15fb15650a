"""Chat: a dialogue that grows, changes and is kept; on a terminal it denoises in place, in a pipe it is plain text."""

import contextlib
import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from llada_jax import chat as program
from llada_jax.fields import InputError
from llada_jax.interop import hf
from llada_jax.sampling import prompts
from llada_jax.sampling.generate import generate
from llada_jax.serving import engine as engines
from llada_jax.serving.dialogue import Dialogue
from llada_jax.serving.pieces import Piece, pieces
from llada_jax.serving.terminal import layout
from llada_jax.streams import stream

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def talk(engine):
    return Dialogue(engine, engine.settings)


def send(chat, text):
    *_, last = chat.answer(text)
    return last


def test_an_answer_is_what_generate_gives_for_the_dialogue(talk, model, tokenizer):
    for turn, text in enumerate(("the fox", "明月")):
        messages = [*talk.messages, {"role": "user", "content": text}]
        key = jax.random.fold_in(stream(0, "sample"), 2 * turn + 1)
        prompt = tokenizer.encode_chat(messages)
        wanted = np.asarray(generate(model, [prompt], **talk.settings, key=key))[0, len(prompt) :]
        np.testing.assert_array_equal(send(talk, text).tokens, wanted)
        answer = {"role": "assistant", "content": prompts.reply_text(tokenizer, wanted)}
        assert talk.messages == [*messages, answer]


def test_no_turn_of_a_bucket_compiles_again(talk, caplog):
    """Canvases of at most 32 columns, then of 64; whatever the temperature."""
    talk.set("block_length", "2")  # as in no other test
    for text, temperature, is_new in (("f", 0.5, True), ("fox", 0.9, False), ("x" * 30, 0.9, True), ("y", 1.1, False)):
        talk.set("temperature", str(temperature))
        caplog.clear()
        jax.config.update("jax_log_compiles", True)  # in every thread
        send(talk, text)
        jax.config.update("jax_log_compiles", False)
        talk.undo()
        compiled = [record.getMessage() for record in caplog.records if "Compiling" in record.getMessage()]
        assert any("run_on" in line for line in compiled) == is_new
        assert is_new or not compiled


def test_what_is_stopped_leaves_no_trace(talk, monkeypatch, capsys):
    def interrupted(answer, patience):
        for i, progress in enumerate(whole(answer, patience)):
            if i == 2:
                raise KeyboardInterrupt
            yield progress

    whole = engines.Answer.updates
    monkeypatch.setattr(engines.Answer, "updates", interrupted)
    program._show(talk, "the fox")
    assert "stopped" in capsys.readouterr().out and talk.messages == []
    monkeypatch.undo()
    program._show(talk, "the fox")
    assert re.search(r"8 tokens, 8 passes, 1.0 tokens a pass", capsys.readouterr().out) and len(talk.messages) == 2


def test_undo_save_and_load_keep_the_dialogue(talk, tmp_path):
    send(talk, "the fox")
    first = list(talk.messages)
    send(talk, "quick")
    talk.undo()
    assert talk.messages == first
    talk.save(tmp_path / "a b.json")
    assert len((tmp_path / "a b.json").read_text().splitlines()) == 1
    kept = dict(talk.settings)
    program.command_line(talk, "/new")
    assert talk.messages == []
    talk.set("temperature", "none")
    program.command_line(talk, f"/load {tmp_path / 'a b.json'}")
    assert (talk.messages, talk.settings) == (first, kept)
    with pytest.raises(InputError, match="there is nothing to undo"):
        [talk.undo() for _ in range(2)]
    with pytest.raises(InputError, match="nothing to save"):
        talk.save(tmp_path / "b.json")


@pytest.mark.parametrize(
    "content, message",
    [
        ({"messages": []}, "needs \"messages\""),
        ({"messages": [{"role": "user", "content": "x"}]}, "no message has role 'assistant'"),
        ({"messages": 2}, "needs \"messages\""),
        ({"settings": {"gen_length": 7}}, "does not divide|needs"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_dialogue_changes_nothing(talk, tmp_path, content, message):
    send(talk, "fox")
    before = (talk.messages, talk.settings)
    (tmp_path / "x.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        talk.load(tmp_path / "x.json")
    assert (talk.messages, talk.settings) == before


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("temperatur", "1", "temperatur: no such setting"),
        ("temperature", "-1", "temperature is -1; it must be a number from 0"),
        ("cache", "all", "cache is 'all'; it must be one of none"),
        ("gen_length", "0", "gen_length is 0"),
        ("gen_length", "many", "gen_length is 'many'"),
        ("block_length", "3", "block_length 3 does not divide gen_length 8"),
        ("eos_id", "3", "eos_id: no such setting"),
    ],
)
def test_a_setting_that_no_sampler_can_use_is_refused(talk, name, value, message):
    before = dict(talk.settings)
    with pytest.raises(InputError, match=message):
        program.command_line(talk, f"/settings {name} {value}")
    assert talk.settings == before


def test_settings_take_numbers_words_and_truth_values(talk):
    for name, text, value in (
        ("threshold", "0.9", 0.9), ("cache", "prefix", "prefix"), ("stop_at_eos", "true", True),
        ("gen_length", "16", 16),
    ):  # fmt: skip
        program.command_line(talk, f"/settings {name} {text}")
        assert talk.settings[name] == value
    program.command_line(talk, "/settings threshold none")
    assert "threshold" not in talk.settings
    shown = program.command_line(talk, "/settings")
    assert re.search(r"^cache +prefix +what keys", shown, re.M) and re.search(r"^gen_length +16 ", shown, re.M)


@pytest.mark.parametrize("line", ["/what", "/undo 3", "/save", "/settings temperature", "/"])
def test_an_unknown_command_is_named(talk, line):
    with pytest.raises(InputError, match="no such command; /help lists them"):
        program.command_line(talk, line)


def test_a_dialogue_that_no_longer_fits_is_refused(talk):
    with pytest.raises(InputError, match="exceed the model's context of 1024 tokens"):
        send(talk, "x" * 1020)
    assert talk.messages == []


def test_pieces_join_the_bytes_of_a_character_and_stop_at_the_end(tokenizer):
    emoji = tokenizer.encode("é")
    tokens = [*tokenizer.encode("fox"), *emoji, tokenizer.mask_id, tokenizer.eot_id, *tokenizer.encode("x")]
    probability = np.linspace(0.9, 0.1, len(tokens))
    shown = pieces(tokenizer, np.asarray(tokens), probability, np.arange(len(tokens)))
    assert [piece.text for piece in shown] == ["f", "o", "x", "é", "▒"]
    assert shown[3] == Piece("é", probability[2 + len(emoji)], 2 + len(emoji)) and shown[4] == Piece("▒", None)


def test_lines_are_as_wide_as_the_terminal_and_their_colour_is_the_probability():
    parts = [("abc", 0.95), ("床前", 0.1), ("▒", None), ("x\ny", 0.7), ("\33[2J", 0.99)]
    shown = [Piece(*part) for part in parts]
    assert layout(shown, 4, 9, colour=False) == ["abc", "床前", "▒x", "y[2J"]
    assert layout(shown, 4, 2, colour=False) == ["▒x", "y[2J"]
    first, second, *_ = layout(shown, 4, 9)
    assert first == "abc" and second == "\33[31m床前\33[0m"


def test_models_of_dialogues_are_recognised(checkpoint, model, tmp_path):
    assert hf.is_instruct(checkpoint)
    hf.save_workdir(model, tmp_path / "text")
    config = json.loads((tmp_path / "text" / "config.json").read_text())
    (tmp_path / "text" / "config.json").write_text(json.dumps(config | {"data": {"kind": "text"}}))
    assert not hf.is_instruct(tmp_path / "text")
    for name, wanted in (("LLaDA-8B-Instruct", True), ("LLaDA-1.5", True), ("LLaDA-8B-Base", False)):
        hf.save_hf(model, tmp_path / name)
        assert hf.is_instruct(tmp_path / name) == wanted


def environment():
    flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"  # compiled quickly
    return dict(os.environ, PYTHONPATH=str(ROOT), XLA_FLAGS=flags, TERM="xterm", COLUMNS="60", LINES="20")


def test_in_a_pipe_every_line_is_a_message_and_the_answers_are_plain(checkpoint):
    command = [sys.executable, "-m", "llada_jax.chat", f"--checkpoint={checkpoint}", "--gen_length=8"]
    done = subprocess.run(
        command, input="the fox\n\nquick\n", capture_output=True, text=True, env=environment(), timeout=200
    )
    assert done.returncode == 0 and not done.stderr
    assert "\33" not in done.stdout and ">" not in done.stdout


class Terminal:
    """A program in a pseudo-terminal of its own."""

    _START = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"

    def __init__(self, command):
        self._file, inner = pty.openpty()
        start = [sys.executable, "-c", self._START, *command]
        ends = dict(stdin=inner, stdout=inner, stderr=inner)
        self.process = subprocess.Popen(start, env=environment(), start_new_session=True, **ends)
        os.close(inner)
        self.seen = ""

    def expect(self, text, seconds=120):
        """Everything up to `text`; what comes after it waits for the next call."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < end, self.seen
            if select.select([self._file], [], [], 0.1)[0]:
                self.seen += os.read(self._file, 65536).decode(errors="replace")
        before, _, self.seen = self.seen.partition(text)
        return before

    def type(self, text):
        os.write(self._file, text.encode())

    def press(self, key, text):
        """Presses `key`, again every two seconds, until `text` is seen or, if it is None, the program has ended.

        A key counts only from the moment when readline waits for one, which comes a little after its prompt.
        """
        for _ in range(60):
            self.type(key)
            with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
                return self.process.wait(2) if text is None else self.expect(text, seconds=2)
        raise AssertionError(f"no {text!r} after {key!r}: {self.seen!r}")

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self._file)


@pytest.mark.slow
def test_on_a_terminal_it_denoises_in_place_and_ctrl_c_stops_only_the_answer(checkpoint, tmp_path):
    command = [sys.executable, "-m", "llada_jax.chat", f"--checkpoint={checkpoint}", "--gen_length=16"]
    terminal = Terminal(command)
    try:
        terminal.expect("> ")
        terminal.type("the fox\n")
        drawn = terminal.expect("tokens/s")
        assert "▒" in drawn and "\33[1A" in drawn and "\33[J" in drawn  # masks, and up to draw again
        assert "16 tokens, 16 passes" in drawn
        terminal.type("/settings gen_length 512\n")
        terminal.expect("gen_length is 512")
        terminal.type("go on\n")
        terminal.expect("▒▒▒")
        terminal.type("\x03")
        terminal.expect("stopped; the message is forgotten")
        terminal.expect("> ")
        terminal.press("\x03", "Ctrl-D ends")
        terminal.type(f"/save {tmp_path / 'kept.json'}\n")
        terminal.expect("saved in")
        terminal.type("/settings cache all\n")
        terminal.expect("error: cache is 'all'")
        terminal.expect("> ")
        assert terminal.press("\x04", None) == 0
    finally:
        terminal.close()
    assert [m["content"] for m in json.loads((tmp_path / "kept.json").read_text())["messages"]][0] == "the fox"
