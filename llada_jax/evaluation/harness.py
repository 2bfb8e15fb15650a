"""A model of lm-evaluation-harness (`lm_eval.api.model.LM`): what its tasks ask, answered by a diffusion model.

Needs lm-eval (the extra `eval`), not torch. Every process of a run must ask the same: rank is 0 and world_size 1 on
all of them, and one program over all devices answers.
"""

import collections
import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from llada_jax.data.tokenizer import END_HEADER, START_HEADER, Tokenizer, load_tokenizer
from llada_jax.evaluation import likelihood, questions, rows
from llada_jax.evaluation.store import Store, digest, model_digest
from llada_jax.fields import InputError, check_fields, choice, flag, integer, number, of_numpy, optional, text
from llada_jax.interop import hf
from llada_jax.parallel import processes
from llada_jax.sampling import batches
from llada_jax.sampling.cache import prepare
from llada_jax.sampling.generate import infill
from llada_jax.sampling.options import Options
from llada_jax.streams import stream

_MOST = 2**31 - 1
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # names of one argument
_DEFAULT_LENGTH = 256  # of a generation, as in the harness
_GENERATION_ROWS = 8
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides an answer besides model, tokenizer and request; cfg_scale and the samplers' are in Options."""

    method: str = choice("bound", ("bound", "confidence"), "of scoring: the Monte Carlo bound, or iLLaDA's confidence")
    mc_num: int = integer(128, 1, _MOST, "draws of the bound")
    mini_batch: int = integer(8, 1, _MOST, "draws over which the numbers of masked tokens are spread evenly")
    stop_at: float | None = optional(
        number(0.5, 0.5, 1, "stop a question at this confidence in its leader; None: never", above=True, below=True)
    )
    check_greedy: bool = flag(False, "also find whether the greedy answer is the one asked; a pass for each token")
    prefix: str = choice("none", ("none", "bos", "eos"), "the token before every text")
    gen_length: int | None = optional(integer(0, 1, _MOST, "tokens to generate, whatever the task says"))
    infill_marker: str = text("<|infill|>", "where a text has its gap")
    max_length: int | None = optional(integer(0, 2, _MOST, "tokens of a canvas; by default the model's context"))
    context_length: int = integer(1, 1, _MOST, "tokens that a window of a long text is given, at least")
    seed: int = integer(0, 0, 2**32 - 1, "of every draw")

    def __post_init__(self):
        if self.mini_batch > self.mc_num or self.mc_num % self.mini_batch:
            raise InputError(f"mc_num {self.mc_num} is not a multiple of mini_batch {self.mini_batch}")


class LLaDA(LM):
    """Answers requests of lm-evaluation-harness; see `Settings` for its arguments besides those of the samplers."""

    def __init__(
        self, pretrained: str | None = None, *, model=None, tokenizer: Tokenizer | None = None,
        store: Store | None = None, batch_size: int | str | None = None, max_batch_size=None, device=None, **given: Any,
    ):  # fmt: skip
        """pretrained: directory of a checkpoint; or model and tokenizer. batch_size: rows at once, "auto" as many as
        keep a device busy; no answer depends on it. device, max_batch_size: ignored, JAX's devices are used.

        Raises InputError for unknown arguments and values out of range.
        """
        super().__init__()
        if (model is None or tokenizer is None) and pretrained is None:
            raise InputError("give pretrained=DIR, or model and tokenizer")
        self.model = hf.load(str(pretrained)) if model is None else model
        if self.model.config.causal:
            raise InputError("the model is causal (config.model.causal); only diffusion models are evaluated here")
        self.tokenizer = load_tokenizer(hf.tokenizer_directory(str(pretrained))) if tokenizer is None else tokenizer
        self.store = Store(None) if store is None else store
        self.rows_at_once = _rows(batch_size)
        self.truncated = 0  # requests whose context was cut
        self.lengths_differ: set[tuple[int, int]] = set()  # what a task asked for, and what was generated
        self._model_digest = model_digest(self.model)
        self.configure(**given)

    def configure(self, **given: Any) -> None:
        """Other settings for the requests to come."""
        given = of_numpy(given)
        own = {field.name for field in dataclasses.fields(Settings)}
        self.sampling = {name: value for name, value in given.items() if name not in own}
        check_fields(Options, self.sampling, "")
        Options(**self.sampling)
        settings = {name: value for name, value in given.items() if name in own}
        check_fields(Settings, settings, "")
        self.settings = Settings(**settings)
        if self.settings.method == "confidence" and self.settings.stop_at is not None:
            raise InputError("stop_at belongs to the method bound; the confidence score has no draws")

    # What the harness asks

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        question_of = [digest(r.task_name, r.doc) for r in requests]
        keys = [self._key("loglikelihood", *r.args, q) for r, q in zip(requests, question_of, strict=True)]
        todo = self._todo(keys)
        if self.settings.stop_at is not None:  # a choice stops by the others: all of a question, or none
            open_ = {question_of[i] for i in todo}
            todo = [i for i, question in enumerate(question_of) if question in open_]
        pairs = {i: self._pair(*requests[i].args) for i in todo}
        with self._bar("scores", len(requests), len(todo)) as bar:
            for i, score, draws in self._scores(requests, pairs, question_of):
                self._keep(keys[i], requests[i], [score, self._is_greedy(pairs[i])], draws=draws)
                bar.update(1)
        return [(float(self.store[key][0]), bool(self.store[key][1])) for key in keys]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        s = self.settings
        keys = [self._key("loglikelihood_rolling", *r.args) for r in requests]
        todo = self._todo(keys)
        texts = [self.tokenizer.encode_marked(requests[i].args[0]) for i in todo]
        prefix = {"bos": self.tokenizer.bos_id, "eos": self.tokenizer.eos_id}.get(s.prefix)
        found = likelihood.rolling_bounds(
            self.model, texts, max_length=self.max_length, context_length=s.context_length, prefix=prefix,
            mc_num=s.mc_num, batch_size=s.mini_batch, cfg_scale=self._cfg_scale, key=stream(s.seed, "eval"),
            rows_at_once=self.rows_at_once,
        )  # fmt: skip
        with self._bar("texts", len(requests), len(todo)) as bar:
            for i, bound in found:
                self._keep(keys[todo[i]], requests[todo[i]], bound, tokens=len(texts[i]))
                bar.update(1)
        return [float(self.store[key]) for key in keys]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        seen: collections.Counter = collections.Counter()
        keys = []
        for r in requests:  # a repeated request is drawn anew
            keys.append(self._key("generate_until", *r.args, seen[digest(r.args)]))
            seen[digest(r.args)] += 1
        todo = self._todo(keys)
        with self._bar("answers", len(requests), len(todo)) as bar:

            def keep(i: int, ids: list[int]) -> None:
                arguments: Any = requests[i].args[1:]
                self._keep(keys[i], requests[i], cut(self.tokenizer, ids, arguments[0].get("until")))
                bar.update(1)

            self._generate([(i, keys[i], *requests[i].args) for i in todo], keep)
        return [str(self.store[key]) for key in keys]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        if add_generation_prompt:
            return self.tokenizer.chat_text(chat_history)
        # The answer has begun: its turn stays open. The template ends with the header of a reply.
        return self.tokenizer.chat_text(chat_history[:-1]) + chat_history[-1]["content"].strip()

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.fingerprint

    def chat_template(self, chat_template: bool | str = False) -> str:
        return self.tokenizer.chat_template

    def get_model_info(self) -> dict[str, Any]:
        """What made the results, for their `config`."""
        info: dict[str, Any] = {"model_digest": self._model_digest, "tokenizer_digest": self.tokenizer.fingerprint}
        info |= dataclasses.asdict(self.settings) | {"sampling": self.sampling, "truncated_contexts": self.truncated}
        info["generated_instead_of_asked"] = [f"{own} for {asked}" for asked, own in sorted(self.lengths_differ)]
        return info

    @property
    def max_length(self) -> int:
        """Tokens of a canvas, at most."""
        return min(self.settings.max_length or _MOST, self.model.config.max_sequence_length)

    # Scores

    @property
    def _cfg_scale(self) -> float:
        return float(self.sampling.get("cfg_scale", 0.0))

    def _scores(self, requests, pairs: dict[int, rows.Pair], question_of) -> Iterator[tuple[int, float, int]]:
        """(request, score in nats, draws or passes that it took), as they come."""
        s, number_of = self.settings, list(pairs)
        if s.method == "confidence":
            found = rows.confidence_orders(
                self.model, list(pairs.values()), cfg_scale=self._cfg_scale, rows_at_once=self.rows_at_once
            )
            for i, _, log_p_A in found:
                yield number_of[i], float(log_p_A.sum()), len(log_p_A)
            return
        choices = []
        for i, pair in pairs.items():
            answer = requests[i].args[1].lstrip() or requests[i].args[1]
            choices.append(questions.Choice(pair, question_of[i].encode(), (1.0, len(answer), len(answer.encode()))))
        found = questions.bounds(
            self.model, choices, stream(s.seed, "eval"), mc_num=s.mc_num, mini_batch=s.mini_batch,
            cfg_scale=self._cfg_scale, stop_at=s.stop_at, rows_at_once=self.rows_at_once,
        )  # fmt: skip
        for i, bound, draws in found:
            yield number_of[i], bound, draws

    def _is_greedy(self, pair: rows.Pair) -> bool:
        """Whether the answer is what the sampler writes, a token a pass; False where that is not asked for."""
        if not self.settings.check_greedy:
            return False
        canvas = pair.tokens.copy()
        canvas[pair.start :] = self.model.config.mask_token_id
        written = np.asarray(infill(self.model, canvas[None], cfg_scale=self._cfg_scale).tokens)[0]
        return bool((written == pair.tokens).all())

    def _pair(self, context: str, continuation: str) -> rows.Pair:
        """Both as the official code encodes them: white space between them belongs to the continuation."""
        bare = context.rstrip()
        whole, prompt = self._encode(context + continuation), self._encode(bare)
        answer = whole[len(prompt) :]
        if not answer:
            raise InputError(f"no token is left of the answer {continuation!r} after {context[-40:]!r}")
        room = self.max_length - len(answer)
        if room < 0:
            raise InputError(f"the answer {continuation[:40]!r}… has {len(answer)} tokens, over {self.max_length}")
        return rows.make_pair(self.model.config, self._cut_left(prompt, room), answer)

    # Generation

    def _generate(self, asked: list[tuple[int, str, str, dict]], keep: Callable[[int, list[int]], None]) -> None:
        """Hands the generated ids of each request over; requests of equal options share batches."""
        groups: dict[str, list[tuple[Any, ...]]] = collections.defaultdict(list)
        for i, key, context, kwargs in asked:
            is_infill = self.settings.infill_marker in context
            length, options = self._options(kwargs, is_infill)
            request, columns = self._request(int(key[:8], 16) % 2**31, context, length, is_infill)
            groups[digest(length, options, is_infill)].append((i, request, columns, length, options))
        weights = prepare(self.model) if groups else None
        for group in groups.values():
            place_of = {id(request): (i, columns) for i, request, columns, _, _ in group}
            _, _, _, length, options = group[0]

            def on_answer(answer: batches.Answer, place_of=place_of) -> None:
                i, (left, right) = place_of[id(answer.request)]
                row = np.asarray(answer.stats.tokens)[answer.row]
                keep(i, row[len(row) - left : len(row) - right].tolist())

            batches.answer_all(
                weights, self.tokenizer, [request for _, request, *_ in group],
                options | {"key": stream(self.settings.seed, "sample")}, gen_length=length,
                batch_size=self.rows_at_once or _GENERATION_ROWS, on_answer=on_answer,
            )  # fmt: skip

    def _options(self, kwargs: dict[str, Any], is_infill: bool) -> tuple[int, dict[str, Any]]:
        """(tokens to generate, options of the sampler) of a request."""
        asked = next((int(kwargs[name]) for name in _LENGTHS if kwargs.get(name) is not None), _DEFAULT_LENGTH)
        length = asked if is_infill else self.settings.gen_length or asked
        options = dict(self.sampling)
        if is_infill:  # its masks are one block, and as many as there are
            for name in ("steps", "block_length", "variable_length", "stop_at_eos"):
                options.pop(name, None)
        elif block := options.get("block_length"):
            length = -(-length // block) * block
        if length != asked:
            if not self.lengths_differ:
                _log.warning("the task asks for %d tokens, %d are generated, as the settings say", asked, length)
            self.lengths_differ.add((asked, length))
        if kwargs.get("do_sample"):
            options["temperature"] = float(kwargs.get("temperature", options.get("temperature", 1.0)))
        elif kwargs.get("do_sample") is False:
            options["temperature"] = 0.0
        return length, options

    def _request(
        self, number: int, context: str, length: int, is_infill: bool
    ) -> tuple[batches.Request, tuple[int, int]]:
        """The request, and where its answer lies in a row: columns from the right end."""
        if length >= self.max_length:
            raise InputError(f"{length} tokens to generate leave no room for a prompt in {self.max_length}")
        if not is_infill:
            prompt = self._cut_left(self._encode(context), self.max_length - length) or [self.tokenizer.bos_id]
            return batches.Request(number, prompt), (length, 0)
        before, _, after = context.partition(self.settings.infill_marker)
        suffix = self.tokenizer.encode(after)
        if length + len(suffix) > self.max_length:
            raise InputError(f"{length} masks and a suffix of {len(suffix)} tokens exceed {self.max_length}")
        prompt = self._cut_left(self._encode(before), self.max_length - length - len(suffix))
        ids = [*prompt, *[self.model.config.mask_token_id] * length, *suffix]
        return batches.Request(number, ids, infill=True), (length + len(suffix), len(suffix))

    # Common to all

    def _encode(self, text: str) -> list[int]:
        """Ids with the prefix, which a chat template brings along; names of special tokens stand for these."""
        ids = self.tokenizer.encode_marked(text)
        prefix = {"bos": self.tokenizer.bos_id, "eos": self.tokenizer.eos_id}.get(self.settings.prefix)
        return ids if prefix is None or ids[:1] == [self.tokenizer.bos_id] else [prefix, *ids]

    def _cut_left(self, ids: list[int], room: int) -> list[int]:
        if len(ids) <= room:
            return ids
        if not self.truncated:
            _log.warning("a context of %d tokens is cut on the left to %d; results count such requests", len(ids), room)
        self.truncated += 1
        return ids[len(ids) - room :]

    def _key(self, *request: Any) -> str:
        """The name of an answer in the store: all that it depends on."""
        made_by = dataclasses.asdict(self.settings), self.sampling, self._model_digest, self.tokenizer.fingerprint
        return digest(request, made_by)

    def _todo(self, keys: list[str]) -> list[int]:
        """The first request of each key that the store lacks."""
        first = {key: i for i, key in reversed(list(enumerate(keys)))}
        return sorted(i for key, i in first.items() if key not in self.store)

    def _keep(self, key: str, request: Instance, answer: Any, **facts: Any) -> None:
        self.store.add(key, answer, kind=request.request_type, task=request.task_name, doc=request.doc_id, **facts)
        value = tuple(answer) if isinstance(answer, list) else answer
        self.cache_hook.add_partial(request.request_type, request.args, value)

    def _bar(self, unit: str, total: int, todo: int) -> tqdm:
        return tqdm(total=total, initial=total - todo, unit=f" {unit}", disable=not processes.is_first())


register_model("llada_jax")(LLaDA)


class Tasks(TaskManager):
    """The tasks of a directory, and with `builtin` those of lm-eval; a task that fails to load is one line."""

    def __init__(self, include_path: str | None, builtin: bool, unsafe_code: bool):
        super().__init__(include_path=include_path, include_defaults=builtin)
        self._unsafe_code = unsafe_code

    def load(self, task_list: Any) -> Any:
        try:
            loaded = super().load(task_list)
        except Exception as error:  # a task is a program of others: its data, templates and functions
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"--tasks={','.join(task_list)}: can't be loaded ({type(error).__name__}: {reason})"
            ) from error
        for name, task in loaded["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False) and not self._unsafe_code:
                raise InputError(
                    f"task {name} runs code that the model writes; allow it with --confirm_run_unsafe_code"
                )
        return loaded


def cut(tokenizer: Tokenizer, ids: Sequence[int], until: str | list[str] | None) -> str:
    """The text of generated ids up to the first end of text or turn and the first stop string, which may span tokens;
    special tokens are left out."""
    ends = [ids.index(stop) for stop in (tokenizer.eos_id, tokenizer.eot_id) if stop in ids]
    text = tokenizer.decode(ids[: min(ends, default=len(ids))], keep_special=True)
    for stop in [until] if isinstance(until, str) else until or []:
        text = text.split(stop)[0] if stop else text
    named = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eot_id, tokenizer.mask_id)
    for name in (*(tokenizer.decode([id], keep_special=True) for id in named), START_HEADER, END_HEADER):
        text = text.replace(name, "")
    return text


def _rows(batch_size: int | str | None) -> int | None:
    if batch_size is None or str(batch_size).startswith("auto"):
        return None
    if not str(batch_size).isdigit() or int(batch_size) < 1:
        raise InputError(f"batch_size {batch_size!r} is neither auto nor a positive whole number")
    return int(batch_size)
