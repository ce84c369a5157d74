"""In a client's environment: what optimum-intel makes of a checkpoint. Prints {"version", "logits", "tokens"}."""

import json
import sys
from importlib.metadata import version

import torch
from optimum.intel import OVModelForCausalLM

ids = torch.arange(2, 26)[None]
model = OVModelForCausalLM.from_pretrained(
    sys.argv[1], export=True, trust_remote_code=True, load_in_8bit=False, ov_config={"INFERENCE_PRECISION_HINT": "f32"}
)
mask = torch.ones_like(ids)
logits = model(input_ids=ids, attention_mask=mask).logits[0, -1]
tokens = model.generate(
    input_ids=ids, attention_mask=mask, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=1
)[0, -8:]
print(json.dumps({"version": version("optimum-intel"), "logits": logits.tolist(), "tokens": tokens.tolist()}))
