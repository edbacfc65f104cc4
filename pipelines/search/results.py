"""What came out of a search: the best, the front of accuracy and cost, what decided, and what it took."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass

import optuna
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import records, storage
from pipelines.search.space import Space, describe_geometry, model_settings
from pipelines.search.trials import CONFIRM, Book, Prepare, Search, Trial, chosen_few
from pipelines.training.config import RESULT, SCORE, Metrics
from pipelines.training.trainer import read_result


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a sweep took. Hours are those that its workers and their decoding had reserved."""

    clips: int
    cpu_hours: float
    gpu_hours: float
    saved_clips: int  # that stopped trials would have seen

    @property
    def saved_share(self) -> float:
        """Of the clips that all trials at full length would have seen."""
        return self.saved_clips / max(1, self.clips + self.saved_clips)


def count_cost(book: Book, search: Search) -> Cost:
    """Over all trials, without the confirmations."""
    scale, trials = search.scale, list(book.trials.values())
    hours = sum(trial.seconds for trial in trials) / 3600
    data_cpus = scale.data_cpus or 0.0
    full = max((trial.clips for trial in book.finished()), default=0)
    return Cost(
        clips=sum(trial.clips for trial in trials),
        cpu_hours=hours * (scale.num_workers * scale.cpus_per_worker + data_cpus),
        gpu_hours=hours * scale.num_workers * scale.use_gpu,
        saved_clips=sum(full - trial.clips for trial in trials if trial.state == "stopped"),
    )


def confirmed_scores(book: Book, trial: Trial) -> list[float]:
    """Top-1 of a trial and of those of its seeds that are trained."""
    scores = [trial.score] if trial.score is not None else []
    seed = 1
    while storage.exists(storage.join(_confirmation(book, trial, seed), "result.json")):
        scores.append(float(read_result(_confirmation(book, trial, seed)).metrics[SCORE]))
        seed += 1
    return scores


def _confirmation(book: Book, trial: Trial, seed: int) -> str:
    return storage.join(book.output, CONFIRM, f"{trial.id}-seed-{seed}")


def find_front(trials: Iterable[Trial]) -> list[Trial]:
    """Finished trials that no other beats in top-1 at no higher cost, from the cheapest on."""
    front: list[Trial] = []
    scored = [trial for trial in trials if trial.state == "finished" and trial.score is not None]
    for trial in sorted(scored, key=lambda trial: (trial.gflops, trial.rank)):
        if not front or _score(trial) > _score(front[-1]):
            front.append(trial)
    return front


def _score(trial: Trial) -> float:
    assert trial.score is not None
    return trial.score


def rank_importance(book: Book, space: Space) -> dict[str, float]:
    """How much each choice decides about the top-1 of finished trials (PED-ANOVA, Watanabe et al. 2023); the most
    first, none where there are too few to tell."""
    trials = book.finished()
    if len({trial.score for trial in trials}) < 2:
        return {}
    study = optuna.create_study(direction="maximize")
    distributions = space.distributions()
    for trial in trials:
        study.add_trial(
            optuna.trial.create_trial(params=trial.geometry, distributions=distributions, value=trial.score)
        )
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A trial in the table: its scores are those of all its seeds."""

    trial: Trial
    scores: list[float]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.scores)

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds; None of one."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else None

    def describe(self) -> Metrics:
        """As it stands in result.json."""
        trial = self.trial
        facts = {"id": trial.id, "number": trial.number, "geometry": trial.geometry, "gflops": trial.gflops}
        return {**facts, "settings": model_settings(trial.geometry), "top1": self.mean, "seeds": self.scores}

    def format(self) -> str:
        """A line of the table."""
        spread = f" ± {self.spread:.1%} of {len(self.scores)} seeds" if self.spread is not None else ""
        text = describe_geometry(self.trial.geometry)
        return (
            f"top-1 {self.mean:.1%}{spread}, {self.trial.gflops:.2f} GFLOPs a video: {text} (trial {self.trial.number})"
        )


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The best, by the mean over seeds where there are some; the paper's, None where it failed; the front; the cost."""

    best: Entry
    paper: Entry | None
    front: list[Entry]
    cost: Cost
    importance: Mapping[str, float]


def conclude(book: Book, search: Search, *, num_best: int) -> Outcome | None:
    """What the finished trials say; None where none has finished."""
    if not book.finished():
        return None
    entries = {trial.id: Entry(trial=trial, scores=confirmed_scores(book, trial)) for trial in book.finished()}
    candidates = [entries[trial.id] for trial in chosen_few(book, num_best)]
    return Outcome(
        best=max(candidates, key=lambda entry: (entry.mean, [-part for part in entry.trial.rank])),
        paper=entries.get(book.paper),
        front=[entries[trial.id] for trial in find_front(book.trials.values())],
        cost=count_cost(book, search),
        importance=rank_importance(book, search.space),
    )


def write_outcome(book: Book, outcome: Outcome, prepare: Prepare) -> None:
    """sweep.parquet, then result.json."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(list(iter_rows(book, prepare))), sink)
    storage.put(storage.join(book.output, "sweep.parquet"), sink.getvalue().to_pybytes())
    found = {
        "best": outcome.best.describe(),
        "paper": outcome.paper.describe() if outcome.paper else None,
        "front": [entry.describe() for entry in outcome.front],
        "cost": asdict(outcome.cost) | {"saved_share": outcome.cost.saved_share},
        "importance": dict(outcome.importance),
    }
    storage.put(storage.join(book.output, RESULT), records.encode(found))


def iter_rows(book: Book, prepare: Prepare) -> Iterator[Metrics]:
    """What sweep.parquet holds of each trial."""
    for trial in book.trials.values():
        configuration = json.dumps(prepare(trial.geometry, 0).run.describe(), sort_keys=True)
        columns = {name: value for name, value in asdict(trial).items() if name not in ("geometry", "curve")}
        curve = [{**report, "step": int(report["step"]), "clips": int(report["clips"])} for report in trial.curve]
        yield {
            **columns,
            **trial.geometry,
            "paper": trial.id == book.paper,
            "step": trial.step,
            "clips": trial.clips,
            SCORE: trial.score,
            "seeds": confirmed_scores(book, trial) if trial.state == "finished" else [],
            "curve": curve,
            "configuration": configuration,
        }
