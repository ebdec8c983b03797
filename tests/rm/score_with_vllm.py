"""Scores of a saved reward model under vLLM's pooling runner: python score_with_vllm.py MODEL_DIR SEQUENCES.json SCORES.json"""

import json
import sys
from pathlib import Path

from vllm import LLM, PoolingParams

if __name__ == "__main__":
    model, sequences, out = sys.argv[1:]
    engine = LLM(
        model=model, runner="pooling", dtype="float32", enforce_eager=True, max_model_len=64, kv_cache_memory_bytes=64 << 20
    )
    prompts = [{"prompt_token_ids": ids} for ids in json.loads(Path(sequences).read_text())]
    outputs = engine.classify(prompts, pooling_params=PoolingParams(use_activation=False), use_tqdm=False)  # raw, no sigmoid
    Path(out).write_text(json.dumps([output.outputs.probs[0] for output in outputs]))
