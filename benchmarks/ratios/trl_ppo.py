"""TRL's PPO trainer, held ready between two steps; runs in the environment of ``trl_environment``, not in ours.

    python -P benchmarks/ratios/trl_ppo.py SETTINGS

SETTINGS is JSON: where the models lie, the prompts' ids, and what the comparison fixes. A request of null makes one step of its
``train``; {"prompts", "responses"} asks what its own functions say of responses.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer
from trl.experimental.ppo.ppo_trainer import forward
from trl.experimental.utils import get_reward
from trl.trainer.utils import selective_log_softmax

STEPS = 100_000
"""Of the schedule, of which only a few are asked for."""


class Turns(TrainerCallback):
    """Stops the trainer's loop after each step until the next request comes."""

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature
        self.trainer: Any = None

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Before the first step."""
        self.until_asked()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """The weights of a step are updated."""
        answer({"steps": int(self.trainer.state.global_step)})
        self.until_asked()

    def until_asked(self) -> None:
        """Answer what is asked until it is a step."""
        for line in sys.stdin:
            request = json.loads(line)
            if request is None:
                return
            answer(self.compare(**request))
        sys.exit(0)

    @torch.no_grad()
    def compare(self, prompts: list[list[int]], responses: list[list[int]]) -> dict[str, list[float]]:
        """Log-probability of responses under the reference, and their rewards."""
        pad = self.trainer.processing_class.pad_token_id
        both = torch.tensor([[*p, *r] for p, r in zip(prompts, responses, strict=True)])
        length = len(prompts[0])
        logits = forward(self.trainer.ref_model, both, pad).logits[:, length - 1 : -1] / (self.temperature + 1e-7)
        logprobs = selective_log_softmax(logits, both[:, length:])
        rewards = get_reward(self.trainer.reward_model, both, pad, length)[1]
        return {"logprobs": logprobs.double().sum(1).tolist(), "rewards": rewards.tolist()}


def answer(what: Any) -> None:
    """A line for whoever asked."""
    print(f"answer {json.dumps(what)}", flush=True)


def trainer(
    policy: str,
    reward: str,
    prompts: list[list[int]],
    threads: int,
    response_length: int,
    temperature: float,
    epochs: int,
    lr: float,
    output_dir: str,
    microbatch: int,
) -> PPOTrainer:
    """Ready to train, from the models that ours starts from; a batch is all prompts, and one minibatch.

    Args:
        policy: directory of the policy, which is the reference as well.
        reward: directory of the reward model, which the value model begins as.
        prompts: ids of equal length.
        threads: of torch.
        response_length: tokens of every response.
        temperature: of sampling.
        epochs: passes over a batch.
        lr: learning rate.
        output_dir: of TRL.
        microbatch: sequences per backward pass.
    """
    torch.set_num_threads(threads)
    tokenizer = AutoTokenizer.from_pretrained(policy)
    turns = Turns(temperature)
    arguments = PPOConfig(
        output_dir=output_dir, per_device_train_batch_size=microbatch, gradient_accumulation_steps=len(prompts) // microbatch,
        num_ppo_epochs=epochs, response_length=response_length, temperature=temperature, learning_rate=lr, use_cpu=True,
        total_episodes=STEPS * len(prompts), save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    made = PPOTrainer(
        args=arguments,
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32, use_safetensors=True),
        ref_model=AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32, use_safetensors=True),
        reward_model=AutoModelForSequenceClassification.from_pretrained(reward, dtype=torch.float32, use_safetensors=True),
        value_model=AutoModelForSequenceClassification.from_pretrained(reward, dtype=torch.float32, use_safetensors=True),
        train_dataset=Dataset.from_dict({"input_ids": prompts}),
        callbacks=[turns],
    )
    turns.trainer = made
    return made


if __name__ == "__main__":
    trainer(**json.loads(sys.argv[1])).train()
