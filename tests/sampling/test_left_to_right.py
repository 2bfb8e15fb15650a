"""The sampler of the autoregressive control against a plain loop."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import TINY

from llada_jax.data import sources
from llada_jax.data.train_tokenizer import train_tokenizer
from llada_jax.model.transformer import Transformer
from llada_jax.sampling import left_to_right


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    texts = [sources.couplet_text(*couplet[:2]) for couplet in sources.couplets()[:12]]
    return train_tokenizer(texts, tmp_path_factory.mktemp("t") / "t.model", 2000, "char")


@pytest.fixture(scope="module")
def causal(tokenizer):
    size = tokenizer.vocab_size
    c = dataclasses.replace(TINY, vocab_size=size, embedding_size=size, causal=True, mask_token_id=tokenizer.mask_id)
    return Transformer(c, jax.random.key(0))


def test_continuations_are_greedy_and_do_not_depend_on_their_neighbours(causal, tokenizer):
    prompts = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in ("床前", "白日依")]
    together = left_to_right.continue_ids(causal, tokenizer, prompts, 4)
    for prompt, text in zip(prompts, together, strict=True):
        row = list(prompt)
        for _ in range(4):
            logits = np.array(causal(jnp.asarray([row]))[0, -1])
            logits[tokenizer.mask_id] = -np.inf
            row.append(int(logits.argmax()))
        new = row[len(prompt) :]
        stop = min([new.index(t) for t in (tokenizer.eos_id, tokenizer.eot_id) if t in new], default=4)
        assert text == tokenizer.decode(new[:stop])
