"""In a client's environment: what CTranslate2 makes of a checkpoint. Prints {"version", "logits", "tokens"}."""

import json
import sys
import tempfile

import ctranslate2
import numpy as np

folder = tempfile.mkdtemp()
ctranslate2.converters.TransformersConverter(sys.argv[1]).convert(folder, force=True)
generator = ctranslate2.Generator(folder)


def logits_of(ids):
    """Of the last place."""
    given = ctranslate2.StorageView.from_array(np.array([ids], dtype=np.int32))
    lengths = ctranslate2.StorageView.from_array(np.array([len(ids)], dtype=np.int32))
    return np.array(generator.forward_batch(given, lengths))[0, -1]


ids = list(range(2, 26))
first = logits_of(ids)
for _ in range(8):
    ids.append(int(logits_of(ids).argmax()))
print(json.dumps({"version": ctranslate2.__version__, "logits": first.tolist(), "tokens": ids[-8:]}))
