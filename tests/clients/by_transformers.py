"""In a client's environment: what transformers makes of a checkpoint. Prints {"version", "logits", "tokens"}."""

import json
import sys

import torch
import transformers

ids = torch.arange(2, 26)[None]
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval().float()
with torch.no_grad():
    logits = model(ids).logits[0, -1]
    tokens = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=1)[0, -8:]
print(json.dumps({"version": transformers.__version__, "logits": logits.tolist(), "tokens": tokens.tolist()}))
