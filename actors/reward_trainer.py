"""The reward trainer: fits a reward model on D, with MetaRM on S_k where it is given."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from actors.fit_saves import FitSaves
from actors.process import STATUS_GROUP, ProcessSetup
from actors.ranks import Rank
from rm.config import MetaConfig, RewardConfig
from tokens.guards import GuardsConfig
from tokens.records import Pair, Rollout

if TYPE_CHECKING:
    from rm.batches import Encoded
    from rm.model import RewardModel
    from rm.resume import Saves

log = logging.getLogger(__name__)

Groups = Sequence[Sequence["Encoded"]]
"""S_k as the trainer takes it: for each prompt its k (prompt ids, response ids)."""


@dataclass(frozen=True)
class RewardReport:
    """What a fit came to.

    Args:
        summary: means over its last quarter, by the ledger's names.
        steps: metrics of each step, by name.
        measurements: of the validation sets while it went on: the step, and metrics by name; none unless they were asked for.
        validation_accuracy: of the weights that were kept, on held-out pairs; None where there are none, and where what was
            kept is one backbone for the adapters of many domains: what scores is never the backbone alone.
    """

    summary: dict[str, float | None]
    steps: tuple[dict[str, float], ...]
    measurements: tuple[tuple[int, dict[str, float]], ...]
    validation_accuracy: float | None


@dataclass(frozen=True)
class ScoredPair:
    """Scores of one validation pair.

    Args:
        set: the validation set.
        id: of the pair.
        chosen: score of the chosen response.
        rejected: score of the other.
    """

    set: str
    id: str
    chosen: float
    rejected: float


@dataclass(frozen=True, eq=False)
class Feature:
    """What the head reads of one response.

    Args:
        id: of the pair.
        side: chosen or rejected.
        vector: [H] float32.
    """

    id: str
    side: str
    vector: np.ndarray


@dataclass(frozen=True)
class Study:
    """A fit and what the model that was kept says.

    Args:
        report: of the fit.
        validation: metrics of the validation sets; empty where there are none.
        scores: of the validation pairs.
        features: of the first pairs of the first set.
        shifted: scores of S_k, in the order given.
        seconds: that the fit took, with the measurements in it.
    """

    report: RewardReport
    validation: dict[str, float]
    scores: tuple[ScoredPair, ...]
    features: tuple[Feature, ...]
    shifted: tuple[float, ...]
    seconds: float


@ray.remote(concurrency_groups=STATUS_GROUP)
class RewardTrainer(Rank):
    """Holds the pairs; the model and its optimizer live for one fit. Several ranks share the model, and each holds all pairs."""

    about = "trains reward models"

    def __init__(
        self,
        setup: ProcessSetup,
        pairs: Sequence[Pair],
        validation: Mapping[str, Sequence[Pair]],
        reward: RewardConfig,
        meta: MetaConfig,
        base_dir: Path,
        guards: GuardsConfig,
        given: bool,
    ) -> None:
        """Take what every fit needs.

        Args:
            setup: of the process.
            pairs: D.
            validation: held-out pairs by the name of their set; early stopping goes by the accuracy on ``reward.stop_on``.
            reward: how to fit.
            meta: MetaRM.
            base_dir: language model, encoder or reward model to start from, with its tokenizer.
            guards: how many steps whose numbers went wrong a fit may leave out.
            given: ``base_dir`` is a reward model that is handed on as it is: a fit takes no step.
        """
        super().__init__(setup)
        from transformers import AutoTokenizer

        from rm.domain_config import ADAPTERS

        self.pairs, self.validation = pairs, {name: pairs for name, pairs in validation.items() if pairs}
        self.reward, self.meta = reward, meta
        self.base_dir, self.guards = base_dir, guards
        self.tokenizer = AutoTokenizer.from_pretrained(base_dir)
        self.make, self.keep = (self._hand_on, self._copy) if given else (self._train, self._save)
        self.measurable = not (given and (base_dir / ADAPTERS).is_dir())

    def fit(
        self,
        out_dir: Path,
        seed: int,
        previous: Path | None,
        shifted: Sequence[Rollout] | None,
        saves: FitSaves | None = None,
        pairs: Sequence[Pair] | None = None,
    ) -> RewardReport:
        """Train one reward model and save it as a Hugging Face directory.

        Args:
            out_dir: to save to.
            seed: of the head and of the order of the data.
            previous: reward model to continue from; None = ``base_dir``.
            shifted: S_k, k rollouts a prompt; None trains a vanilla model.
            saves: where it is saved how far the fit has come, and gone on from there; None = nowhere.
            pairs: to learn from; None = D.

        Returns:
            The report.
        """
        from rm.config import ORIGINAL

        groups = None if shifted is None else group_by_prompt(shifted)
        model, report = self.make(seed, previous, groups, saves, self.pairs if pairs is None else pairs)
        if self.validation and self.measurable:
            with self.compute():
                accuracy = self._score(model, {ORIGINAL: self.validation[ORIGINAL]})[ORIGINAL].accuracy
            report = replace(report, validation_accuracy=accuracy)
        self.keep(model, out_dir)
        log.info("%s: fitted %s, validation accuracy %s", self.setup.name, out_dir, report.validation_accuracy)
        return report

    def study(
        self, out_dir: Path | None, seed: int, shifted: Groups, meta: bool, num_featured: int, saves: FitSaves | None = None
    ) -> Study:
        """Train one reward model and look at it closely.

        Args:
            out_dir: to save to; None = it is not kept.
            seed: of the head and of the order of the data.
            shifted: samples to score, a list for each prompt; may be none.
            meta: True trains by MetaRM on them.
            num_featured: pairs whose features are wanted.
            saves: as in ``fit``.

        Returns:
            The study; its seconds are those of this process.
        """
        from rm.batches import score_sequences
        from rm.validation import measure

        began = time.perf_counter()
        model, report = self._train(seed, None, shifted if meta else None, saves, self.pairs)
        seconds = time.perf_counter() - began
        with self.compute():
            sets = self._score(model, self.validation) if self.validation else {}
            validation = measure(sets) if sets else {}
            features = self._features(model, num_featured)
            flat = [sequence for group in shifted for sequence in group]
            scores = score_sequences(model, flat, self.reward.microbatch_size, self.tokenizer.pad_token_id, self.ranks)
        if out_dir is not None:
            self._save(model, out_dir)
        rows = tuple(
            ScoredPair(name, *row)
            for name, scored in sets.items()
            for row in zip(scored.ids, scored.chosen.tolist(), scored.rejected.tolist(), strict=True)
        )
        return Study(report, validation, rows, features, tuple(scores.tolist()), seconds)

    def _train(
        self, seed: int, previous: Path | None, groups: Groups | None, saves: FitSaves | None, pairs: Sequence[Pair]
    ) -> tuple[RewardModel, RewardReport]:
        import torch

        from rm.lora import add_lora
        from rm.model import RewardModel
        from rm.records import RewardStep
        from rm.training import Watch, fit_reward_model
        from rm.validation import measure

        reward, pad_id = self.reward, self.tokenizer.pad_token_id
        start = previous or self.base_dir
        model = RewardModel.from_any(start, pooling=reward.pooling, seed=seed, dtype=torch.float32, pad_id=pad_id)
        if reward.lora.rank:
            add_lora(model, reward.lora, seed=seed)
        self.place(model)
        total = reward.epochs * -(-len(pairs) // reward.batch_size)
        steps: list[dict[str, float]] = []
        measured: list[tuple[int, dict[str, float]]] = []

        def on_step(step: RewardStep) -> None:
            steps.append(step.as_dict())
            self.tick(len(steps) * reward.batch_size, total * reward.batch_size, "pairs")

        def look(step: int) -> float:
            sets = self._score(model, self.validation)
            measured.append((step, measure(sets)))
            accuracy: float = sets[reward.stop_on].accuracy
            return accuracy

        watch = None
        if self.validation and reward.evaluate_every is not None:
            watch = Watch(reward.evaluate_every, look, reward.patience)
        with self.compute():
            fit = fit_reward_model(
                model,
                pairs,
                groups,
                reward,
                self.meta,
                seed=seed,
                pad_id=pad_id,
                on_step=on_step,
                ranks=self.ranks,
                watch=watch,
                saves=None if saves is None else self._saves(saves, (seed, str(previous), groups), pairs, measured),
                guards=self.guards,
            )
        return model, RewardReport(fit.as_dict(), tuple(steps), tuple(measured), None)

    def _hand_on(
        self, seed: int, previous: Path | None, groups: Groups | None, saves: FitSaves | None, pairs: Sequence[Pair]
    ) -> tuple[RewardModel, RewardReport]:
        """The given reward model, and the report of a fit without steps; the arguments are those of a fit, and change nothing."""
        import torch

        from rm.model import RewardModel
        from rm.records import UNTRAINED

        model = self.place(RewardModel.from_pretrained(self.base_dir, torch.float32))
        return model, RewardReport(dict(UNTRAINED), (), (), None)

    def _saves(
        self, saves: FitSaves, inputs: object, pairs: Sequence[Pair], measured: list[tuple[int, dict[str, float]]]
    ) -> Saves:
        """Saving a fit, and what is saved of this very fit already.

        Args:
            saves: where.
            inputs: what the fit is of, beside what this process was made with and its pairs.
            pairs: that it learns from.
            measured: takes the measurements that were made before the save, and is saved as far as it goes.
        """
        whole = (inputs, pairs, self.reward.model_dump(), self.meta.model_dump())
        found = saves.of(whole, self.setup.name, lambda: {"measured": [list(row) for row in measured]}, self.ranks.rank == 0)
        if found.begin is not None:
            measured += [(step, values) for step, values in found.begin.values["measured"]]
        return found

    def _score(self, model: RewardModel, sets: Mapping[str, Sequence[Pair]]) -> Any:
        from rm.validation import score_sets

        return score_sets(model, sets, self.reward.microbatch_size, self.tokenizer.pad_token_id, self.ranks)

    def _features(self, model: RewardModel, number: int) -> tuple[Feature, ...]:
        from rm.batches import pair_sequences
        from rm.heads import sequence_features

        pairs = next(iter(self.validation.values()))[:number] if self.validation else ()
        if not pairs:
            return ()
        batch_size, pad_id = self.reward.microbatch_size, self.tokenizer.pad_token_id
        vectors = sequence_features(model, pair_sequences(pairs), batch_size, pad_id).numpy()
        sides = [(pair.id, side) for side in ("chosen", "rejected") for pair in pairs]
        return tuple(Feature(id_, side, vector) for (id_, side), vector in zip(sides, vectors, strict=True))

    def _copy(self, model: RewardModel, out_dir: Path) -> None:
        if self.ranks.rank == 0:
            shutil.copytree(self.base_dir, out_dir, dirs_exist_ok=True)

    def _save(self, model: RewardModel, out_dir: Path) -> None:
        model.save_pretrained(out_dir, self.ranks)
        if self.ranks.rank == 0:
            self.tokenizer.save_pretrained(out_dir)


def group_by_prompt(rollouts: Sequence[Rollout]) -> Groups:
    """S_k as the trainer takes it.

    Args:
        rollouts: of several samples a prompt.

    Returns:
        One list per prompt, in first-seen order.
    """
    groups: dict[str, list[Encoded]] = {}
    for rollout in rollouts:
        groups.setdefault(rollout.prompt.id, []).append((rollout.prompt.token_ids, rollout.response_ids))
    return list(groups.values())
