"""What came out of a search: the best, the front of accuracy and cost, what decided, and what it took."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace

import optuna
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import records, storage
from pipelines.records import Values
from pipelines.search.records import Cost, Outcome, ScoredTrial, Trial
from pipelines.search.space import Space
from pipelines.search.trials import CONFIRM, Book, Prepare, Search, chosen_few
from pipelines.training.config import SCORE
from pipelines.training.records import RESULT, RunResult

IMPORTANCE_DIGITS = 4


def count_cost(book: Book, search: Search) -> Cost:
    """Over all trials, without the confirmations."""
    scale, trials = search.scale, list(book.trials.values())
    hours = sum(trial.seconds for trial in trials) / 3600
    data_cpus = scale.data_cpus or 0.0
    full = max((trial.clips for trial in book.finished()), default=0)  # what a stopped one would have seen
    return Cost(
        clips=sum(trial.clips for trial in trials),
        cpu_hours=hours * (scale.num_workers * scale.cpus_per_worker + data_cpus),
        gpu_hours=hours * scale.num_workers * scale.use_gpu,
        saved_clips=sum(full - trial.clips for trial in trials if trial.state == "stopped"),
    )


def list_confirmations(book: Book) -> Mapping[str, list[int]]:
    """By trial, the seeds besides the search's own from which it is trained to the end; one that failed is a gap."""
    folder = storage.join(book.output, CONFIRM)
    seeds: defaultdict[str, list[int]] = defaultdict(list)
    # Listed once: to ask for each seed of each trial would be many requests on S3, and would stop at a gap.
    for file in storage.list_files(folder) if storage.is_dir(folder) else ():
        if match := re.fullmatch(rf"([^/]+)-seed-(\d+)/{re.escape(RESULT)}", file.path):
            seeds[match[1]].append(int(match[2]))
    return seeds


def confirmed_scores(book: Book, trial: Trial, confirmations: Mapping[str, list[int]]) -> list[float]:
    """Top-1 of a trial and of those of its seeds that are trained."""
    # Seed 0 is the search's own: its score is the trial's.
    scores = [trial.score] if trial.score is not None else []
    for seed in sorted(confirmations.get(trial.id, [])):
        uri = storage.join(book.output, CONFIRM, f"{trial.id}-seed-{seed}", RESULT)
        score = records.read(uri, RunResult).number(SCORE)
        assert score is not None, "a trial is validated"
        scores.append(score)
    return scores


def find_front(trials: Iterable[Trial]) -> list[Trial]:
    """Finished trials that no other beats in top-1 at no higher cost, from the cheapest on."""
    front: list[Trial] = []
    scored = [trial for trial in trials if trial.state == "finished" and trial.score is not None]
    # From the cheapest on, a trial is on the front where it is better than all before it.
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
    # Where all scores are equal no choice decides anything.
    if len({trial.score for trial in trials}) < 2:
        return {}
    study = optuna.create_study(direction="maximize")
    distributions = space.distributions()
    for trial in trials:
        study.add_trial(
            optuna.trial.create_trial(params=dict(trial.geometry), distributions=distributions, value=trial.score)
        )
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    # Processors differ in the last digits, and so would the order of choices that are equally important.
    shares = {name: round(share, IMPORTANCE_DIGITS) for name, share in found.items()}
    return dict(sorted(shares.items(), key=lambda item: (-item[1], item[0])))


def conclude(book: Book, search: Search, *, num_best: int, num_seeds: int | None = None) -> Outcome | None:
    """What the finished trials say, by `num_seeds` seeds each (None: all); None where none has finished."""
    if not book.finished():
        return None
    # An earlier start may have asked for more seeds: the mean over them does not compare with one over fewer.
    confirmations = {
        name: [seed for seed in seeds if num_seeds is None or seed < num_seeds]
        for name, seeds in list_confirmations(book).items()
    }
    scored = {trial.id: _score_seeds(book, trial, confirmations) for trial in book.finished()}
    # Of those trained from several seeds only: the best of many single scores is partly luck. Where a training from
    # another seed failed, a mean of fewer would be luckier than the others.
    few = chosen_few(book, num_best)
    most = max(len(scored[trial.id].seeds) for trial in few)
    confirmed = [trial for trial in few if len(scored[trial.id].seeds) == most]
    best = max(confirmed, key=lambda trial: (scored[trial.id].top1, [-part for part in trial.rank]))
    return Outcome(
        best=scored[best.id],
        paper=scored.get(book.paper),
        # By the search's own seed, as it was chosen: a mean would not compare with the scores of those trained once.
        front=tuple(
            replace(scored[trial.id], seeds=scored[trial.id].seeds[:1]) for trial in find_front(book.trials.values())
        ),
        cost=count_cost(book, search),
        importance=rank_importance(book, search.space),
    )


def _score_seeds(book: Book, trial: Trial, confirmations: Mapping[str, list[int]]) -> ScoredTrial:
    return ScoredTrial(
        id=trial.id,
        number=trial.number,
        geometry=trial.geometry,
        gflops=trial.gflops,
        seeds=tuple(confirmed_scores(book, trial, confirmations)),
    )


def write_outcome(book: Book, outcome: Outcome, prepare: Prepare) -> None:
    """sweep.parquet, then result.json."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(list(iter_rows(book, prepare))), sink)
    storage.put(storage.join(book.output, "sweep.parquet"), sink.getvalue().to_pybytes())
    # Last: who finds it finds the table too.
    records.write(storage.join(book.output, RESULT), outcome)


def iter_rows(book: Book, prepare: Prepare) -> Iterator[Values]:
    """What sweep.parquet holds of each trial."""
    confirmations = list_confirmations(book)
    for trial in book.trials.values():
        configuration = json.dumps(prepare(trial.geometry, 0).run.describe(), sort_keys=True)
        columns = {name: value for name, value in trial.to_json().items() if name not in ("geometry", "curve")}
        yield {
            **columns,
            **trial.geometry,
            "paper": trial.id == book.paper,
            "step": trial.step,
            "clips": trial.clips,
            SCORE: trial.score,
            "seeds": confirmed_scores(book, trial, confirmations) if trial.state == "finished" else [],
            "curve": [asdict(report) for report in trial.curve],
            "configuration": configuration,
        }
