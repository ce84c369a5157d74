"""In a client's environment: what mlx-lm makes of a checkpoint. Prints {"version", "logits", "tokens"}."""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model

model, _ = load_model(Path(sys.argv[1]))
ids = mx.arange(2, 26)
logits = np.array(model(ids[None])[0, -1].astype(mx.float32))
tokens = [int(token) for token, _ in generate_step(ids, model, max_tokens=8)]
print(json.dumps({"version": version("mlx-lm"), "logits": logits.tolist(), "tokens": tokens}))
