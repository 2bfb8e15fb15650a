"""The main job of launch/quickstart.sh: a LLaDA and an autoregressive control on couplets, in ten CPU minutes.

python tools/quickstart.py --config=configs/quickstart.py --workdir=DIR [--config.train.seed=1]
"""

from ml_collections import ConfigDict

from llada_jax.config import run_config


def get_config():
    config = run_config("tiny")
    m, d, o, t = config.model, config.data, config.optimizer, config.train
    m.vocab_size = m.embedding_size = 0  # the tokenizer's: one token a character
    m.d_model, m.n_layers, m.n_heads, m.n_kv_heads, m.mlp_hidden_size = 256, 2, 4, 4, 672
    m.max_sequence_length = 64
    d.documents, d.packing, d.row_length = "line", "document", 18
    d.random_length_fraction = 0.0
    config.objective.stratified = True
    o.schedule = (("linear", 1e-3, "50 steps"), ("constant", 1e-3, "50%"), ("cosine", 2e-5, "100%"))
    t.steps, t.batch_size, t.log_every, t.eval_every = 900, 64, 10, 0
    config.checkpoint.every_steps, config.checkpoint.keep = 300, 1
    config.quickstart = ConfigDict(  # tools/quickstart.py
        dict(
            couplets=200,  # the first so many of the embedded corpus that fit a row
            question_share=0.75,  # of them whose questions are learned; the rest is asked without having been seen
            sft_steps=260,
            sft_batch_size=64,
            sft_row_length=36,
            sft_schedule=(("linear", 1e-3, "20 steps"), ("constant", 1e-3, "50%"), ("cosine", 2e-5, "100%")),
            sft_text_weight=0.0,  # rows of plain couplets for each row of questions
        )
    )
    return config.lock()
