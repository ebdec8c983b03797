"""Typed handles of the five roles, and the placement group that they run in."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.config import Share
from actors.demand import Request
from actors.learner import Example, PolicyLearner
from actors.preparer import Preparer, Recipe
from actors.process import Identity, ProcessSetup, engine_environment, environment
from actors.ranks import Meeting
from actors.reward_trainer import Groups, RewardReport, RewardTrainer, Study
from actors.rollout import RolloutEngine
from actors.scorer import EnsembleScorer, Scores
from actors.seats import Seat
from actors.transfer import Parcels, TransferSetup
from cluster.config import RunConfig
from cluster.growth import UNKNOWN, RoomFor, growth
from cluster.placement import placed, weight_transfer
from cluster.plan import Bundle
from cluster.pool import FixedPool, PhaseRota, RolloutPool, elastic_pool
from cluster.preflight import refuse_namesake
from cluster.rota import OwnDevices, Process, Rota, SharedDevice
from cluster.signals import obey_termination
from cluster.sync import DELIVERIES, Sync, together
from cluster.waiting import POLL_S, Pending, Waiter
from policy.config import DPOConfig
from rm.config import RewardConfig
from tokens.errors import UserError
from tokens.records import Pair, Rollout


def _only(answers: list[Any]) -> Any:
    return answers[0]


def _ask(process: Process, method: Any, *arguments: Any) -> Pending[Any]:
    return Pending((method.remote(*arguments),), (process.identity.name,), (process.identity.node,), _only, (process.actor,))


def _ask_all(ranks: Sequence[Process], submit: Callable[[Any], Any]) -> Pending[Any]:
    """The same call to every rank; rank 0's answer is the role's."""
    return Pending(
        tuple(submit(rank.actor) for rank in ranks),
        tuple(rank.identity.name for rank in ranks),
        tuple(rank.identity.node for rank in ranks),
        _only,
        (ranks[0].actor,),
    )


class Ranked:
    """Processes that share one model.

    Args:
        ranks: in order of their rank.
        timeout_s: longest wait of one rank for another.
        rota: of the devices.
    """

    def __init__(self, ranks: Sequence[Process], timeout_s: float, rota: Rota) -> None:
        self.ranks, self.timeout_s, self.rota = ranks, timeout_s, rota

    def open(self) -> Pending[Meeting]:
        """Ask rank 0 where to meet."""
        return _ask(self.ranks[0], self.ranks[0].actor.open, self.timeout_s)

    def join(self, meeting: Meeting) -> Pending[None]:
        """Bring the ranks together."""
        return _ask_all(self.ranks, lambda actor: actor.join.remote(meeting, self.timeout_s))


class RewardHandle(Ranked):
    """The reward trainer, one process or several ranks."""

    def fit(self, out_dir: Path, seed: int, previous: Path | None, shifted: Sequence[Rollout] | None) -> Pending[RewardReport]:
        """Train a reward model into ``out_dir``; with MetaRM where ``shifted`` (S_k) is given."""
        moves = self.rota.turn("reward")
        return moves.before(_ask_all(self.ranks, lambda actor: actor.fit.remote(out_dir, seed, previous, shifted)))

    def study(self, out_dir: Path | None, seed: int, shifted: Groups, meta: bool, num_featured: int) -> Pending[Study]:
        """Train a reward model and look at it closely; see ``RewardTrainer.study``."""
        return _ask_all(self.ranks, lambda actor: actor.study.remote(out_dir, seed, shifted, meta, num_featured))


class ScorerHandle:
    """The ensemble scorer."""

    def __init__(self, process: Process, rota: Rota) -> None:
        self.process, self.rota = process, rota

    def calibrate_on(self, rollouts: Sequence[Rollout]) -> Pending[None]:
        """Hand over the SFT policy's samples, before the members are loaded."""
        return _ask(self.process, self.process.actor.calibrate_on, rollouts)

    def load(self, member: int, model_dir: Path) -> Pending[None]:
        """Load or replace a member; 0 is r_k."""
        moves = self.rota.turn("scorer")
        return moves.before(_ask(self.process, self.process.actor.load, member, model_dir))

    def score(self, rollouts: Sequence[Rollout]) -> Pending[Scores]:
        """Score rollouts with every member."""
        moves = self.rota.turn("scorer")
        return moves.before(_ask(self.process, self.process.actor.score, rollouts))


class LearnerHandle(Ranked):
    """The policy learner, one process or several ranks."""

    def _all(self, submit: Callable[[Any], Any]) -> Pending[Any]:
        moves = self.rota.turn("learner")
        return moves.before(_ask_all(self.ranks, submit))

    def load(self, engines: RolloutPool, saved: Path | None, critic_base: Path) -> Pending[None]:
        """Load the models, once the ranks are together, and meet the engines; see ``restore``."""
        return self._all(lambda actor: actor.load.remote(engines.actors, saved, critic_base))

    def restore(self, saved: Path | None, critic_base: Path) -> Pending[None]:
        """Be where a save left the learner (None: where it begins), in the process that there is.

        Args:
            saved: what ``save`` wrote.
            critic_base: with adapters, what those of a saved critic were trained on.
        """
        return self._all(lambda actor: actor.restore.remote(saved, critic_base))

    def begin_round(
        self, index: int, calibration: Sequence[float] | None, critic: Path | None, policy: Path | None, reference: Path | None
    ) -> Pending[None]:
        """Set critic, policy, reference and the reward moments where they are given."""
        return self._all(lambda actor: actor.begin_round.remote(index, calibration, critic, policy, reference))

    def warm_up(self, rollouts: Sequence[Rollout], scores: Sequence[float], steps: int) -> Pending[float]:
        """Update the critic alone."""
        return self._all(lambda actor: actor.warm_up.remote(rollouts, scores, steps))

    def update(self, rollouts: Sequence[Rollout], scores: Sequence[float]) -> Pending[dict[str, float]]:
        """One PPO update."""
        return self._all(lambda actor: actor.update.remote(rollouts, scores))

    def prefer(self, pairs: Sequence[Pair], dpo: DPOConfig, out_dir: Path, seed: int) -> Pending[list[dict[str, float]]]:
        """Train the policy by DPO, from SFT, and save it."""
        return self._all(lambda actor: actor.prefer.remote(pairs, dpo, out_dir, seed))

    def send(self, after: Sequence[Any]) -> Pending[Parcels]:
        """Send the policy's weights, or lay them out; they go from learner to engines without passing the driver.

        Args:
            after: references that must be there first.
        """
        return _ask_all(self.ranks, lambda actor: actor.send.remote(*after))

    def statistics(self, rollouts: Sequence[Rollout]) -> Pending[tuple[tuple[float, ...], tuple[float, ...]]]:
        """Log-probability of each response under the policy and under SFT."""
        return self._all(lambda actor: actor.statistics.remote(rollouts))

    def save(self, out_dir: Path) -> Pending[None]:
        """Save policy, critic and state."""
        return self._all(lambda actor: actor.save.remote(out_dir))


@dataclass(frozen=True)
class Roles:
    """The five roles but the driver."""

    rollout: RolloutPool
    reward: RewardHandle
    scorer: ScorerHandle
    learner: LearnerHandle
    identities: tuple[Identity, ...]
    rota: Rota
    deliver: Callable[[Pending[Parcels]], Any]
    """What the engines are handed, from the learner's sending."""

    def sync(self, wait: Waiter, version: int) -> Sync:
        """Give the engines the learner's weights, as policy ``version``."""
        began = time.perf_counter()
        moves = self.rota.meet()
        sending = self.learner.send(moves.refs)
        loading = self.rollout.load(self.deliver(sending), version, moves.refs)
        parcels = wait("sync", moves.before(together(sending, loading)))
        return Sync(time.perf_counter() - began, parcels.num_bytes)


class Stage:
    """The placement group and the actors in it.

    Args:
        config: of the run.
        bundles: the processes, and what each needs.
        logs: directory of log files.
        say: prints a line.
        fixed: True on a cluster of one node that cannot grow: what does not fit is an error at once, and labels mean nothing.
    """

    def __init__(self, config: RunConfig, bundles: Sequence[Bundle], logs: Path, say: Callable[[str], None], fixed: bool) -> None:
        placement = placed(config, [replace(bundle, labels={}) for bundle in bundles] if fixed else bundles)
        self.config, self.bundles, self.seats, self.logs, self.say = config, placement.bundles, placement.seats, logs, say
        self.actors: list[Any] = []
        self.closing: list[Callable[[], None]] = []
        self.growth = UNKNOWN if fixed else growth()
        self.fixed, self.group_name = fixed, f"rondo-{config.name}"
        if fixed:
            self._refuse_what_cannot_fit()
        else:
            self.growth.refuse_what_cannot_fit(self.bundles)
            unseen = self.growth.unseen(self.bundles)
            if unseen is not None:
                say(f"[yellow]note[/] {unseen}")
            refuse_namesake(config.name, self.group_name, say)
        self.asked = [self.growth.asked(bundle) for bundle in self.bundles]
        self.selectors = [dict(bundle.labels) for bundle in self.bundles]
        self.group: PlacementGroup = placement_group(
            self.asked,
            strategy="PACK",
            name=self.group_name,
            bundle_label_selector=self.selectors if any(self.selectors) else None,
        )

    def _refuse_what_cannot_fit(self) -> None:
        there = ray.cluster_resources()
        for key in ("CPU", "GPU"):
            asked = sum(bundle.resources.get(key, 0.0) for bundle in self.bundles)
            held = there.get(key, 0.0)
            if asked > held + 1e-9:
                raise UserError(
                    f"this machine has {held:g} {key}, the run asks for {asked:g}: lower resources.*.num_{key.lower()}s "
                    f"or rollout.num_engines, or connect to a larger cluster. `python -m cluster plan CONFIG` shows the shares"
                )

    def num_gpus(self) -> float:
        """GPUs of the placement group."""
        return sum(bundle.num_gpus for bundle in self.bundles)

    def wait_for_room(self) -> None:
        """Wait for the placement group; every 30 s say which bundles are short, and of what.

        Raises:
            UserError: when ``resources.wait_limit_s`` has passed.
            SystemExit: if SIGTERM has come.
        """
        room = RoomFor(self.say, self.bundles, self.config.resources.wait_limit_s, self.growth)
        ready = self.group.ready()
        while not ray.wait([ready], timeout=POLL_S)[0]:
            obey_termination()
            room.look(waiting=True)

    def nodes(self) -> list[str]:
        """Ids of the nodes that the processes got, once there is room; none on a cluster that is this machine alone."""
        if self.fixed:
            return []
        return sorted(set(placement_group_table(self.group)["bundles_to_node_id"].values()))

    def _share(self, role: str) -> Share:
        shares = self.config.resources
        return {"rollout": shares.rollout, "reward": shares.reward, "scorer": shares.scorer, "learner": shares.learner}[role]

    def _spawn(self, actor_class: Any, role: str, rank: int, bundle_of: str, *arguments: Any) -> Any:
        seat = self.seats[f"{bundle_of}-{rank}"]
        place = {
            "num_gpus": seat.num_gpus,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=seat.bundle),
        }
        options, setup = self._order(role, rank, bundle_of)
        actor = actor_class.options(**options, **place).remote(setup, *arguments)
        self.actors.append(actor)
        return actor

    def _order(self, role: str, rank: int, bundle_of: str) -> tuple[dict[str, Any], ProcessSetup]:
        """What Ray and the process are told, wherever it runs."""
        share = self._share(bundle_of)
        setup = ProcessSetup(
            name=f"{role}-{rank}",
            log_path=self.logs / f"{role}-{rank}.log",
            threads=share.threads,
            device="cuda" if share.num_gpus else "cpu",
            dtype=share.dtype,
            rank=rank,
            num_ranks=share.num_ranks,
            recompute_activations=share.recompute_activations,
            offload=share.offload,
            shares_device=self.config.resources.placement == "colocated",
        )
        variables = engine_environment if role == "rollout" else environment
        options = {
            "name": f"{self.config.name}/{setup.name}",
            "num_cpus": share.num_cpus,
            "runtime_env": {"env_vars": variables(setup, self.config.data.allow_hub)},
        }
        return options, setup

    def prepare(self, recipe: Recipe, place: str = "learner") -> tuple[Any, Pending[Path]]:
        """Run a recipe in a role's place. The actor must be released before the role starts."""
        actor = self._spawn(Preparer, "preparer", 0, place)
        return actor, Pending((actor.make.remote(recipe),), ("preparer-0",), ("",), _only, (actor,))

    def release(self, actor: Any) -> None:
        """End an actor."""
        self.actors.remove(actor)
        ray.kill(actor)

    def start(
        self,
        sft_dir: Path,
        base_dir: Path,
        pairs: Sequence[Pair],
        validation: Mapping[str, Sequence[Pair]],
        ptx: Sequence[Example],
        max_model_len: int,
    ) -> Pending[Roles]:
        """Start the four roles' processes.

        Args:
            sft_dir: the SFT model, with its tokenizer.
            base_dir: what reward models start from.
            pairs: D.
            validation: held-out pairs by the name of their set.
            ptx: texts of PPO's language-modelling loss; may be none.
            max_model_len: longest prompt + response, tokens.

        Returns:
            The roles, once every process answers.
        """
        config = self.config
        backend = weight_transfer(config)
        limit_s = config.resources.deadline_s
        transfer = TransferSetup(backend, config.resources.rollout.dtype, config.rollout.sync_chunk_mib << 20, limit_s)
        engine = (sft_dir, config.rollout, max_model_len, transfer)
        actors = [self._spawn(RolloutEngine, "rollout", i, "rollout", *engine) for i in range(config.rollout.num_engines)]
        shares = config.resources
        actors += self._trainers(base_dir, pairs, validation, config.reward)
        actors.append(self._spawn(EnsembleScorer, "scorer", 0, "scorer", config.scorer))
        learner = (config.policy, config.rollout.temperature, sft_dir, config.seed, transfer, ptx)
        actors += [self._spawn(PolicyLearner, "learner", i, "learner", *learner) for i in range(shares.learner.num_ranks)]
        counts = {
            "rollout": config.rollout.num_engines,
            "reward": shares.reward.num_ranks,
            "scorer": 1,
            "learner": shares.learner.num_ranks,
        }
        names = tuple(f"{role}-{i}" for role, count in counts.items() for i in range(count))

        def combine(identities: list[Identity]) -> Roles:
            started = iter(Process(a, i) for a, i in zip(actors, identities, strict=True))
            of = {role: list(islice(started, count)) for role, count in counts.items()}
            pool, rota = self._pool(of, engine)
            return Roles(
                pool,
                RewardHandle(of["reward"], limit_s, rota),
                ScorerHandle(of["scorer"][0], rota),
                LearnerHandle(of["learner"], limit_s, rota),
                tuple(identities),
                rota,
                DELIVERIES[backend],
            )

        return Pending(tuple(actor.identity.remote() for actor in actors), names, ("",) * len(names), combine)

    def _pool(self, of: Mapping[str, Sequence[Process]], engine: tuple[Any, ...]) -> tuple[RolloutPool, Rota]:
        """The engines as the config wants them, and who moves when."""
        config, most = self.config, self.config.rollout.max_engines
        if most is None:
            rota: Rota = SharedDevice(of) if config.resources.placement == "colocated" else OwnDevices()
            return FixedPool(of["rollout"], rota), rota
        seats = [self._engine_seat(i, engine) for i in range(most)]
        mine = self.seats["rollout-0"].bundle
        more = [mine] * (most - config.rollout.num_engines)
        bundles = [*range(len(self.bundles)), *more]
        request = Request(tuple(self.asked[i] for i in bundles), tuple(self.selectors[i] for i in bundles))
        pool = elastic_pool(config, seats, of["rollout"], request, self.logs, self.say)
        self.actors.append(pool.actor)
        self.closing.append(pool.close)
        return pool, PhaseRota(pool)

    def _engine_seat(self, rank: int, engine: tuple[Any, ...]) -> Seat:
        """A place for an engine: the first ones in the placement group, the others wherever there is room of the same kind."""
        extra = rank >= self.config.rollout.num_engines
        seat = self.seats[f"rollout-{0 if extra else rank}"]
        options, setup = self._order("rollout", rank, "rollout")
        name = options.pop("name")
        inside = PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=seat.bundle)
        place: dict[str, Any] = {"scheduling_strategy": inside}
        if extra:
            labels, asked = self.selectors[seat.bundle], self.asked[seat.bundle]
            marks = {key: amount for key, amount in asked.items() if key not in ("CPU", "GPU")}
            place = ({"label_selector": labels} if labels else {}) | ({"resources": marks} if marks else {})
        return Seat(setup.name, extra, name, RolloutEngine, {**options, "num_gpus": seat.num_gpus, **place}, (setup, *engine))

    def _trainers(
        self, base_dir: Path, pairs: Sequence[Pair], validation: Mapping[str, Sequence[Pair]], reward: RewardConfig
    ) -> list[Any]:
        arguments = (pairs, validation, reward, self.config.meta, base_dir)
        return [
            self._spawn(RewardTrainer, "reward", i, "reward", *arguments) for i in range(self.config.resources.reward.num_ranks)
        ]

    def start_reward(
        self, base_dir: Path, pairs: Sequence[Pair], validation: Mapping[str, Sequence[Pair]], reward: RewardConfig
    ) -> Pending[RewardHandle]:
        """Start the reward trainer alone; the arguments are those of ``start``, and how to fit.

        Returns:
            Its handle, once every rank answers.
        """
        actors = self._trainers(base_dir, pairs, validation, reward)
        names = tuple(f"reward-{i}" for i in range(len(actors)))

        def combine(identities: list[Identity]) -> RewardHandle:
            ranks = [Process(actor, identity) for actor, identity in zip(actors, identities, strict=True)]
            return RewardHandle(ranks, self.config.resources.deadline_s, OwnDevices())

        return Pending(tuple(actor.identity.remote() for actor in actors), names, ("",) * len(names), combine)

    def close(self) -> None:
        """End every actor and give the room back."""
        for close in self.closing:
            close()
        for actor in self.actors:
            ray.kill(actor)
        remove_placement_group(self.group)
