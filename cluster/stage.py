"""The placement group, and the actors of the roles in it."""

from __future__ import annotations

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
from actors.reward_trainer import RewardTrainer
from actors.rollout import RolloutEngine
from actors.scorer import EnsembleScorer
from actors.seats import Seat
from actors.transfer import TransferSetup
from cluster.config import RunConfig
from cluster.fixed_pool import FixedPool
from cluster.growth import UNKNOWN, RoomFor, growth
from cluster.placement import placed, weight_transfer
from cluster.plan import Bundle
from cluster.pool import PhaseRota, RolloutPool, elastic_pool
from cluster.preflight import refuse_namesake
from cluster.roles import Ensemble, LearnerHandle, RewardHandle, Roles, ScorerHandle, only
from cluster.rota import OwnDevices, Process, Rota, SharedDevice
from cluster.signals import obey_termination
from cluster.sync import DELIVERIES
from cluster.waiting import POLL_S, Pending, Room
from rm.config import RewardConfig
from tokens.errors import UserError
from tokens.records import Pair


@dataclass(frozen=True)
class _Order:
    """What was asked for in a process's place."""

    actor_class: Any
    role: str
    rank: int
    bundle_of: str
    arguments: tuple[Any, ...]


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
        self.orders: dict[str, _Order] = {}
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
        order = self.orders[f"{role}-{rank}"] = _Order(actor_class, role, rank, bundle_of, arguments)
        return self._carry_out(order, 1)

    def _carry_out(self, order: _Order, incarnation: int, spare: bool = False) -> Any:
        seat = self.seats[f"{order.bundle_of}-{order.rank}"]
        inside = PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=seat.bundle)
        place = {"num_gpus": seat.num_gpus} | (self._anywhere(seat.bundle) if spare else {"scheduling_strategy": inside})
        options, setup = self._order(order.role, order.rank, order.bundle_of, incarnation)
        if spare:
            options["name"] += ".spare"
        actor = order.actor_class.options(**options, **place).remote(setup, *order.arguments)
        self.actors.append(actor)
        return actor

    def respawn(self, process: Process, incarnation: int) -> None:
        """Ask for another process in the place of one that is dead, or is ended by this.

        It is given the same bundle, which Ray moves to another node when its own is gone.

        Args:
            process: whose actor is replaced; node and process id are known when it is up.
            incarnation: of the new one.
        """
        self.release(process.actor)
        process.actor = self._carry_out(self.orders[process.identity.name], incarnation)
        process.identity = Identity(process.identity.name, 0, "", incarnation)

    def spare(self, name: str, incarnation: int) -> Any:
        """Ask for a process that may take over a place, outside of the group: its bundle stays on its node until that has gone.

        Args:
            name: of the place.
            incarnation: of the process, if it takes over.
        """
        return self._carry_out(self.orders[name], incarnation, spare=True)

    def take_over(self, process: Process, spare: Any, incarnation: int) -> None:
        """Put a spare process in the place of one, which is ended.

        Args:
            process: whose actor is replaced.
            spare: that takes over.
            incarnation: of it.
        """
        self.release(process.actor)
        process.actor, process.identity = spare, Identity(process.identity.name, 0, "", incarnation)

    def _anywhere(self, bundle: int) -> dict[str, Any]:
        """How Ray is told to put an actor wherever there is room of the kind of a bundle."""
        labels, asked = self.selectors[bundle], self.asked[bundle]
        marks = {key: amount for key, amount in asked.items() if key not in ("CPU", "GPU")}
        return ({"label_selector": labels} if labels else {}) | ({"resources": marks} if marks else {})

    def room(self, name: str) -> Room:
        """A wait for room for one process."""
        bundle = self.bundles[self.seats[name].bundle]
        return RoomFor(self.say, [bundle], None, self.growth)

    def _order(self, role: str, rank: int, bundle_of: str, incarnation: int = 1) -> tuple[dict[str, Any], ProcessSetup]:
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
            incarnation=incarnation,
        )
        variables = engine_environment if role == "rollout" else environment
        options = {
            "name": f"{self.config.name}/{setup.name}" + (f".{incarnation}" if incarnation > 1 else ""),
            "num_cpus": share.num_cpus,
            "runtime_env": {"env_vars": variables(setup, self.config.data.allow_hub)},
        }
        return options, setup

    def prepare(self, recipe: Recipe, place: str = "learner") -> tuple[Any, Pending[Path]]:
        """Run a recipe in a role's place. The actor must be released before the role starts."""
        actor = self._spawn(Preparer, "preparer", 0, place)
        return actor, Pending((actor.make.remote(recipe),), ("preparer-0",), ("",), only, (actor,))

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
        actors += [self._spawn(EnsembleScorer, "scorer", i, "scorer", config.scorer) for i in range(shares.scorer.num_ranks)]
        learner = (config.policy, config.rollout.temperature, sft_dir, config.seed, transfer, ptx, config.guards)
        actors += [self._spawn(PolicyLearner, "learner", i, "learner", *learner) for i in range(shares.learner.num_ranks)]
        counts = {
            "rollout": config.rollout.num_engines,
            "reward": shares.reward.num_ranks,
            "scorer": shares.scorer.num_ranks,
            "learner": shares.learner.num_ranks,
        }
        names = tuple(f"{role}-{i}" for role, count in counts.items() for i in range(count))

        def combine(identities: list[Identity]) -> Roles:
            processes = tuple(Process(a, i) for a, i in zip(actors, identities, strict=True))
            started = iter(processes)
            of = {role: list(islice(started, count)) for role, count in counts.items()}
            pool, rota = self._pool(of, engine)
            return Roles(
                pool,
                RewardHandle(of["reward"], limit_s, rota),
                ScorerHandle(of["scorer"], rota, Ensemble(), config.scorer, config.guards),
                LearnerHandle(of["learner"], limit_s, rota),
                processes,
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
            place = self._anywhere(seat.bundle)
        return Seat(setup.name, extra, name, RolloutEngine, {**options, "num_gpus": seat.num_gpus, **place}, (setup, *engine))

    def _trainers(
        self, base_dir: Path, pairs: Sequence[Pair], validation: Mapping[str, Sequence[Pair]], reward: RewardConfig
    ) -> list[Any]:
        given = self.config.scorer.reward_model is not None
        arguments = (pairs, validation, reward, self.config.meta, base_dir, self.config.guards, given)
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
