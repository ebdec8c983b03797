"""The rollout pool's worker: one vLLM engine that samples from the current policy."""

from __future__ import annotations

import hashlib
import logging
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from actors.config import RolloutConfig
from actors.process import STATUS_GROUP, ProcessSetup, Role
from actors.transfer import STORED, Delivery, Line, TransferSetup
from actors.turns import Turns
from tokens.guards import BadNumber
from tokens.records import Prompt, Rollout, Swap

log = logging.getLogger(__name__)


class StaleEngine(RuntimeError):
    """The engine does not hold the weights that the caller asked for."""


def prompt_seed(seed: int, prompt_id: str, occurrence: int = 0) -> int:
    """The sampling seed of one prompt; its k samples take seed, seed + 1, ...

    Args:
        seed: of the call.
        prompt_id: of the prompt.
        occurrence: how often the prompt came before in the batch.

    Returns:
        48 bits, so that the k samples of two prompts do not share a stream.
    """
    return int.from_bytes(hashlib.sha256(f"{seed}/{prompt_id}/{occurrence}".encode()).digest()[:6], "big")


def occurrences(prompts: Sequence[Prompt]) -> tuple[int, ...]:
    """How often each prompt came before in a batch."""
    seen: Counter[str] = Counter()
    before: list[int] = []
    for prompt in prompts:
        before.append(seen[prompt.id])
        seen[prompt.id] += 1
    return tuple(before)


CHUNK = 64
"""Prompts that the engine is given at once."""


@ray.remote(concurrency_groups=STATUS_GROUP | {"line": 1, "load": 1})
class RolloutEngine(Role):
    """One engine. It serves nothing until ``load`` has given it weights of a version.

    ``load`` has a thread of its own: while ``sample`` runs, it takes its turn between two steps of the engine. The requests
    under way are kept, and go on with the new weights over the keys and values that they have.
    """

    about = "samples from the policy with vLLM"

    def __init__(
        self,
        setup: ProcessSetup,
        model_dir: Path,
        config: RolloutConfig,
        max_model_len: int,
        transfer: TransferSetup = STORED,
    ) -> None:
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
        self.line = Line(transfer.deadline_s)
        self.version: int | None = None
        self.turns = Turns()
        self.engine = LLM(
            model=str(model_dir),
            dtype=setup.dtype,
            max_model_len=max_model_len,
            enforce_eager=setup.device == "cpu",
            logprobs_mode="processed_logprobs",
            generation_config="vllm",
            enable_prefix_caching=True,
            seed=0,
            enable_sleep_mode=self._sleeps(),
            **placement,
            **transfer.engine_arguments(),
        )
        self.tokenizer = self.engine.get_tokenizer()
        log.info("%s: engine ready, model %s", setup.name, model_dir)

    @ray.method(concurrency_group="load")
    def load(self, weights: Delivery, version: int, *awake: None) -> int:
        """Take new weights in place; no request that comes later sees the keys and values that the old ones made.

        Args:
            weights: of a Hugging Face state dict, on their way from the learner.
            version: of the policy.
            awake: answers of what must have happened before; Ray waits for them.

        Returns:
            The version now held.

        Raises:
            RuntimeError: if the prefix cache could not be emptied.
        """
        with self.turns.change():
            self.version = None
            self.engine.collective_rpc("synchronize_device")  # this thread's stream is not that of the thread that steps
            weights.into(self.engine, self.line)
            self.engine.collective_rpc("synchronize_device")
            if not self.engine.llm_engine.has_unfinished_requests():  # else ``sample`` does it when they are done
                self._forget(version)
            self.engine.llm_engine.set_weight_version(str(version))
            self.version = version
            return version

    def _forget(self, version: int) -> None:
        """Empty the prefix cache. Its salt keeps a request from the keys and values of other weights anyway."""
        if not self.engine.reset_prefix_cache():
            raise RuntimeError(f"{self.setup.name}: the prefix cache could not be reset after loading version {version}")

    @ray.method(concurrency_group="line")
    def num_workers(self) -> int:
        """How many of vLLM's workers this engine has."""
        return int(self.engine.get_world_size())

    @ray.method(concurrency_group="line")
    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Get ready for the learner, while the engine is idle; see ``EngineClient``."""
        self.engine.init_weight_transfer_engine({"init_info": init_info})

    @ray.method(concurrency_group="line")
    def ask(self, method: str, *arguments: Any) -> None:
        """Have the ``load`` that is under way, or the next one, call a method of vLLM's engine; see ``EngineClient``."""
        self.line.ask(method, *arguments)

    def _sleeps(self) -> bool:
        return self.setup.shares_device and self.setup.device == "cuda"

    def rest(self, parts: Sequence[str]) -> None:
        """Sleep: weights to host memory, keys and values discarded. On the CPU vLLM cannot, and nothing happens."""
        if self._sleeps():
            self.engine.sleep(level=1)  # vLLM can only put all of it to sleep
            if "weights" not in parts:
                self.engine.wake_up(tags=["weights"])

    def wake(self, parts: Sequence[str], *rested: None) -> None:
        """Wake: ``weights`` before new ones arrive, ``kv_cache`` before anything is sampled."""
        if self._sleeps():
            self.engine.wake_up(tags=list(parts))

    def sample(
        self,
        prompts: Sequence[Prompt],
        samples_per_prompt: int,
        seed: int,
        version: int,
        before: Sequence[int] | None = None,
        *fitted: object,
    ) -> list[Rollout]:
        """Sample k responses to each prompt.

        Args:
            prompts: to answer.
            samples_per_prompt: k.
            seed: of this call; the same seed, weights and prompts give the same responses.
            version: the oldest policy version that may answer.
            before: how often each prompt came before in the batch that these are a part of; None = they are all of it.
            fitted: answers of what must have happened before; Ray waits for them.

        Returns:
            len(prompts) * k rollouts, prompt by prompt.

        Raises:
            StaleEngine: if older weights are loaded, or none.
            RuntimeError: if the engine gives back fewer samples than asked for, or one that is empty.
            BadNumber: if a log-prob is not finite.
        """
        rollouts: list[Rollout] = []
        before = occurrences(prompts) if before is None else before
        seeds = [prompt_seed(seed, prompt.id, times) for prompt, times in zip(prompts, before, strict=True)]
        self.tick(0, len(prompts) * samples_per_prompt, "samples")
        for start in range(0, len(prompts), CHUNK):
            chunk = slice(start, start + CHUNK)
            with self.turns.step():
                held = self._held(version)
                params = [self._params(samples_per_prompt, seed) for seed in seeds[chunk]]
                requests = [{"prompt_token_ids": list(p.token_ids), "cache_salt": str(held)} for p in prompts[chunk]]
                ids = self.engine.enqueue(requests, params, use_tqdm=False)
            outputs = self._finish(ids, version, len(prompts) * samples_per_prompt, rollouts)
            with self.turns.step():
                if self.version is not None and self.version != held:
                    self._forget(self.version)
            for prompt, output in zip(prompts[chunk], outputs, strict=True):
                if len(output.outputs) != samples_per_prompt:
                    raise RuntimeError(
                        f"{self.setup.name}: {len(output.outputs)} samples for prompt {prompt.id}, {samples_per_prompt} asked for"
                    )
                rollouts += [self._rollout(prompt, index, sample, held) for index, sample in enumerate(output.outputs)]
        return rollouts

    def _held(self, version: int) -> int:
        """The version of the weights that are loaded; at least ``version``."""
        if self.version is None or self.version < version:
            raise StaleEngine(f"{self.setup.name} holds policy version {self.version}, version {version} was asked for")
        return self.version

    def _params(self, samples_per_prompt: int, seed: int) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            n=samples_per_prompt,
            temperature=self.config.temperature,
            top_p=self.config.top_p,
            top_k=self.config.top_k,
            min_p=self.config.min_p,
            repetition_penalty=self.config.repetition_penalty,
            max_tokens=self.config.max_new_tokens,
            seed=seed,
            logprobs=0,
            detokenize=False,
        )

    def _finish(self, ids: Sequence[str], version: int, total: int, before: Sequence[Rollout]) -> list[Any]:
        """Step the engine until these requests are done, and let weights in between two steps.

        Args:
            ids: of the requests.
            version: the oldest policy version that may answer.
            total: samples of the whole call.
            before: rollouts of the call that are done.

        Returns:
            The requests' outputs, in the order of ``ids``.
        """
        core = self.engine.llm_engine
        finished: list[Any] = []
        done, tokens = len(before), sum(len(rollout.response_ids) for rollout in before)
        try:
            while core.has_unfinished_requests():
                with self.turns.step():
                    self._held(version)  # a load that failed has left no weights to go on with
                    outputs = core.step()
                for output in outputs:
                    finished.append(output)
                    done += len(output.outputs)
                    tokens += sum(len(sample.token_ids) for sample in output.outputs)
                    self.tick(done, total, "samples", tokens)
        except BaseException:
            with self.turns.step():
                core.abort_request(list(ids), internal=True)
            raise
        return sorted(finished, key=lambda output: int(output.request_id))  # vLLM counts them up as they come

    def _rollout(self, prompt: Prompt, index: int, sample: Any, held: int) -> Rollout:
        ids = tuple(sample.token_ids)
        logprobs = tuple(float(entry[token].logprob) for token, entry in zip(ids, sample.logprobs, strict=True))
        text = self.tokenizer.decode(ids, skip_special_tokens=True).strip()
        spans = [(span.start, int(span.version)) for span in sample.weight_versions]
        swaps = tuple(Swap(start, version) for start, version in spans if version != held)
        bad = [logprob for logprob in logprobs if not math.isfinite(logprob)]
        if bad:
            what, engine = f"the log-prob of a token that {self.setup.name} sampled", (self.setup.name,)
            raise BadNumber(what, bad[0], where=f"prompt {prompt.id}, policy version {held}", engines=engine)
        return Rollout(prompt, index, ids, text, logprobs, held, sample.finish_reason == "stop", swaps, self.setup.name)
