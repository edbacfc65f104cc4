"""The search for temporal strides and inflation on Ray Tune: Optuna proposes, ASHA stops, Ray Train trains.

    SWEEP/sweep.json             settings, written before any work
    SWEEP/trials/ID/trial.json   geometry, state and curve of a trial; its run lies beside it
    SWEEP/confirm/ID-seed-N/     the best few and the paper's, trained again from other seeds
    SWEEP/sweep.parquet          every trial with its full configuration and curve
    SWEEP/result.json            what came out
    SWEEP/report.html            the page

What is known of a trial lies in its trial.json, written at each report. A search that was killed is rebuilt from these:
ended trials are told to Optuna and to ASHA's rungs again and are not repeated, the others go on first, from the
checkpoints of their runs. So nothing hangs on the pickles that Tune keeps, which lose ASHA's rungs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Literal

import optuna
from optuna.trial import TrialState
from ray import tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search import Searcher

from models.cost import count_flops
from models.input_spec import ModelConfig
from pipelines import records, storage
from pipelines.lock import Claim
from pipelines.records import Record, Values
from pipelines.search.records import ENDED, TRIAL, Trial, TrialReport
from pipelines.search.space import Geometry, Space, identify
from pipelines.training.config import SCORE, Run, Scale
from pipelines.training.initial_weights import InitialWeights, make_model
from pipelines.training.records import RESULT, read_metrics
from pipelines.training.trainer import train

TRIALS, CONFIRM = "trials", "confirm"
TuneReport = Mapping[str, float]  # what a worker reported, and Tune's own clocks

MAX_GUESSES = 20  # in a row that are invalid or known; then chance proposes, for Optuna would insist
MAX_DRAWS = 500  # by chance, in a row: then the space is taken for searched


class Book:
    """The trials of a search by their ids, as they lie in its folder.

    By the `claim` on that folder a search whose output another one took over writes nothing more there.
    """

    def __init__(self, output: str, paper: str, claim: Claim | None = None) -> None:
        self.output, self.paper, self.claim = output, paper, claim
        self.trials: dict[str, Trial] = {}
        folder = storage.join(output, TRIALS)
        if storage.is_dir(folder):
            # The runs lie there as well, with files of their own.
            files = [file.path for file in storage.list_files(folder) if file.path.endswith(f"/{TRIAL}")]
            uris = [storage.join(folder, file) for file in files]
            contents = zip(uris, storage.read_many(uris), strict=True)
            stored = [Trial.from_json(records.parse(data, uri), where=uri) for uri, data in contents]
            trials = [trial if trial.state in ENDED else self._complete(trial) for trial in stored]
            # In the order in which they were proposed, so that Optuna and the rungs hear of them in the same one again.
            self.trials = {trial.id: trial for trial in sorted(trials, key=lambda trial: trial.number)}

    def _complete(self, trial: Trial) -> Trial:
        """Add what the run has written of itself: a search that is killed may not have heard of its last report."""
        missed = (line for line in read_metrics(self.folder(trial.id)).validation if line.step > trial.step)
        reports = [
            TrialReport(
                step=line.step,
                clips=line.clips,
                val_top1=line.val_top1,
                val_loss=line.val_loss,
                seconds=round(trial.seconds, 1),
            )
            for line in missed
        ]
        return replace(trial, curve=(*trial.curve, *reports))

    def folder(self, trial_id: str) -> str:
        """Where a trial's run and record lie."""
        return storage.join(self.output, TRIALS, trial_id)

    def save(self, trial: Trial) -> None:
        """Write what is known of a trial."""
        self.trials[trial.id] = trial
        if self.claim is None or not self.claim.is_lost():
            records.write(storage.join(self.folder(trial.id), TRIAL), trial)

    def ended(self) -> list[Trial]:
        """Finished and stopped trials."""
        return [trial for trial in self.trials.values() if trial.state in ENDED]

    def finished(self) -> list[Trial]:
        """Trials at full length, the best first."""
        return sorted((trial for trial in self.trials.values() if trial.state == "finished"), key=lambda t: t.rank)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What one training needs."""

    run: Run
    initial: InitialWeights


Prepare = Callable[[Geometry, int], Prepared]  # geometry, seed
Configure = Callable[[Geometry], ModelConfig]  # raises ValueError where no time steps are left


@dataclass(frozen=True, kw_only=True)
class Search:
    """How to search. A trial is `steps` long; ASHA asks at `first_rung`, then at each `reduction` times as many."""

    space: Space
    num_trials: int
    steps: int
    first_rung: int
    reduction: int = 3
    objective: Literal["accuracy", "pareto"] = "accuracy"
    seed: int = 0
    concurrent: int = 1
    scale: Scale


class Proposals(Searcher):
    """Optuna behind Tune's interface. Never proposes a geometry that leaves no time steps, or one that is known."""

    def __init__(self, book: Book, search: Search, configure: Configure) -> None:
        super().__init__(metric=SCORE, mode="max")
        self.book, self.search, self.configure = book, search, configure
        self.distributions = search.space.distributions()
        directions: list[Literal["maximize", "minimize"]] = ["maximize"]
        if search.objective == "pareto":
            # GFLOPs of a test video.
            directions.append("minimize")
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        # Another one at each start: drawn from the same, the first proposals would be those that are known.
        seed = search.seed + len(book.trials)
        startup = max(4, search.num_trials // 3)
        # constant_liar: trials run beside each other, and to TPE one without a result would not be there.
        self.tpe = optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup, constant_liar=True)
        self.chance = optuna.samplers.RandomSampler(seed=seed)
        self.study = optuna.create_study(directions=directions, sampler=self.tpe)
        for trial in book.ended():
            self.study.add_trial(self._as_known(trial))
        unfinished = [trial for trial in book.trials.values() if trial.state not in ENDED]
        self.first = [trial.geometry for trial in unfinished]
        if not book.trials:
            self.first = [search.space.paper()]
        self.open: dict[str, tuple[str, optuna.Trial]] = {}

    def suggest(self, trial_id: str) -> Values | str:
        """The next trial's id and geometry; FINISHED where there are enough, or no more to be found."""
        if self.first:
            # Optuna hears of a trial by ask only: one that is enqueued gets these values.
            self.study.enqueue_trial(dict(self.first.pop(0)))
            return self._start(trial_id, self.study.ask(self.distributions))
        if len(self.book.trials) >= self.search.num_trials:
            return Searcher.FINISHED
        for attempt in range(MAX_GUESSES + MAX_DRAWS):
            self.study.sampler = self.tpe if attempt < MAX_GUESSES else self.chance
            proposal = self.study.ask(self.distributions)
            # TPE samples with replacement, and training a geometry twice says nothing new.
            known = self.book.trials.get(identify(proposal.params))
            if known is None and self._is_valid(proposal.params):
                return self._start(trial_id, proposal)
            # To Optuna this is a trial that failed: it leaves no trace in what is proposed next.
            self.study.tell(proposal, state=TrialState.FAIL)
        return Searcher.FINISHED

    def _is_valid(self, geometry: Geometry) -> bool:
        try:
            self.configure(geometry)
        except ValueError:
            return False
        return True

    def _start(self, trial_id: str, proposal: optuna.Trial) -> Values:
        geometry = dict(proposal.params)
        name = identify(geometry)
        trial = self.book.trials.get(name) or Trial(
            id=name,
            number=len(self.book.trials),
            geometry=geometry,
            gflops=count_flops(self.configure(geometry), test=True) / 1e9,
        )
        self.book.save(replace(trial, state="running", reason=""))
        self.open[trial_id] = (name, proposal)
        return {"id": name, "geometry": geometry, "seconds_before": trial.seconds}

    def on_trial_complete(self, trial_id: str, result: TuneReport | None = None, error: bool = False) -> None:
        """Tell Optuna."""
        name, proposal = self.open.pop(trial_id)
        trial = self.book.trials[name]
        if error or not trial.curve:
            self.study.tell(proposal, state=TrialState.FAIL)
            return
        # With two objectives Optuna takes neither reports on the way nor pruned trials.
        for report in trial.curve if self.search.objective == "accuracy" else ():
            proposal.report(report.val_top1, report.step)
        stopped = trial.state == "stopped" and self.search.objective == "accuracy"
        # Told as complete, its score would be compared with those of whole trainings.
        if stopped:
            self.study.tell(proposal, state=TrialState.PRUNED)
        else:
            self.study.tell(proposal, self._values(trial))

    def _values(self, trial: Trial) -> list[float]:
        assert trial.score is not None
        return [trial.score, trial.gflops] if self.search.objective == "pareto" else [trial.score]

    def _as_known(self, trial: Trial) -> optuna.trial.FrozenTrial:
        accuracy = self.search.objective == "accuracy"
        stopped = trial.state == "stopped" and accuracy
        return optuna.trial.create_trial(
            params=dict(trial.geometry),
            distributions=self.distributions,
            values=None if stopped else self._values(trial),
            intermediate_values={report.step: report.val_top1 for report in trial.curve} if accuracy else {},
            state=TrialState.PRUNED if stopped else TrialState.COMPLETE,
        )

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the trials' records are what a search is resumed from."""

    def restore(self, checkpoint_path: str) -> None:
        """See `save`."""


class Rungs(ASHAScheduler):
    """ASHA (Li et al. 2020) whose rungs are rebuilt from the trials' records; the paper's trial is never stopped."""

    def __init__(self, book: Book, search: Search) -> None:
        super().__init__(
            time_attr="step",
            metric=SCORE,
            mode="max",
            max_t=search.steps,
            grace_period=search.first_rung,
            reduction_factor=search.reduction,
            stop_last_trials=False,  # at its last step a trial has finished, and was not stopped
        )
        self.book, self.steps = book, search.steps
        for trial in book.trials.values():
            # So each report has its place in the rungs again, and new trials are compared with the old ones.
            for report in trial.curve:
                self.judge(trial.id, report.step, report.val_top1)

    def judge(self, trial_id: str, step: int, score: float) -> str:
        """Whether a trial goes on after a report; it is entered into its rung by its id in the book."""
        # Not by Tune's trial: one that is taken up again is another trial to Tune.
        return self._brackets[0].on_result(SimpleNamespace(trial_id=trial_id), step, score)

    def on_trial_result(self, tune_controller: object, trial: TuneTrial, result: TuneReport) -> str:
        name = trial.config["id"]
        decision = self.judge(name, int(result["step"]), result[SCORE])
        # Without the paper's at full length there would be nothing to compare the best with.
        if decision != TrialScheduler.STOP or name == self.book.paper or result["step"] >= self.steps:
            return TrialScheduler.CONTINUE
        self.book.trials[name] = replace(self.book.trials[name], state="stopped")
        return TrialScheduler.STOP

    def on_trial_complete(self, tune_controller: object, trial: TuneTrial, result: TuneReport) -> None:
        """The last report has been judged already."""

    def on_trial_remove(self, tune_controller: object, trial: TuneTrial) -> None:
        """Its place in the rungs stays."""


class BookKeeper(tune.Callback):
    """Keeps the book, and tells of trials that end."""

    def __init__(self, book: Book, on_end: Callable[[Trial], None]) -> None:
        self.book, self.on_end = book, on_end

    def on_trial_result(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, result: TuneReport, **info: object
    ) -> None:
        entry = self.book.trials[trial.config["id"]]
        # A trial that is taken up from a checkpoint repeats steps whose reports are in the book.
        if result["step"] > entry.step:
            # Tune's clock starts anew with each start of the search.
            seconds = trial.config["seconds_before"] + result["time_total_s"]
            report = TrialReport(
                step=int(result["step"]),
                clips=int(result["clips"]),
                val_top1=result[SCORE],
                val_loss=result["val_loss"],
                seconds=round(seconds, 1),
            )
            self.book.save(replace(entry, seconds=seconds, curve=(*entry.curve, report)))

    def on_trial_complete(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: object) -> None:
        entry = self.book.trials[trial.config["id"]]
        self._end(replace(entry, state="finished") if entry.state == "running" else entry)

    def on_trial_error(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: object) -> None:
        text = str(trial.get_error() or "its processes died").strip()
        entry = self.book.trials[trial.config["id"]]
        # A traceback says what happened in its last line.
        self._end(replace(entry, state="failed", reason=text.splitlines()[-1][:500]))

    def _end(self, trial: Trial) -> None:
        self.book.save(trial)
        self.on_end(trial)


def search_geometries(
    book: Book, search: Search, prepare: Prepare, configure: Configure, *, on_end: Callable[[Trial], None]
) -> None:
    """Run trials until `num_trials` geometries are in the book, and those that a killed search left unfinished.

    Ray must be running, and the caller hold the lock of the book's folder. A failed trial is written down and does
    not end the search; the next search on this folder tries it again.
    """
    proposals = Proposals(book, search, configure)
    # In an empty book `first` is the paper's trial, which num_trials counts already.
    missing = max(0, search.num_trials - len(book.trials)) + len(proposals.first) - (0 if book.trials else 1)
    if missing:
        config = tune.TuneConfig(
            search_alg=proposals,
            scheduler=Rungs(book, search),
            num_samples=missing,
            max_concurrent_trials=search.concurrent,
        )
        _fit(book, search, prepare, config, callbacks=[BookKeeper(book, on_end)])


def confirm_geometries(book: Book, search: Search, prepare: Prepare, *, num_best: int, num_seeds: int) -> None:
    """Train the paper's geometry and the best few again at full length, from seeds 1 to `num_seeds` - 1."""
    if missing := missing_confirmations(book, num_best=num_best, num_seeds=num_seeds):
        config = tune.TuneConfig(max_concurrent_trials=search.concurrent, num_samples=1)
        _fit(book, search, prepare, config, space={"job": tune.grid_search(missing)})


def missing_confirmations(book: Book, *, num_best: int, num_seeds: int) -> list[Values]:
    """Jobs of the trainings from other seeds that have no result: not begun, cut off, or failed."""
    return [
        {"id": f"{trial.id}-seed-{seed}", "geometry": dict(trial.geometry), "seed": seed}
        for trial in chosen_few(book, num_best)
        for seed in range(1, num_seeds)
        if not storage.exists(storage.join(book.output, CONFIRM, f"{trial.id}-seed-{seed}", RESULT))
    ]


def chosen_few(book: Book, num_best: int) -> list[Trial]:
    """The best finished trials, and the paper's where it is not among them."""
    best = book.finished()[:num_best]
    paper = book.trials.get(book.paper)
    return best if paper is None or paper in best or paper.state != "finished" else [*best, paper]


def _fit(
    book: Book,
    search: Search,
    prepare: Prepare,
    config: tune.TuneConfig,
    *,
    space: Values | None = None,
    callbacks: list[tune.Callback] | None = None,
) -> None:
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    told = {"output": book.output, "scale": search.scale, "claim": book.claim}
    trainable = tune.with_parameters(run_trial, prepare=prepare, **told)
    tuner = tune.Tuner(
        # No CPU: what trains are the workers, which ask for themselves. Tune does not take nothing at all.
        tune.with_resources(trainable, {"memory": 200 << 20}),
        param_space=space,
        tune_config=config,
        run_config=tune.RunConfig(
            name="tune", storage_path=book.output, callbacks=callbacks, verbose=0, progress_reporter=_Silent()
        ),
    )
    tuner.fit()


class _Silent(tune.ProgressReporter):
    def should_report(self, trials: list[TuneTrial], done: bool = False) -> bool:
        return False

    def report(self, trials: list[TuneTrial], done: bool, *sys_info: object) -> None:
        """Nothing: ended trials are told of by the book."""


@dataclass(frozen=True, kw_only=True)
class TrialJob(Record):
    """What Tune hands a trial's process; `seed`: 0 is the search's own, the others confirm it."""

    id: str
    geometry: Geometry
    seed: int = 0


def run_trial(config: Values, *, prepare: Prepare, output: str, scale: Scale, claim: Claim | None = None) -> None:
    """One trial: a run of `pipelines.training.trainer`, which goes on from its checkpoint where it has one."""
    job = TrialJob.from_json(config.get("job", config), where="a trial's configuration")
    folder = storage.join(output, CONFIRM if job.seed else TRIALS, job.id)
    prepared = prepare(job.geometry, job.seed)
    run = prepared.run
    # What is searched is not held against how the weights' own clips were cut.
    model = make_model(run.model, prepared.initial, run.train.classes, seed=run.seed)
    run = replace(run, model=model.config)
    result = train(run, model, folder, scale, claim=claim, callbacks=[TuneReportCallback()])
    tune.report(result.metrics)  # again, for a trial whose run was finished before its last report was written down
