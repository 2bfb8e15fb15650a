"""The loop that scoring is compared with scores what ours does."""

import numpy as np
import pytest
from tiny import TINY

from llada_jax.tools import evaluate_speed


def test_the_official_loop_in_pytorch_has_our_scores():
    """Of one token there is one mask: no draw differs. Of more, both estimate one bound."""
    model, copy = evaluate_speed.models(TINY, torch=True)
    asked = evaluate_speed.questions(TINY, 1, 1, 2, prompt=9)
    (found, draws), (theirs, theirs_draws) = evaluate_speed.ours(model, asked), evaluate_speed.official(copy, asked)
    np.testing.assert_allclose(theirs, found, rtol=1e-5)
    assert draws == found.size and theirs_draws == 128 * found.size
    longer = evaluate_speed.questions(TINY, 3, 3, 1, prompt=9)
    assert evaluate_speed.official(copy, longer)[0].mean() == pytest.approx(
        evaluate_speed.ours(model, longer)[0].mean(), rel=0.1
    )
