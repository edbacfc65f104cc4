"""Search where I3D should pool and stride in time, instead of taking the paper's choice.

    python jobs/tune.py --data SHARDS --stream flow --preset small --steps 400 --output SWEEP
    python jobs/tune.py … --objective pareto                         accuracy against GFLOPs a video
    python jobs/train.py --from-sweep SWEEP --data SHARDS … --output RUN        the best one at full length
    ray job submit --working-dir . -- python jobs/tune.py …          the same on a cluster

Trial 0 is the paper's own geometry and is never stopped early. The others are proposed by Optuna and stopped by ASHA.
All flags of jobs/train.py set what the trials have in common. Stopped or killed, it goes on when it is run again:
ended trials are kept, running ones continue from their checkpoints. More --trials may be added later.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from jobs import train
from jobs.cluster import connect, count_processors
from jobs.command import locate_output, run_command
from models.inflation import Mode
from models.input_spec import ModelConfig
from pipelines import storage
from pipelines.datasets import shards
from pipelines.datasets.video_index import VideoIndex, read_index
from pipelines.lock import lock_output
from pipelines.search.space import Geometry, Space, describe_geometry, identify
from pipelines.training.config import Run, Scale

if TYPE_CHECKING:
    from pipelines.search.results import Outcome
    from pipelines.search.trials import Book, Configure, Prepare, Search, Trial

FLOW_STRIDE = "flow at input stride s is every s-th frame of the flow between neighbours, not the flow over s frames"


@dataclass(frozen=True, kw_only=True)
class Tune(train.Train):
    """Search I3D's temporal strides and inflation."""

    trials: int = 16
    """Geometries to try, the paper's among them."""
    objective: Literal["accuracy", "pareto"] = "accuracy"
    """What Optuna proposes for: top-1, or top-1 and GFLOPs a video together."""
    rungs: int = 3
    """Times that ASHA looks at a trial, the end included."""
    reduction: int = 3
    """One of so many trials survives a rung; rungs lie this factor apart in steps."""
    confirm: int = 2
    """Best trials that are trained again from other seeds, and the paper's with them."""
    confirm_seeds: int = 3
    """Seeds of each, the search's own among them."""
    concurrent: int | None = None
    """Trials at a time. None: as many as the cluster has CPUs or GPUs for now."""

    search_frames: tuple[int, ...] = ()
    """Frames of a training clip to try besides --frames."""
    search_frame_steps: tuple[int, ...] = Space.frame_steps
    """Input strides: one of so many frames is kept."""
    search_conv1_kernels: tuple[int, ...] = Space.conv1_kernels
    """Temporal kernels of conv1."""
    search_conv1_strides: tuple[int, ...] = Space.conv1_strides
    """Temporal strides of conv1."""
    search_pool_kernels: tuple[int, ...] = Space.pool_kernels
    """Temporal kernels of each of the four max-pools; 1 leaves a pool uninflated."""
    search_pool_strides: tuple[int, ...] = Space.pool_strides
    """Temporal strides of each."""
    search_inflation: tuple[Mode, ...] = ()
    """Ways to inflate 2-D weights (with --init imagenet)."""
    search_learning_rate: tuple[float, float] | None = None
    """Lowest and highest learning rate. None: not searched."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model != "i3d":
            raise ValueError(f"--model is {self.model}: only i3d has the geometry that is searched")
        if self.from_sweep:
            raise ValueError("--from-sweep is for jobs/train.py: a search starts from the paper's geometry")
        if self.folds:
            raise ValueError("--folds is not for a search: choose on one division, then train the best on each")
        if min(self.trials, self.rungs, self.confirm_seeds) < 1 or self.reduction < 2 or self.confirm < 0:
            raise ValueError("--trials, --rungs and --confirm-seeds are at least 1, --reduction at least 2")
        if self.search_inflation and self.init != "imagenet":
            raise ValueError("--search-inflation chooses how 2-D weights are inflated: give --init imagenet")
        if self.search_learning_rate and self.steps is None:
            raise ValueError("--search-learning-rate replaces the rate of --steps: give --steps, no bare preset")


def main() -> None:
    """Parse, search, print."""
    run_command(Tune, run, __doc__)


def run(config: Tune) -> Outcome:
    """Search, confirm, write, print."""
    index = read_index(config.data)
    output = locate_output(config.output)
    print(f"data        {index.data}: {len(index):,} videos, {len(index.classes)} classes")
    with lock_output(output):
        num_cpus = max(2, config.num_cpus or os.cpu_count() or 2)
        # Ray Train gives back what a stopped trial's workers had reserved by asking the dashboard who is alive.
        print(f"ray         {connect(num_cpus=num_cpus, log_to_driver=False, dashboard=True)}", flush=True)
        from pipelines.search.results import conclude, write_outcome
        from pipelines.search.trials import Book, confirm_geometries, search_geometries

        scale, concurrent = make_scale(config)
        search = make_search(config, scale, concurrent)
        prepare = make_prepare(config, index, search)
        paper = search.space.paper()
        run = prepare(paper, 0).run
        hold_settings(config, output, run, search)
        book = Book(output, identify(paper))
        print_search(config, book, search, run)
        search_geometries(book, search, prepare, make_configure(config, index), on_end=print_trial)
        if config.confirm and config.confirm_seeds > 1 and book.finished():
            print(
                f"seeds       the best {config.confirm} and the paper's, from {config.confirm_seeds} each", flush=True
            )
            confirm_geometries(book, search, prepare, num_best=config.confirm, num_seeds=config.confirm_seeds)
        outcome = conclude(book, search, num_best=max(1, config.confirm))
        if outcome is None:
            reasons = "; ".join(sorted({trial.reason for trial in book.trials.values() if trial.reason})[:2])
            raise ValueError(f"no trial came to its end: {reasons}")
        write_outcome(book, outcome, prepare)
        from pipelines.pages.search import write_sweep_report

        page = write_sweep_report(output)
        print_outcome(book, outcome)
        print(f"look at     {page}")
    return outcome


def make_scale(config: Tune) -> tuple[Scale, int]:
    """The workers of one trial, and how many trials the cluster has room for."""
    cpus, gpus = count_processors(config.num_workers, config.num_gpus)
    num_workers = config.num_workers or 1
    # Where workers compute on CPUs, a trial has one for each worker: half to compute, half to decode, as shares.
    each = 1.0 if gpus else 0.5
    data_cpus = max(1.0, cpus / gpus - 1) * num_workers if gpus else 0.5 * num_workers
    room = max(1, int((gpus or cpus) // num_workers))
    scale = Scale(
        num_workers=num_workers,
        use_gpu=gpus > 0,
        cpus_per_worker=each,
        data_cpus=data_cpus,
        max_failures=config.max_failures,
    )
    return scale, config.concurrent or min(room, config.trials)


def make_prepare(config: Tune, index: VideoIndex, search: Search) -> Prepare:
    """How a geometry becomes a run: the flags' run, with its settings in place of theirs."""
    from pipelines.search.trials import Prepared

    def prepare(geometry: Geometry, seed: int) -> Prepared:
        given = train.apply_geometry(config, geometry)
        given = replace(given, seed=config.seed + seed, checkpoint_every=search.first_rung)
        return Prepared(run=train.make_run(given, index, search.scale), initial=train.make_initial(given))

    return prepare


def make_configure(config: Tune, index: VideoIndex) -> Configure:
    """How a geometry becomes a network's settings, without the videos of a run."""
    preset = train.PRESETS[config.preset] if config.preset else None

    def configure(geometry: Geometry) -> ModelConfig:
        return train.make_model_config(train.apply_geometry(config, geometry), preset, num_classes=len(index.classes))

    return configure


def make_search(config: Tune, scale: Scale, concurrent: int) -> Search:
    """The space and the budget."""
    from pipelines.search.trials import Search

    preset = train.PRESETS[config.preset] if config.preset else None
    optimisation = train.make_optimisation(config, preset, scale)
    steps = optimisation.schedule.steps(optimisation.global_batch(scale.num_workers))
    network = train.make_model_config(config, preset, num_classes=2)
    space = Space(
        paper_frames=network.frames,  # type: ignore[attr-defined]
        frames=config.search_frames,
        frame_steps=config.search_frame_steps,
        conv1_kernels=config.search_conv1_kernels,
        conv1_strides=config.search_conv1_strides,
        pool_kernels=config.search_pool_kernels,
        pool_strides=config.search_pool_strides,
        inflation=config.search_inflation,
        learning_rate=config.search_learning_rate,
        paper_learning_rate=config.learning_rate,
    )
    return Search(
        space=space,
        num_trials=config.trials,
        steps=steps,
        first_rung=-(-steps // config.reduction ** (config.rungs - 1)),  # rounded up: the last rung is the end itself
        reduction=config.reduction,
        objective=config.objective,
        seed=config.seed,
        concurrent=concurrent,
        scale=scale,
    )


def hold_settings(config: Tune, output: str, run: Run, search: Search) -> None:
    """Write sweep.json, or refuse a folder that holds another sweep. The number of trials may change."""
    from pipelines.training.trainer import holds_same

    described = {
        "run": run.describe(),
        "choices": {name: repr(values) for name, values in search.space.distributions().items()},
        "steps": search.steps,
        "first_rung": search.first_rung,
        "reduction": search.reduction,
        "objective": search.objective,
    }
    uri = storage.join(output, "sweep.json")
    if not holds_same(uri, described):
        storage.put(uri, shards.to_json(described))


def print_search(config: Tune, book: Book, search: Search, run: Run) -> None:
    """What will be done, and with what."""
    scale = search.scale
    kind = f"{scale.num_workers} GPU" if scale.use_gpu else f"{scale.num_workers} × {scale.cpus_per_worker:g} CPU"
    print(f"videos      {len(run.train):,} to train, {len(run.validation or ()):,} to choose by")
    print(f"trials      {search.num_trials} of {search.steps:,} steps; {len(book.ended())} of them known already")
    print(f"rungs       at {search.first_rung:,} steps, then at each {search.reduction} times as many")
    print(f"each trial  {kind} to train, {scale.data_cpus:g} CPU to decode; {search.concurrent} at a time")
    if config.stream == "flow" and len(set(config.search_frame_steps)) > 1:
        print(f"note        {FLOW_STRIDE}")
    print(f"output      {book.output}", flush=True)


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
    for entry in outcome.front:
        print(f"front       {entry.format()}")
    print("            accuracies are of the videos that the choice was made by, so the best one's is too high")
    print(
        f"cost        {cost.clips:,} clips, {cost.cpu_hours:.2f} CPU hours, {cost.gpu_hours:.2f} GPU hours; "
        f"stopping early saved {cost.saved_clips:,} clips ({cost.saved_share:.0%})"
    )


if __name__ == "__main__":
    main()
