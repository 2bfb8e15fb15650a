"""The web page, as a client of Gradio sees it; test_browser.py looks at it in a browser."""

import json
import re
import uuid
from pathlib import Path

import httpx
import pytest

from llada_jax.demo import _api_key, require_free
from llada_jax.fields import InputError

README = Path(__file__).parents[2] / "llada_jax" / "serving" / "README.md"
# length, block, rule, value, cache, temperature, guidance, ranking, stop at the end, ends last
SETTINGS = [8, 4, "one token a pass", None, "none", 0.5, 0, "low_confidence", False, False]


def changed(i, value):
    return [*SETTINGS[:i], value, *SETTINGS[i + 1 :]]


class Client:
    """A session of the page, by Gradio's protocol."""

    def __init__(self, url):
        self.http = httpx.Client(base_url=f"{url}gradio_api/", timeout=60)
        self._session = uuid.uuid4().hex

    def start(self, name, *data):
        """The event that `outputs` waits for."""
        answer = self.http.post(f"call/{name}", json={"data": data, "session_hash": self._session})
        return name, answer.raise_for_status().json()["event_id"]

    def outputs(self, event):
        """What it yields, as it comes."""
        name, id = event
        with self.http.stream("GET", f"call/{name}/{id}") as lines:
            kind = ""
            for line in lines.iter_lines():
                if line.startswith("event: "):
                    kind = line[7:]
                elif line.startswith("data: ") and kind != "heartbeat":
                    assert kind != "error", line
                    yield json.loads(line[6:])

    def predict(self, name, *data):
        """The last output."""
        *_, last = self.outputs(self.start(name, *data))
        return last

    def now(self, name):
        """Calls what does not wait in Gradio's queue."""
        self.http.post(f"run/{name}", json={"data": [], "session_hash": self._session}).raise_for_status()


@pytest.fixture
def client(url):
    client = Client(url)
    with client.http:
        yield client


other = client  # another user


def text_of(markup):
    return re.sub(r"<[^>]*>", "", markup)


def test_an_answer_comes_token_by_token_and_can_be_replayed(client):
    frames = [log for _, log, _ in client.outputs(client.start("chat", "the <b>fox</b>", *SETTINGS))]
    masks = [frame.count("class='t m'") for frame in frames if "class='t" in frame]
    assert masks == sorted(masks, reverse=True) and masks[-1] == 0
    last = frames[-1]
    assert "the &lt;b&gt;fox&lt;/b&gt;" in last
    passes = {int(step) for step in re.findall(r"data-s=(\d+)", last)}
    assert passes <= set(range(8)) and "max=8" in last and re.search(r"class='t p[0-3]'", last)
    assert "8 tokens, 8 passes, 1.0 tokens a pass" in last and "tokens/s" in last


def test_a_dialogue_grows_is_cut_and_begins_anew(client):
    for n in (1, 2):
        _, log, _ = client.predict("chat", "fox", *SETTINGS)
        assert log.count("class=user") == n
    assert client.predict("undo")[1].count("class=user") == 1
    assert client.predict("new")[1].count("class=user") == 0


def test_masks_in_a_text_are_filled(client):
    (filled,) = client.predict("fill", "the [MASK*3]x", *SETTINGS)
    assert text_of(filled).startswith("the ") and filled.count("class='t m'") == 0
    assert len(re.findall(r"data-s=-1", filled)) == 4 and "3 tokens" in filled


@pytest.mark.parametrize(
    "text, settings, message",
    [
        ("x" * 1020, SETTINGS, "exceed the model&#x27;s context of 1024 tokens"),
        ("x", changed(0, None), "gen_length is None"),
        ("x", changed(1, 3), "block_length 3 does not divide gen_length 8"),
        ("x", changed(2, "probability threshold"), "the rule &#x27;probability threshold&#x27; needs a value"),
        ("x", [*SETTINGS[:2], "probability threshold", 7, *SETTINGS[4:]], "threshold is 7"),
    ],
)
def test_what_cannot_be_answered_is_said_in_the_page(client, text, settings, message):
    box, log, _ = client.predict("chat", text, *settings)
    assert message in log and "role=alert" in log
    assert box == text  # to be corrected


def test_a_text_without_masks_is_told_how_to_write_one(client):
    assert "write [MASK] where" in client.predict("fill", "no masks", *SETTINGS)[0]


def test_stopping_ends_the_answer_of_this_user_alone(client, other):
    long = client.outputs(client.start("chat", "fox", 128, 128, *SETTINGS[2:-1], True))
    while "class='t m'" not in next(long)[1]:
        pass
    waits = other.start("chat", "fox", *SETTINGS)
    client.now("stop")
    *_, (box, log, _) = long
    assert "stopped; the dialogue goes on without" in log and box == "fox" and "class='t m'" in log
    *_, (_, log, _) = other.outputs(waits)
    assert "8 tokens, 8 passes" in log


def test_the_page_names_no_other_host_that_it_would_load_from(url):
    page = httpx.get(url).text
    loads = re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=[\"']([^\"']+)", page)
    assert loads and not [link for link in loads if link.startswith(("http:", "https:", "//"))]
    theme = httpx.get(f"{url}theme.css").text
    assert not re.findall(r"url\([\"']?(?:https?:)?//[^)]*|@import[^;]*//[^;]*", theme)


def test_page_and_api_have_one_port(url):
    assert httpx.get(f"{url}v1/models").json()["data"][0]["id"] == "chat"


def test_the_readme_s_client_gets_its_answer(url, capsys):
    (block,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names = {}
    exec(block.replace("http://127.0.0.1:8000/", url).replace("max_tokens=128", "max_tokens=32"), names)
    names["client"].close()
    assert names["part"].choices[0].finish_reason in ("stop", "length")


def test_a_port_that_is_taken_is_named(checkpoint, url):
    port = url.rstrip("/").rpartition(":")[2]
    with pytest.raises(InputError, match=f"--port={port}: can't be used on 127.0.0.1"):
        require_free("127.0.0.1", int(port))


def test_a_site_whose_name_is_made_to_point_here_gets_no_answer(url):
    port = url.rstrip("/").rpartition(":")[2]
    for place in ("", "config", "v1/models"):
        for host, status in (("127.0.0.1", 200), ("localhost", 200), ("[::1]", 200), ("evil.example", 400)):
            assert httpx.get(url + place, headers={"host": f"{host}:{port}"}).status_code == status


@pytest.mark.parametrize(
    "api, key, message", [(False, "x", "no API to guard; add --api"), (True, "", "--api_key is empty")]
)
def test_a_key_that_would_guard_nothing_is_refused(api, key, message):
    with pytest.raises(InputError, match=message):
        _api_key(api, key)


def test_the_key_of_the_api_is_that_of_the_flag_or_the_environment(monkeypatch):
    monkeypatch.delenv("LLADA_API_KEY", raising=False)
    assert _api_key(True, None) is None
    monkeypatch.setenv("LLADA_API_KEY", "b")
    assert (_api_key(True, None), _api_key(True, "a")) == ("b", "a")
