"""Renders chat templates that strangers wrote, as a process that can do nothing else; templates.py starts it.

A line of JSON comes in, {"template", "values"}, and a line goes out, {"text"} or {"error"}. jinja2's sandbox keeps
Python's objects out of reach; what it cannot bound, loops in loops and texts that double, the process's limits do.
"""

import functools
import json
import math
import resource
import sys
import time

import jinja2
import jinja2.sandbox

SECONDS = 2  # of the processor for one rendering, which takes a millisecond
MEMORY = 2**30  # bytes of address space
CHARACTERS = 2**22  # of the rendered text


class _Refusal(Exception):
    """What a template raises by raise_exception()."""


def environment() -> jinja2.Environment:
    """How chat templates are written: as transformers renders them."""
    made = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    made.globals["raise_exception"] = _refuse
    return made


def _refuse(reason):
    raise _Refusal(reason)


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    return environment().from_string(template)


def _render(template: str, values: dict) -> dict[str, str]:
    parts, length = [], 0
    try:
        for part in _compiled(template).generate(**values):
            parts.append(part)
            length += len(part)
            if length > CHARACTERS:
                return {"error": f"makes over {CHARACTERS} characters of these messages"}
    except _Refusal as error:
        return {"error": f"refuses these messages: {error}"}
    except MemoryError:
        return {"error": "needs more memory than a chat template may"}
    except Exception as error:  # whatever a template does wrong, from its syntax to adding a number to a text
        return {"error": f"fails ({type(error).__name__}: {str(error)[:200]})"}
    return {"text": "".join(parts)}


def _main() -> None:
    for kind, most in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(kind, (most, most))
    for line in sys.stdin:
        allowed = math.ceil(time.process_time()) + SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (allowed, resource.getrlimit(resource.RLIMIT_CPU)[1]))
        request = json.loads(line)
        sys.stdout.write(json.dumps(_render(request["template"], request["values"])) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _main()
