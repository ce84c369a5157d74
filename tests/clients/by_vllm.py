"""In a client's environment: what vLLM serves of a checkpoint, on the CPU. Prints {"version", "logprobs", "tokens"}."""

import json
import os
import sys
from importlib.metadata import version

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}

from vllm import LLM, SamplingParams

if __name__ == "__main__":
    model = LLM(
        model=sys.argv[1],
        dtype="float32",
        max_model_len=64,
        enforce_eager=True,
        trust_remote_code=True,
        enable_prefix_caching=False,
    )
    wanted = SamplingParams(temperature=0, max_tokens=8, logprobs=5, ignore_eos=True, detokenize=False)
    [answer] = model.generate([{"prompt_token_ids": list(range(2, 26))}], wanted, use_tqdm=False)
    best = answer.outputs[0].logprobs[0]
    print(
        json.dumps(
            {
                "version": version("vllm-cpu"),
                "logprobs": {str(token): each.logprob for token, each in best.items()},
                "tokens": list(answer.outputs[0].token_ids),
            }
        )
    )
