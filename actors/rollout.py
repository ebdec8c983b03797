"""The rollout pool's worker: one vLLM engine that samples from the current policy."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from actors.config import RolloutConfig
from actors.process import STATUS_GROUP, ProcessSetup, Role
from tokens.records import Prompt, Rollout

log = logging.getLogger(__name__)


class StaleEngine(RuntimeError):
    """The engine does not hold the weights that the caller asked for."""


def prompt_seed(seed: int, prompt_id: str, occurrence: int = 0) -> int:
    """The sampling seed of one prompt; its k samples take seed, seed + 1, ...

    Args:
        seed: of the call.
        prompt_id: of the prompt.
        occurrence: how often the prompt came before in the call.

    Returns:
        48 bits, so that the k samples of two prompts do not share a stream.
    """
    return int.from_bytes(hashlib.sha256(f"{seed}/{prompt_id}/{occurrence}".encode()).digest()[:6], "big")


@ray.remote(concurrency_groups=STATUS_GROUP)
class RolloutEngine(Role):
    """One engine. It serves nothing until ``load`` has given it weights of a version."""

    def __init__(self, setup: ProcessSetup, model_dir: Path, config: RolloutConfig, max_model_len: int) -> None:
        super().__init__(setup)
        from vllm import LLM

        placement: dict[str, Any] = {"gpu_memory_utilization": config.gpu_memory_utilization}
        if setup.device == "cpu":
            # A prompt cut into chunks makes vLLM turn back the request's random generator, which torch's CPU one cannot.
            whole = {"enable_chunked_prefill": False, "max_num_batched_tokens": max(2048, max_model_len)}
            placement = {"kv_cache_memory_bytes": config.kv_cache_mib << 20, **whole}
        if config.tensor_parallel > 1:
            # Said outright: within a placement group vLLM would make Ray actors of its own. The workers are processes on the
            # GPUs that Ray has given this one, which they see by the CUDA_VISIBLE_DEVICES that they inherit.
            placement |= {"tensor_parallel_size": config.tensor_parallel, "distributed_executor_backend": "mp"}
        self.config = config
        self.version: int | None = None
        self.engine = LLM(
            model=str(model_dir),
            dtype=setup.dtype,
            max_model_len=max_model_len,
            enforce_eager=setup.device == "cpu",
            logprobs_mode="processed_logprobs",
            generation_config="vllm",
            enable_prefix_caching=True,
            seed=0,
            **placement,
        )
        self.tokenizer = self.engine.get_tokenizer()
        log.info("%s: engine ready, model %s", setup.name, model_dir)

    def load(self, weights: dict[str, Any], version: int) -> int:
        """Take new weights in place, and forget the keys and values that the old ones made.

        Args:
            weights: a Hugging Face state dict.
            version: of the policy.

        Returns:
            The version now held.

        Raises:
            RuntimeError: if the prefix cache could not be emptied.
        """
        self.version = None
        self.engine.collective_rpc("reload_weights", kwargs={"weights_iterator": list(weights.items())})
        if not self.engine.reset_prefix_cache():
            raise RuntimeError(f"{self.setup.name}: the prefix cache could not be reset after loading version {version}")
        self.version = version
        return version

    def sample(self, prompts: Sequence[Prompt], samples_per_prompt: int, seed: int, version: int) -> list[Rollout]:
        """Sample k responses to each prompt.

        Args:
            prompts: to answer.
            samples_per_prompt: k.
            seed: of this call; the same seed, weights and prompts give the same responses.
            version: the policy version that must be loaded.

        Returns:
            len(prompts) * k rollouts, prompt by prompt.

        Raises:
            StaleEngine: if other weights are loaded.
            RuntimeError: if the engine gives back fewer samples than asked for, or one that is empty.
        """
        from vllm import SamplingParams

        if self.version != version:
            raise StaleEngine(f"{self.setup.name} holds policy version {self.version}, version {version} was asked for")
        rollouts: list[Rollout] = []
        seen: Counter[str] = Counter()
        occurrences: list[int] = []
        for prompt in prompts:
            occurrences.append(seen[prompt.id])
            seen[prompt.id] += 1
        chunk = 64
        for start in range(0, len(prompts), chunk):
            part = prompts[start : start + chunk]
            params = [
                SamplingParams(
                    n=samples_per_prompt,
                    temperature=self.config.temperature,
                    top_p=self.config.top_p,
                    max_tokens=self.config.max_new_tokens,
                    seed=prompt_seed(seed, prompt.id, occurrences[index]),
                    logprobs=0,
                    detokenize=False,
                )
                for index, prompt in enumerate(part, start)
            ]
            requests = [{"prompt_token_ids": list(prompt.token_ids)} for prompt in part]
            outputs = self.engine.generate(requests, params, use_tqdm=False)
            for prompt, output in zip(part, outputs, strict=True):
                if len(output.outputs) != samples_per_prompt:
                    raise RuntimeError(
                        f"{self.setup.name}: {len(output.outputs)} samples for prompt {prompt.id}, {samples_per_prompt} asked for"
                    )
                rollouts += [self._rollout(prompt, index, sample) for index, sample in enumerate(output.outputs)]
            done, total = min(start + chunk, len(prompts)) * samples_per_prompt, len(prompts) * samples_per_prompt
            self.tick(done, total, "samples", sum(len(rollout.response_ids) for rollout in rollouts))
        return rollouts

    def _rollout(self, prompt: Prompt, index: int, sample: Any) -> Rollout:
        ids = tuple(sample.token_ids)
        logprobs = tuple(float(entry[token].logprob) for token, entry in zip(ids, sample.logprobs, strict=True))
        text = self.tokenizer.decode(ids, skip_special_tokens=True).strip()
        assert self.version is not None
        return Rollout(prompt, index, ids, text, logprobs, self.version, sample.finish_reason == "stop")
