"""vLLM without Ray, in a process of its own, with the engine's own arguments.

    python -m benchmarks.ratios.bare_vllm SETTINGS

SETTINGS is JSON: ``folder`` of the model, ``context_length``, ``limit`` of tokens of a response, ``temperature``, ``threads``. A
request of {"requests", "samples"} asks for so many responses to each of (ids, seed); null empties the prefix cache.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from actors.config import RolloutConfig
from actors.process import ProcessSetup, engine_environment
from benchmarks.ratios.child import MARK, Child


class BareEngine:
    """The process; ready when it is made.

    Args:
        folder: of the model.
        logs: directory.
        context_length: of the engine, tokens.
        config: temperature and tokens of a response.
        threads: of the process.
    """

    def __init__(self, folder: Path, logs: Path, context_length: int, config: RolloutConfig, threads: int) -> None:
        setup = ProcessSetup("bare", logs / "bare.log", threads, "cpu", "float32", 0, 1, False)
        given = {
            "folder": str(folder), "context_length": context_length, "limit": config.max_new_tokens,
            "temperature": config.temperature, "threads": threads,
        }  # fmt: skip
        command = [sys.executable, "-m", "benchmarks.ratios.bare_vllm", json.dumps(given)]
        self.child = Child("vLLM", command, os.environ | engine_environment(setup, False))
        self.forget()

    def sample(self, requests: Sequence[tuple[Sequence[int], int]], samples: int) -> list[list[int]]:
        """Responses to all requests (ids, seed), so many each."""
        answer: list[list[int]] = self.child.ask({"requests": requests, "samples": samples})
        return answer

    def forget(self) -> None:
        """Empty the prefix cache."""
        self.child.ask(None)

    def end(self) -> None:
        """Let it end."""
        self.child.end()


def serve(folder: str, context_length: int, limit: int, temperature: float, threads: int) -> None:
    """What the process does."""
    import torch

    torch.set_num_threads(threads)
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=folder, dtype="float32", max_model_len=context_length, enforce_eager=True, logprobs_mode="processed_logprobs",
        generation_config="vllm", enable_prefix_caching=True, seed=0, kv_cache_memory_bytes=RolloutConfig().kv_cache_mib << 20,
        enable_chunked_prefill=False, max_num_batched_tokens=2048,
    )  # fmt: skip
    for line in sys.stdin:
        asked: dict[str, Any] | None = json.loads(line)
        answer: list[list[int]] = []
        if asked is None:
            llm.reset_prefix_cache()
        else:
            params = [
                SamplingParams(
                    n=asked["samples"], temperature=temperature, max_tokens=limit, seed=seed, logprobs=0, detokenize=False
                )
                for _, seed in asked["requests"]
            ]
            found = llm.generate([{"prompt_token_ids": ids} for ids, _ in asked["requests"]], params, use_tqdm=False)
            answer = [list(sample.token_ids) for output in found for sample in output.outputs]
        print(f"{MARK}{json.dumps(answer)}", flush=True)


if __name__ == "__main__":
    serve(**json.loads(sys.argv[1]))
