"""Two processes that share policy, critic and reference learn what one process learns."""

import json
import socket
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import distributed, multiprocessing
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from policy.config import KLConfig, PolicyConfig
from policy.critic import Critic
from policy.lora import add_adapters
from policy.ppo import PPO
from policy.statistics import sequence_statistics
from tokens.config import AdapterConfig
from tokens.guards import BadNumber, GuardsConfig
from tokens.lora import WithoutAdapters
from tokens.offload import move_module
from tokens.packing import PACKED
from tokens.ranks import ALONE, Ranks
from tokens.recompute import recompute_layers
from tokens.records import Rollout

CONFIG = PolicyConfig(
    prompts_per_step=4, samples_per_prompt=3, minibatch_size=6, microbatch_size=2, epochs=2, lr=1e-3, critic_lr=1e-3,
    max_grad_norm=0.3, reward_clip=3.0, kl=KLConfig(controller="adaptive", horizon=50),
)  # fmt: skip
Batches = Sequence[tuple[list[Rollout], torch.Tensor]]


class Case(NamedTuple):
    """A way to compute the same."""

    config: PolicyConfig = CONFIG
    recompute: bool = False


def changed(recompute: bool = False, **settings: Any) -> Case:
    return Case(CONFIG.model_copy(update=settings), recompute)


PLAIN, ADAPTED = Case(), changed(lora=AdapterConfig(rank=2, alpha=4))
TOGETHER = {"packing": True, "microbatch_tokens": 19}
OPTIONS: dict[str, Any] = {
    "kl": KLConfig(coef=0.3, place="loss", estimator="k2"), "entropy_coef": 0.02, "ptx_coef": 0.5, "ptx_batch_size": 4,
    "dual_clip": 3.0, "truncated": "mask", "value_loss": "huber",
}  # fmt: skip
TEXTS = [((2, 3), (4, 5, 6, 1)), ((7,), (8, 1)), ((9, 10, 11), (12, 13, 1)), ((2,), (14, 15, 16, 17, 1))]
CASES = {
    "whole": changed(recompute=True, **TOGETHER, **OPTIONS),
    "adapters": changed(recompute=True, lora=ADAPTED.config.lora, **TOGETHER),
    "stopped": changed(max_update_kl=0.002),
}
"""Packed, in microbatches of so many tokens and recomputed, with every option that adds to the loss; adapters likewise; an update
that ends early. To be compared with one process that neither packs nor recomputes."""
ALIKE = {"whole": changed(**OPTIONS), "adapters": ADAPTED, "stopped": CASES["stopped"]}


def load(folder: Path, ranks: Ranks, case: Case = PLAIN) -> PPO:
    """The learner from what ``save`` wrote; optimizer and counters too, where they were written."""
    attention, lora = PACKED if case.config.packing else None, case.config.lora
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32, attn_implementation=attention).eval()
        for name in ("policy", "reference")
    )
    critic = Critic.from_pretrained(folder / "critic", torch.float32, attention)
    if lora.rank:
        add_adapters(policy, lora, seed=0)
        add_adapters(critic.model, lora, seed=1, head="score")
        reference = WithoutAdapters(policy)
    for model in (policy, critic, reference.requires_grad_(False)):
        if case.recompute and not isinstance(model, WithoutAdapters):
            recompute_layers(model)
        if not isinstance(model, WithoutAdapters):
            ranks.shard(model)
    ppo = PPO(policy, critic, reference, case.config, temperature=0.8, pad_id=0, seed=3, ranks=ranks, ptx=TEXTS)
    if (folder / "state.json").exists():
        ppo.load_state(load_file(folder / "state.safetensors"), json.loads((folder / "state.json").read_text()))
    return ppo


def save(ppo: PPO, folder: Path) -> None:
    """As the actor saves; every rank calls it, the first writes."""
    for model, name in ((ppo.policy, "policy"), (ppo.reference, "reference")):
        weights = ppo.ranks.full_state(model)
        if ppo.ranks.rank == 0:
            model.save_pretrained(folder / name, state_dict=weights)
    ppo.critic.save_pretrained(folder / "critic", ppo.ranks)
    tensors, values = ppo.state()
    if ppo.ranks.rank == 0:
        save_file(tensors, folder / "state.safetensors")
        (folder / "state.json").write_text(json.dumps(values))


def learn(ppo: PPO, batches: Batches) -> dict[str, Any]:
    """Warm-up and updates; what they reported, and how likely the models find the first batch afterwards."""
    losses = ppo.warm_up_critic(*batches[0], steps=3)
    rows = [ppo.update(rollouts, scores).as_dict() for rollouts, scores in batches]
    odd = batches[0][0][:5]  # not a multiple of two ranks
    sums = sequence_statistics(ppo.policy, ppo.reference, odd, 0, 0.8, microbatch=2, ranks=ppo.ranks)
    return {"warm_up": losses, "rows": rows, "policy_logprob": sums.policy_logprob, "sft_logprob": sums.sft_logprob}


def whole_run(ppo: PPO, batches: Batches) -> dict[str, Any]:
    """Twenty optimizer steps, and the weights after them."""
    result = learn(ppo, batches)
    weights = {name: ppo.ranks.full_state(model) for name, model in (("policy", ppo.policy), ("critic", ppo.critic))}
    return result | {"weights": {f"{name}/{key}": x for name, state in weights.items() for key, x in state.items()}}


def broken_gradient(ppo: PPO, batch: tuple[list[Rollout], torch.Tensor]) -> BadNumber:
    """What a rank says where the gradient is infinite on rank 1 alone; nothing of the batch is left."""

    def spoil(module: torch.nn.Module, given: object, hidden: torch.Tensor) -> None:
        if hidden.requires_grad and ppo.ranks.rank == 1:
            hidden.register_hook(lambda gradient: gradient * float("inf"))

    hook = ppo.policy.get_submodule("model.layers.1").register_forward_hook(spoil)
    before, moments = {n: p.to_local().clone() for n, p in ppo.policy.named_parameters()}, ppo.moments.state()  # type: ignore[operator]
    with pytest.raises(BadNumber, match="gradient norm") as bad:
        ppo.update(*batch)
    hook.remove()
    assert all(torch.equal(p.to_local(), before[n]) for n, p in ppo.policy.named_parameters())  # type: ignore[operator]
    assert ppo.moments.state() == moments
    return bad.value


def moved_too_far(ppo: PPO, batch: tuple[list[Rollout], torch.Tensor]) -> BadNumber:
    """What a rank says of an update that went further than it may."""
    ppo.guards = GuardsConfig(update_kl=1e-12, collapse=None)
    with pytest.raises(BadNumber, match="KL of the policy before an update to that after it") as bad:
        ppo.update(*batch)
    return bad.value


def refusals(ppo: PPO, batch: tuple[list[Rollout], torch.Tensor]) -> list[str]:
    """What a rank says of rollouts that cannot be shared out, and of weights that only rank 1 holds and that are broken."""
    said = []
    with pytest.raises(ValueError, match="not a multiple") as odd:
        ppo.update(batch[0][:5], batch[1][:5])
    said.append(str(odd.value))
    said += [str(bad) + str(bad.undo) for bad in (broken_gradient(ppo, batch), moved_too_far(ppo, batch))]
    with torch.no_grad():
        name, norm = next((n, p) for n, p in ppo.critic.named_parameters() if n.endswith("norm.weight"))
        if ppo.ranks.rank == 1:
            norm.to_local().fill_(float("nan"))  # type: ignore[operator]
    with pytest.raises(BadNumber) as broken:
        ppo.update(*batch)
    return [*said, f"{name}: {broken.value}"]


def on_rank(rank: int, port: int, folder: Path) -> None:
    """Phase 1: learn from the start, save. Phase 2: go on from what one process saved."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2, timeout=timedelta(seconds=120)
    )
    ranks = Ranks(rank, 2, distributed.init_device_mesh("cpu", (2,)))
    batches = torch.load(folder / "batches.pt", weights_only=False)
    ppo = load(folder / "start", ranks)
    for module in (ppo.policy, ppo.critic, ppo.reference):
        assert all(p.to_local().numel() < p.numel() or p.numel() <= 32 for p in module.parameters())  # type: ignore[operator]
    result = learn(ppo, batches[:3])
    save(ppo, folder / "by_two")
    streamed, whole = dict(ranks.stream(ppo.policy)), ranks.full_state(ppo.policy)
    assert len(streamed) == len(ppo.policy.state_dict())
    assert rank or all(torch.equal(streamed[name], whole[name]) for name in streamed)
    torch.save(result, folder / f"result_{rank}.pt")
    torch.save((whole_run(ppo, batches[3:]), whole_run(load(folder / "by_two", ranks), batches[3:])), folder / f"on_{rank}.pt")
    ppo = load(folder / "by_one", ranks)
    move_module(ppo.policy, "cpu")  # what shards go through when they rest and wake; here they are on the CPU already
    ppo.move_training_state("cpu")
    result = learn(ppo, batches[3:])
    save(ppo, folder / "by_one_then_two")
    torch.save(result | {"said": refusals(ppo, batches[0])}, folder / f"second_{rank}.pt")
    for name, case in CASES.items():
        torch.save(whole_run(load(folder / "start", ranks, case), batches), folder / f"{name}_{rank}.pt")
    distributed.destroy_process_group()


def close(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert two["warm_up"] == pytest.approx(one["warm_up"], abs=1e-5)
    for got, wanted in zip(two["rows"], one["rows"], strict=True):
        assert got == pytest.approx(wanted, abs=1e-5, rel=1e-4)
    for name in ("policy_logprob", "sft_logprob"):
        torch.testing.assert_close(two[name], one[name], atol=1e-4, rtol=0)


def same_weights(one: PPO, two: PPO) -> None:
    for left, right in ((one.policy, two.policy), (one.critic, two.critic), (one.reference, two.reference)):
        for (name, a), b in zip(left.named_parameters(), right.parameters(), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=0, msg=name)


def same_bits(one: dict[str, Any], two: dict[str, Any]) -> bool:
    """What two runs reported, and all of their weights."""
    tensors = [(one[name], two[name]) for name in ("policy_logprob", "sft_logprob")]
    tensors += [(weight, two["weights"][name]) for name, weight in one["weights"].items()]
    alike = all(torch.equal(left, right) for left, right in tensors) and one["weights"].keys() == two["weights"].keys()
    return alike and (one["warm_up"], one["rows"]) == (two["warm_up"], two["rows"])


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads cost more than they give at this size, and much more while other processes compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_two_ranks_learn_what_one_process_learns(
    language_model: Callable[[int], LlamaForCausalLM],
    critic: Callable[[int], Critic],
    sample: Callable[..., list[Rollout]],
    tmp_path: Path,
) -> None:
    language_model(0).save_pretrained(tmp_path / "start" / "policy")
    language_model(5).save_pretrained(tmp_path / "start" / "reference")
    critic(1).save_pretrained(tmp_path / "start" / "critic")
    batches = []
    for seed in range(5):
        rollouts = sample(language_model(0), seed, num_prompts=12)
        batches.append((rollouts, torch.tensor([float(len(r.response_ids) + sum(r.response_ids) % 5) for r in rollouts])))
    torch.save(batches, tmp_path / "batches.pt")
    one = load(tmp_path / "start", ALONE)
    first = learn(one, batches[:3])
    save(one, tmp_path / "by_one")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(on_rank, args=(port, tmp_path), nprocs=2)  # type: ignore[no-untyped-call]
    results = [torch.load(tmp_path / f"result_{rank}.pt", weights_only=False) for rank in (0, 1)]
    assert results[0]["rows"] == results[1]["rows"] and results[0]["warm_up"] == results[1]["warm_up"]
    assert any(row["policy/clip_fraction"] > 0 for row in first["rows"]) and first["rows"][0]["policy/grad_norm"] > 0.3
    close(first, results[0])
    for rank in (0, 1):
        on, resumed = torch.load(tmp_path / f"on_{rank}.pt", weights_only=False)
        assert same_bits(on, resumed), "two ranks that go on from a save learn what those learn that made it"
    two = load(tmp_path / "by_two", ALONE)
    same_weights(one, two)
    assert two.num_updates == one.num_updates == 3 and two.kl.coef == pytest.approx(one.kl.coef, rel=1e-4)
    for name, moment in one.state().tensors.items():
        torch.testing.assert_close(two.state().tensors[name], moment, atol=1e-5, rtol=1e-3)

    for name, plain in ALIKE.items():
        wanted = whole_run(load(tmp_path / "start", ALONE, plain), batches)
        assert len(batches) * plain.config.epochs * 2 == 20
        stopped = [row["policy/steps_taken"] for row in wanted["rows"]]
        assert name == "adapters" or 0 < min(stopped) < 1, "minibatches of cut responses alone, or a policy that moved too far"
        got, other = (torch.load(tmp_path / f"{name}_{rank}.pt", weights_only=False) for rank in (0, 1))
        assert got["rows"] == other["rows"]
        close(wanted, got)
        assert got["weights"].keys() == wanted["weights"].keys()
        for key, x in wanted["weights"].items():
            torch.testing.assert_close(got["weights"][key], x, atol=1e-5, rtol=0, msg=f"{name}: {key}")

    second = learn(one, batches[3:])
    seconds = [torch.load(tmp_path / f"second_{rank}.pt", weights_only=False) for rank in (0, 1)]
    close(second, seconds[0])  # one process saved, two went on
    same_weights(one, load(tmp_path / "by_one_then_two", ALONE))
    close(second, learn(two, batches[3:]))  # two saved, one went on
    same_weights(one, two)
    assert seconds[0]["said"] == seconds[1]["said"]
    assert "5 rollouts are not a multiple of the number of ranks, 2" in seconds[0]["said"][0]
    assert seconds[0]["said"][1].endswith("False") and seconds[0]["said"][2].endswith("True")
    assert "nan" in seconds[0]["said"][3]
