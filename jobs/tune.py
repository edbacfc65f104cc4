"""Search where I3D should pool and stride in time, instead of taking the paper's choice.

    python jobs/tune.py --data SHARDS --stream flow --preset small --steps 400 --output SWEEP
    python jobs/tune.py … --objective pareto                         accuracy against GFLOPs a video
    python jobs/train.py --from-sweep SWEEP --data SHARDS … --output RUN        the best one at full length
    ray job submit --working-dir . -- python jobs/tune.py …          the same on a cluster

Trial 0 is the paper's own geometry and is never stopped early. The others are proposed by Optuna and stopped by ASHA.
The flags of jobs/train.py set what the trials have in common. Stopped or killed, it goes on when it is run again:
ended trials are kept, running ones continue from their checkpoints. More --trials may be added later.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from jobs.cluster import connect, count_processors
from jobs.command import as_given, locate_output, run_command, with_preset
from jobs.train import Workers, embedded_cpus
from pipelines import records, storage
from pipelines.datasets.video_index import VideoIndex, check_trainable, read_index, with_fold
from pipelines.errors import DataError, RunError, SettingsError
from pipelines.formatting import format_count
from pipelines.lock import lock_output
from pipelines.resume import was_begun
from pipelines.search.records import SETTINGS, Outcome, SearchSettings, Trial
from pipelines.search.space import PAPER, Geometry, Space, describe_geometry, identify, searched_words, with_geometry
from pipelines.training.config import Run, Scale
from pipelines.training.settings import PRESETS, PresetName, TrainingSettings, make_run
from pipelines.training.settings import prepare as prepare_run

if TYPE_CHECKING:
    from pipelines.search.trials import Book, Configure, Prepare, Search

FLOW_STRIDE = "flow at input stride s is every s-th frame of the flow between neighbours, not the flow over s frames"


@dataclass(frozen=True, kw_only=True)
class Tune:
    """Search I3D's temporal strides and inflation."""

    data: str
    """Shards, on disk or s3://."""
    output: str
    """Folder of the search, on disk or s3://: trials, the best of them, page."""
    preset: PresetName | None = None
    """Schedule, batch, weight decay and dropout of every trial. Any other flag overrides it."""
    annotations: tuple[str, ...] = ()
    """Official annotation files whose splits replace those of the shards."""
    fold: int = 1
    """Official split of --annotations to use: 1, 2 or 3."""

    trials: int = 16
    """Number of geometries to try, including the paper's."""
    objective: Literal["accuracy", "pareto"] = "accuracy"
    """What Optuna optimises: top-1, or top-1 and GFLOPs per video together."""
    rungs: int = 3
    """How often ASHA compares trials, including at their end."""
    reduction: int = 3
    """One in this many trials survives a rung; rungs are this factor apart in steps."""
    confirm: int = 2
    """How many of the best trials, besides the paper's, are trained again from other seeds."""
    confirm_seeds: int = 3
    """Number of seeds for each of these, including the search's own."""
    concurrent: int | None = None
    """Trials that run at a time. None: as many as the cluster has CPUs or GPUs for now."""

    space: Space = field(default_factory=Space)
    """What may be chosen."""
    settings: TrainingSettings = field(default_factory=TrainingSettings)
    """What the trials have in common."""
    workers: Workers = field(default_factory=Workers)
    """The workers of each trial."""

    def __post_init__(self) -> None:
        settings = self.settings
        if settings.network.model != "i3d":
            raise SettingsError(f"--model is {settings.network.model}: only i3d has the geometry that is searched")
        if min(self.trials, self.rungs, self.confirm_seeds) < 1 or self.reduction < 2 or self.confirm < 0:
            raise SettingsError("--trials, --rungs and --confirm-seeds are at least 1, --reduction at least 2")
        if self.concurrent is not None and self.concurrent < 1:
            raise SettingsError(f"--concurrent is {self.concurrent}: give at least 1, or leave it out")
        if self.space.inflation and settings.initial.source != "imagenet":
            raise SettingsError("--search-inflation chooses how 2-D weights are inflated: give --init imagenet")
        if words := searched_words(settings):
            raise SettingsError(
                f"--set {' '.join(words)} is what is searched: give the --search-… flag of it, or --frames"
            )
        kernels = set(self.space.conv1_kernels) | {PAPER.conv1_kernel}
        # Of 2-D weights kernels of any length are made; these have the length that they have.
        if settings.initial.source in ("kinetics", "checkpoint") and len(kernels) > 1:
            raise SettingsError(
                f"--search-conv1-kernels is {' '.join(map(str, self.space.conv1_kernels))}, and the weights of --init "
                f"{settings.initial.source} are of one length: give --search-conv1-kernels {PAPER.conv1_kernel}"
            )
        if self.workers.min_workers is not None:
            raise SettingsError("--min-workers is for jobs/train.py: trials on fewer workers could not be compared")
        settings.schedule.resolve(1)
        for uri in (self.data, self.output, settings.initial.weights, *self.annotations):
            if uri is not None:
                storage.absolute(uri)


def main() -> None:
    """Parse, search, print."""
    run_command(with_preset(Tune, PRESETS), run, __doc__)


def run(config: Tune) -> Outcome:
    """Search, confirm, write, print."""
    index = read_index(config.data)
    if config.annotations:
        index = with_fold(index, config.annotations, config.fold)
    output = locate_output(config.output)
    print(f"data        {index.data}: {format_count(len(index), 'video')}, {format_count(len(index.classes), 'class')}")
    # Before Ray is up: a split without labels or videos is refused here.
    for note in check_trainable(index, config.settings.splits.train_split):
        print(f"note        {note}")
    if config.settings.splits.validation(index) is None:
        raise DataError(
            "a search compares top-1 of a validation split, and there is none: give --validation-split, one of "
            + ", ".join(sorted(set(index.table["split"].to_pylist())))
        )
    with lock_output(output) as lock, lock.stop_run_when_lost():
        # Ray Train gives back what a stopped trial's workers had reserved by asking the dashboard who is alive.
        print(
            f"ray         {connect(num_cpus=embedded_cpus(config.workers), log_to_driver=False, dashboard=True)}",
            flush=True,
        )
        from pipelines.search.results import conclude, write_outcome
        from pipelines.search.trials import Book, confirm_geometries, missing_confirmations, search_geometries

        scale, concurrent = make_scale(config)
        search = make_search(config, scale, concurrent)
        prepare = make_prepare(config, index, search)
        paper = search.space.paper()
        # The paper's stands for all: trials differ in their geometry only.
        run = prepare(paper, 0).run
        begin_search(config, output, run, search)
        book = Book(output, identify(paper), lock.claim)
        print_search(config, book, search, run)
        search_geometries(book, search, prepare, make_configure(config, index), on_end=print_trial)
        if config.confirm and config.confirm_seeds > 1 and book.finished():
            print(
                f"seeds       the best {config.confirm} and the paper's, from {config.confirm_seeds} each", flush=True
            )
            confirm_geometries(book, search, prepare, num_best=config.confirm, num_seeds=config.confirm_seeds)
            if failed := missing_confirmations(book, num_best=config.confirm, num_seeds=config.confirm_seeds):
                names = ", ".join(str(job["id"]) for job in failed)
                print(
                    f"note        {len(failed)} trainings from other seeds failed; a geometry with fewer seeds than "
                    f"others is not chosen. Run the search again to try them again: {names}"
                )
        outcome = conclude(book, search, num_best=max(1, config.confirm), num_seeds=config.confirm_seeds)
        if outcome is None:
            reasons = "; ".join(sorted({trial.reason for trial in book.trials.values() if trial.reason})[:2])
            raise RunError(f"no trial came to its end: {reasons}")
        lock.check()
        # Before the page, which is made of what lies in the folder.
        write_outcome(book, outcome, prepare)
        from pipelines.pages.search import write_search_report

        page = write_search_report(output)
        print_outcome(book, outcome)
        print(f"look at     {as_given(page, config.output)}")
    return outcome


def make_scale(config: Tune) -> tuple[Scale, int]:
    """The workers of one trial, and how many trials the cluster has room for."""
    workers = config.workers
    cpus, gpus = count_processors(workers.num_workers, workers.num_gpus)
    num_workers = workers.num_workers or 1
    # Where workers compute on CPUs, a trial has one for each worker: half to compute, half to decode, as shares.
    each = 1.0 if gpus else 0.5
    data_cpus = max(1.0, cpus / gpus - 1) * num_workers if gpus else 0.5 * num_workers
    room = max(1, int((gpus or cpus) // num_workers))
    scale = Scale(
        num_workers=num_workers,
        use_gpu=gpus > 0,
        cpus_per_worker=each,
        data_cpus=data_cpus,
        max_failures=workers.max_failures,
        compile=workers.compile,
        cuda_graphs=workers.cuda_graphs,
    )
    return scale, config.concurrent or min(room, config.trials)


def make_prepare(config: Tune, index: VideoIndex, search: Search) -> Prepare:
    """How a geometry becomes a run: the settings' run, with the geometry in place of theirs."""
    from pipelines.search.trials import Prepared

    norm: dict[str, bool] = {}
    if config.settings.initial.weights is not None:
        # They decide about batch norm's gamma, and are refused here where they do not fit, not in each trial.
        paper, _ = prepare_run(with_geometry(config.settings, search.space.paper()), index, search.scale)
        norm = {"bn_gamma": paper.model.bn_gamma}  # type: ignore[attr-defined]

    def prepare(geometry: Geometry, seed: int) -> Prepared:
        # Rungs lie at multiples of the first, and ASHA can compare only what was validated there.
        settings = with_geometry(config.settings, geometry).change(
            reporting={"checkpoint_every": search.first_rung}, seed=config.settings.seed + seed
        )
        run = make_run(settings, index, search.scale)
        return Prepared(run=replace(run, model=replace(run.model, **norm)), initial=settings.initial)

    return prepare


def make_configure(config: Tune, index: VideoIndex) -> Configure:
    """How a geometry becomes a network's settings, without the videos of a run."""
    return lambda geometry: with_geometry(config.settings, geometry).network.configure(len(index.classes))


def make_search(config: Tune, scale: Scale, concurrent: int) -> Search:
    """The space and the budget."""
    from pipelines.search.trials import Search

    settings = config.settings
    batch = settings.optimisation.global_batch(scale.num_workers)
    schedule = settings.schedule.resolve(batch)
    steps = schedule.steps(batch)
    # Any number of classes: the frames are all that is asked of it.
    network = settings.network.configure(num_classes=2)
    space = replace(
        config.space,
        paper_frames=network.frames,  # type: ignore[attr-defined]
        paper_learning_rate=schedule.phases[0][1],
    )
    return Search(
        space=space,
        num_trials=config.trials,
        steps=steps,
        first_rung=-(-steps // config.reduction ** (config.rungs - 1)),  # rounded up: the last rung is the end itself
        reduction=config.reduction,
        objective=config.objective,
        seed=settings.seed,
        concurrent=concurrent,
        scale=scale,
    )


def begin_search(config: Tune, output: str, run: Run, search: Search) -> None:
    """Write sweep.json, or refuse a folder that holds another search. The number of trials may change."""
    settings = SearchSettings(
        run=run.describe(),
        choices={name: repr(values) for name, values in search.space.distributions().items()},
        steps=search.steps,
        first_rung=search.first_rung,
        reduction=search.reduction,
        objective=search.objective,
    )
    uri = storage.join(output, SETTINGS)
    if not was_begun(uri, settings.to_json()):
        records.write(uri, settings)


def print_search(config: Tune, book: Book, search: Search, run: Run) -> None:
    """What will be done, and with what."""
    scale = search.scale
    kind = f"{scale.num_workers} GPU" if scale.use_gpu else f"{scale.num_workers} × {scale.cpus_per_worker:g} CPU"
    print(f"videos      {len(run.train):,} to train, {len(run.validation or ()):,} to choose by")
    print(
        f"trials      {search.num_trials} of {format_count(search.steps, 'step')}; "
        f"{len(book.ended())} of them known already"
    )
    print(f"rungs       at {format_count(search.first_rung, 'step')}, then at each {search.reduction} times as many")
    print(f"each trial  {kind} to train, {scale.data_cpus:g} CPU to decode; {search.concurrent} at a time")
    if config.settings.network.stream == "flow" and len(set(config.space.frame_steps)) > 1:
        print(f"note        {FLOW_STRIDE}")
    print(f"output      {config.output}", flush=True)


def print_trial(trial: Trial) -> None:
    """One line for a trial that has ended."""
    score = f"top-1 {trial.score:.1%}" if trial.score is not None else "no report"
    state = f"{trial.state} at step {trial.step:,}" if trial.state == "stopped" else trial.state
    reason = f": {trial.reason}" if trial.reason else ""
    print(
        f"trial {trial.number:>3}   {score}  {trial.gflops:8.2f} GFLOPs  {describe_geometry(trial.geometry)}  "
        f"{state}{reason}",
        flush=True,
    )


def print_outcome(book: Book, outcome: Outcome) -> None:
    """The table."""
    states = [trial.state for trial in book.trials.values()]
    counts = ", ".join(f"{states.count(state)} {state}" for state in ("finished", "stopped", "failed"))
    cost = outcome.cost
    print(f"\ntrials      {counts}")
    print(f"best        {outcome.best.format()}")
    print(f"paper's     {outcome.paper.format() if outcome.paper else 'failed'}")
    for trial in outcome.front:
        print(f"front       {trial.format()}")
    print("            accuracies are of the videos that the choice was made by, so the best one's is too high")
    print(
        f"cost        {cost.clips:,} clips, {cost.cpu_hours:.2f} CPU hours, {cost.gpu_hours:.2f} GPU hours; "
        f"stopping early saved {format_count(cost.saved_clips, 'clip')} ({cost.saved_share:.0%})"
    )


if __name__ == "__main__":
    main()
