"""In a client's environment: what onnxruntime-genai makes of a checkpoint. Prints {"version", "logits", "tokens"}."""

import json
import subprocess
import sys
import tempfile

import numpy as np
import onnxruntime_genai as genai

folder = tempfile.mkdtemp()
command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", sys.argv[1], "-o", folder]
done = subprocess.run([*command, "-p", "fp32", "-e", "cpu"], capture_output=True, text=True)
assert done.returncode == 0, done.stderr[-2000:]
model = genai.Model(folder)
settings = genai.GeneratorParams(model)
settings.set_search_options(max_length=32, min_length=32, do_sample=False)
generator = genai.Generator(model, settings)
generator.append_tokens(np.arange(2, 26, dtype=np.int32)[None])
logits = np.array(generator.get_logits())[0, -1]
tokens = []
for _ in range(8):
    generator.generate_next_token()
    tokens.append(int(generator.get_next_tokens()[0]))
print(json.dumps({"version": genai.__version__, "logits": logits.tolist(), "tokens": tokens}))
