"""A web page on which people chat with a model and fill masks, and an endpoint for the clients of OpenAI's API.

python -m llada_jax.demo --checkpoint=runs/chat
python -m llada_jax.demo --checkpoint=runs/chat --port=8000 --api --threshold=0.9

The page answers on this machine alone unless --host says otherwise; it loads nothing from elsewhere. With --api the
same port serves /v1/models, /v1/chat/completions and /v1/completions, with --api_key or LLADA_API_KEY to those who have
the key. Answers are made one after the other.
"""

import os
import socket
import threading
from pathlib import Path

from absl import flags

from llada_jax import cli
from llada_jax.fields import InputError
from llada_jax.interop import hf
from llada_jax.sampling import options
from llada_jax.serving import settings
from llada_jax.serving.engine import open_engine

_LOCAL = ("127.0.0.1", "localhost", "::1")


def main(_argv: list[str]) -> None:
    f = flags.FLAGS
    if not f.checkpoint:
        raise InputError("--checkpoint is needed: the --workdir of a fine-tuning run, or a published checkpoint")
    try:
        from llada_jax.serving.page import create_page, serve  # Gradio takes seconds to import
    except ImportError as error:
        raise InputError(f"the page needs Gradio ({error}): pip install 'llada_jax[demo]'") from None
    if f.share:
        cli.say("--share: whoever has the link can use the model, and all they write goes through Gradio's servers")
    key = _api_key(f.api, f.api_key)
    if f.host not in _LOCAL:
        cli.say(f"--host={f.host}: whoever reaches this machine can use the model; the page has no password")
    require_free(f.host, f.port)
    name = Path(f.checkpoint).resolve().name
    with open_engine(f.checkpoint, options.of_flags(), f.gen_length, seed=f.seed) as engine:
        routes = []
        if f.api:
            from starlette.routing import Mount

            from llada_jax.serving.api import create_api

            routes = [Mount("/v1", create_api(engine, name, key))]
        page = create_page(engine, name, hf.is_instruct(f.checkpoint))
        try:
            url, shared = serve(page, f.host, f.port, share=f.share, routes=routes, local=f.host in _LOCAL)
            cli.say(f"the page: {url}" + (f" and {shared}" if shared else ""))
            if f.api:
                cli.say(f"the API: {url.rstrip('/')}/v1, model {name!r}")
            threading.Event().wait()
        finally:
            page.close(verbose=False)


def _api_key(api: bool, given: str | None) -> str | None:
    """The key of the API, None: it needs none. Raises InputError where one was meant and would guard nothing."""
    if given is not None and not api:
        raise InputError("--api_key: there is no API to guard; add --api")
    if given == "":
        raise InputError("--api_key is empty; leave the flag out for an API without a key")
    return given or os.environ.get("LLADA_API_KEY") or None


def require_free(host: str, port: int) -> None:
    """Raises InputError where the address can't be used: before a model is loaded for it."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(address)
    except OSError as error:
        raise InputError(f"--port={port}: can't be used on {host} ({error.strerror}); choose another") from None


def command() -> None:
    """The console script llada-demo."""
    settings.define_flags()
    flags.DEFINE_string("host", "127.0.0.1", "The address to answer on; 0.0.0.0: all that this machine has.")
    flags.DEFINE_integer("port", 7860, "The port to answer on.", lower_bound=1, upper_bound=65535)
    flags.DEFINE_bool("api", False, "Also serve OpenAI's API at /v1.")
    flags.DEFINE_string(
        "api_key", None, "What clients of the API must send; LLADA_API_KEY, which no list of processes shows."
    )
    flags.DEFINE_bool("share", False, "Also give the page a public link, through Gradio's servers.")
    cli.run(main)


if __name__ == "__main__":
    command()
