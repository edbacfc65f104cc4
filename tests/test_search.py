"""The search: what is proposed, what is stopped, what a killed search keeps, and what its result says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fixtures_jobs import run_here, succeed
from page_folders import PAPER, SEARCH, SPACE, make_book, make_trial, report_of
from page_folders import make_search as make_finished
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

import models
from jobs.train import take_best
from jobs.tune import Tune, make_prepare, make_search
from models import checkpoint
from models.cost import count_flops
from models.input_spec import ModelConfig
from pipelines.clips.sampling import ClipSettings
from pipelines.datasets.records import FrameSampling, ShardConvention
from pipelines.datasets.video_index import VideoIndex, read_index
from pipelines.errors import NetworkError, RunError, SettingsError
from pipelines.lock import lock_output
from pipelines.media.codec import CodecSettings
from pipelines.pages.search import write_search_report
from pipelines.search import trials as trials_module
from pipelines.search.records import Trial, read_outcome
from pipelines.search.results import conclude, confirmed_scores, count_cost, find_front, list_confirmations
from pipelines.search.space import Geometry, Space, describe_geometry, identify, model_settings, with_geometry
from pipelines.search.trials import Book, BookKeeper, Proposals, Rungs, TrialJob, chosen_few, missing_confirmations
from pipelines.training.config import Scale
from pipelines.training.initial_weights import make_model
from pipelines.training.settings import PRESETS
from pipelines.training.settings import prepare as prepare_run

ROOT = Path(__file__).resolve().parents[1]
TRAINED = ("epoch", "learning_rate", "loss", "top1", "clips_per_s", "wait_share")  # what a line of a training has


def configure(geometry: Geometry) -> ModelConfig:
    settings = {"stream": "flow", "width": 0.125, "size": 32, **model_settings(geometry)}
    return models.configure("i3d", num_classes=6, **settings)


def propose(proposals: Proposals, book: Book, name: str, scores: list[float]) -> dict[str, Any]:
    """One trial from its proposal to its end."""
    proposed = proposals.suggest(name)
    curve = tuple(report_of(10 * (index + 1), score) for index, score in enumerate(scores))
    book.save(replace(book.trials[proposed["id"]], curve=curve, state="finished"))
    proposals.on_trial_complete(name)
    return proposed


def test_the_papers_geometry_is_i3d_itself() -> None:
    settings = model_settings(SPACE.paper())
    assert models.configure("i3d", num_classes=4, stream="rgb", frames=16) == models.configure(
        "i3d", num_classes=4, stream="rgb", **settings
    )
    assert describe_geometry(SPACE.paper()) == "16 frames, conv1 7/2, pools 1/1 1/1 3/2 2/2"


def test_every_choice_of_the_paper_is_in_the_space_and_lists_are_of_any_order() -> None:
    narrow = Space(paper_frames=16, frame_steps=(4, 2), conv1_kernels=(3,), pool_kernels=(1,), inflation=("center",))
    for name, value in narrow.paper().items():
        assert narrow.distributions()[name]._contains(narrow.distributions()[name].to_internal_repr(value))
    assert narrow.distributions()["frame_step"].choices == (1, 2, 4)
    assert narrow.distributions()["inflation"].choices == ("center", "mean")


def test_an_input_stride_keeps_the_seconds_of_a_test_video() -> None:
    model = configure({**SPACE.paper(), "frame_step": 4})
    input_spec = models.input_spec_of(model)
    assert input_spec.train.streams["flow"].frame_indices(3)[:3] == [3, 7, 11]
    assert (input_spec.train.span, input_spec.test.span) == (64, 248)


@pytest.mark.parametrize("objective", ["accuracy", "pareto"])
def test_proposals_begin_with_the_papers_and_are_valid_and_new(tmp_path: Path, objective: str) -> None:
    book = Book(str(tmp_path), PAPER)
    proposals = Proposals(book, replace(SEARCH, objective=objective), configure)  # type: ignore[arg-type]
    proposed = [propose(proposals, book, str(index), [0.1, index / 20])["geometry"] for index in range(12)]
    assert proposed[0] == SPACE.paper()
    assert len({identify(geometry) for geometry in proposed}) == 12
    assert all(configure(geometry) for geometry in proposed)
    assert proposals.suggest("13") == Searcher.FINISHED
    assert book.trials[PAPER].gflops == pytest.approx(count_flops(configure(SPACE.paper()), test=True) / 1e9)


def test_geometries_without_time_steps_are_never_proposed(tmp_path: Path) -> None:
    short = Space(paper_frames=16, frames=(2, 4, 8))

    def is_left(geometry: Geometry) -> bool:
        try:
            configure(geometry)
        except ValueError:
            return False
        return True

    every = [{**short.paper(), "frames": 2}, {**short.paper(), "frames": 4}]
    assert not any(is_left(geometry) for geometry in every)
    book = Book(str(tmp_path), identify(short.paper()))
    proposals = Proposals(book, replace(SEARCH, space=short, num_trials=15), configure)
    assert all(is_left(propose(proposals, book, str(index), [0.5])["geometry"]) for index in range(15))


def test_a_space_that_is_used_up_ends_the_search(tmp_path: Path) -> None:
    fixed = {"conv1_kernels": (7,), "conv1_strides": (2,), "pool_kernels": (), "pool_strides": ()}
    tiny = Space(paper_frames=16, frame_steps=(1, 2), **fixed)
    book = Book(str(tmp_path), identify(tiny.paper()))
    proposals = Proposals(book, replace(SEARCH, space=tiny), configure)
    for index in range(2):
        propose(proposals, book, str(index), [0.5])
    assert proposals.suggest("2") == Searcher.FINISHED


def test_a_killed_search_keeps_what_ended_and_begins_with_what_did_not(tmp_path: Path) -> None:
    book = Book(str(tmp_path), PAPER)
    proposals = Proposals(book, SEARCH, configure)
    for index in range(3):
        propose(proposals, book, str(index), [0.2, 0.4])
    left = proposals.suggest("running")
    again = Book(str(tmp_path), PAPER)
    assert again.trials == book.trials
    resumed = Proposals(again, SEARCH, configure)
    assert len(resumed.study.trials) == 3
    first = resumed.suggest("0")
    assert (first["id"], first["geometry"]) == (left["id"], left["geometry"])
    assert resumed.suggest("1")["id"] not in book.trials


def test_a_failed_trial_is_written_down_and_tried_again_by_the_next_search(tmp_path: Path) -> None:
    book = Book(str(tmp_path), PAPER)
    proposals = Proposals(book, SEARCH, configure)
    proposed = proposals.suggest("0")
    ended: list[Trial] = []
    failed = SimpleNamespace(config=proposed, get_error=lambda: RuntimeError("first line\nno memory is left"))
    BookKeeper(book, ended.append).on_trial_error(1, [], failed)
    proposals.on_trial_complete("0", error=True)
    assert ended[0].reason == "no memory is left"
    assert proposals.suggest("1")["id"] != proposed["id"]
    again = Book(str(tmp_path), PAPER)
    assert again.trials[PAPER].state == "failed"
    assert Proposals(again, SEARCH, configure).suggest("0")["id"] == PAPER


def test_a_report_that_a_killed_search_did_not_hear_of_is_read_from_the_run(tmp_path: Path) -> None:
    book = Book(str(tmp_path), PAPER)
    book.save(make_trial(0, [report_of(10, 0.3)], "running"))
    lines = [
        {"kind": "train", "step": 15, "clips": 120, **dict.fromkeys(TRAINED, 0.5)},
        *({"kind": "validation", **vars(report_of(step, step / 100))} for step in (10, 20)),
    ]
    log = tmp_path / "trials" / PAPER / "metrics.jsonl"
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    curve = Book(str(tmp_path), PAPER).trials[PAPER].curve
    assert [(report.step, report.val_top1) for report in curve] == [(10, 0.3), (20, 0.2)]


def test_a_trial_s_process_gets_the_geometry_as_it_was_proposed() -> None:
    geometry = SPACE.paper() | {"inflation": "center", "learning_rate": 0.5}
    job = TrialJob.from_json({"id": "x", "geometry": geometry, "seconds_before": 1.5}, where="here")
    assert job == TrialJob(id="x", geometry=geometry)
    assert identify(job.geometry) == identify(geometry)


def result_of(trial: Trial, step: int, score: float) -> tuple[Any, dict[str, Any]]:
    return type("TuneTrial", (), {"config": {"id": trial.id}, "trial_id": "x"})(), vars(report_of(step, score))


def test_rungs_stop_the_worse_but_never_the_papers(tmp_path: Path) -> None:
    book = Book(str(tmp_path), PAPER)
    trials = [make_trial(number, [], "running") for number in range(5)]
    book.trials = {trial.id: trial for trial in trials}
    rungs = Rungs(book, SEARCH)
    decisions = [
        rungs.on_trial_result(None, *result_of(trial, 10, score))
        for trial, score in zip(trials, (0.2, 0.5, 0.6, 0.3, 0.7), strict=True)
    ]
    stopped = [decision == TrialScheduler.STOP for decision in decisions]
    assert stopped == [False, False, False, True, False]
    assert book.trials[trials[3].id].state == "stopped"
    # 0.1 is the worst of all at the next rung, and the paper's; at the last step nothing is left to stop.
    rungs.on_trial_result(None, *result_of(trials[4], 30, 0.9))
    assert rungs.on_trial_result(None, *result_of(trials[0], 30, 0.1)) == TrialScheduler.CONTINUE
    assert rungs.on_trial_result(None, *result_of(trials[1], 90, 0.1)) == TrialScheduler.CONTINUE


def test_no_trial_is_stopped_a_few_steps_before_its_end(tmp_path: Path) -> None:
    settings = PRESETS["small"].change(network={"stream": "flow"}, schedule={"steps": 400})
    config = Tune(data="data", output="sweep", settings=settings)
    search = make_search(config, Scale(num_workers=1), concurrent=1)
    book = Book(str(tmp_path), PAPER)
    book.trials = {trial.id: trial for trial in (make_trial(number, [], "running") for number in range(9))}
    rungs = Rungs(book, search)
    for step in (45, 135, 396, 400):
        decisions = [
            rungs.on_trial_result(None, *result_of(trial, step, number / 10))
            for number, trial in reversed(list(enumerate(book.trials.values())))
        ]
        assert (TrialScheduler.STOP in decisions) == (step < 396)


def test_a_loss_that_is_no_number_comes_last(tmp_path: Path) -> None:
    book = Book(str(tmp_path), PAPER)
    losses = (1.0, float("nan"), 0.5, float("nan"))
    book.trials = {t.id: t for n, loss in enumerate(losses) for t in [make_trial(n, [report_of(90, 0.5, loss)])]}
    assert [trial.number for trial in book.finished()[:2]] == [2, 0]


def test_an_outage_fails_a_trial_and_the_next_search_goes_on_with_it(tmp_path: Path) -> None:
    """The run of a trial ends with an error and reports nothing: there is no score by which it would be stopped."""
    book = Book(str(tmp_path), PAPER)
    for number in range(4):
        book.save(make_trial(number, [report_of(10, 0.8)]))
    struck = make_trial(4, [], "running")
    book.save(struck)
    away = RunError("the training was given up: OutageError: s3://shards cannot be read")
    tune_trial = SimpleNamespace(config={"id": struck.id}, trial_id="x", get_error=lambda: away)
    Rungs(book, SEARCH).on_trial_error(None, tune_trial)
    BookKeeper(book, lambda trial: None).on_trial_error(1, [], tune_trial)
    again = Book(str(tmp_path), PAPER)
    assert (again.trials[struck.id].state, again.trials[struck.id].curve) == ("failed", ())
    assert "s3://shards cannot be read" in again.trials[struck.id].reason
    assert Proposals(again, SEARCH, configure).suggest("0")["id"] == struck.id


def test_rungs_survive_a_kill(tmp_path: Path) -> None:
    book = Book(str(tmp_path), PAPER)
    for number, score in enumerate((0.6, 0.7, 0.8)):
        book.save(make_trial(number, [report_of(10, score), report_of(20, score)]))
    newcomer = make_trial(3, [], "running")
    book.save(newcomer)
    weak = result_of(newcomer, 10, 0.5)
    assert Rungs(Book(str(tmp_path), PAPER), SEARCH).on_trial_result(None, *weak) == TrialScheduler.STOP
    assert Rungs(Book(str(tmp_path / "new"), PAPER), SEARCH).judge(newcomer.id, 10, 0.5) == TrialScheduler.CONTINUE


def test_the_front_is_of_finished_trials_that_none_beats(tmp_path: Path) -> None:
    assert [trial.number for trial in find_front(make_book(tmp_path).trials.values())] == [2, 0, 1]


def test_cost_counts_clips_hours_and_what_stopping_saved(tmp_path: Path) -> None:
    cost = count_cost(make_book(tmp_path), SEARCH)
    assert cost.clips == 4 * 720 + 80
    assert cost.saved_clips == 720 - 80
    assert cost.cpu_hours == pytest.approx(6 / 60 * 1.5)
    assert cost.gpu_hours == 0


def test_seeds_decide_between_the_best_few(tmp_path: Path) -> None:
    book = make_book(tmp_path)
    for trial, scores in ((book.finished()[0], (0.2, 0.2)), (book.finished()[1], (0.7, 0.7))):
        for seed, score in enumerate(scores, start=1):
            run = tmp_path / "confirm" / f"{trial.id}-seed-{seed}"
            run.mkdir(parents=True)
            run.joinpath("result.json").write_text(
                json.dumps({"last": "a", "best": "a", "metrics": vars(report_of(90, score))})
            )
    assert [trial.number for trial in chosen_few(book, 2)] == [1, 3, 0]
    outcome = conclude(book, SEARCH, num_best=2)
    assert outcome is not None
    assert outcome.best.number == 3
    assert outcome.best.seeds == (0.7, 0.7, 0.7)
    assert [trial.seeds for trial in outcome.front] == [(0.5,), (0.6,), (0.8,)]  # as they were compared
    assert outcome.paper is not None
    assert outcome.paper.seeds == (0.6,)
    make_finished(tmp_path, book=book)
    page = Path(write_search_report(str(tmp_path))).read_text()
    assert "70.0% ± 0.0%" in page
    table = pq.read_table(tmp_path / "sweep.parquet").to_pylist()
    assert [row["seeds"] for row in table] == [[0.6], [0.8, 0.2, 0.2], [0.5], [0.7, 0.7, 0.7], [], []]


def test_a_lucky_seed_does_not_win_over_means_when_confirmations_fail(tmp_path: Path) -> None:
    book = make_book(tmp_path)
    best, second = book.finished()[:2]
    jobs = [job["id"] for job in missing_confirmations(book, num_best=2, num_seeds=3)]
    assert jobs[:4] == [f"{trial.id}-seed-{seed}" for trial in (best, second) for seed in (1, 2)]
    for name in jobs[1:4]:  # the first has failed
        run = tmp_path / "confirm" / name
        run.mkdir(parents=True)
        scored = vars(report_of(90, 0.8 if best.id in name else 0.6))
        run.joinpath("result.json").write_text(json.dumps({"last": "a", "best": "a", "metrics": scored}))
    assert jobs[0] in [job["id"] for job in missing_confirmations(book, num_best=2, num_seeds=3)]
    outcome = conclude(book, SEARCH, num_best=2)
    assert outcome is not None
    assert outcome.best.id == second.id
    assert len(outcome.best.seeds) == 3
    assert confirmed_scores(book, best, list_confirmations(book)) == [0.8, 0.8]  # also of the seed after the gap


def test_seeds_of_an_earlier_start_that_asked_for_more_keep_no_trial_from_being_chosen(tmp_path: Path) -> None:
    book = make_book(tmp_path)
    best, second = book.finished()[:2]
    for trial, seeds, score in ((best, range(1, 5), 0.2), (second, range(1, 3), 0.7)):
        for seed in seeds:
            run = tmp_path / "confirm" / f"{trial.id}-seed-{seed}"
            run.mkdir(parents=True)
            scored = vars(report_of(90, score))
            run.joinpath("result.json").write_text(json.dumps({"last": "a", "best": "a", "metrics": scored}))
    assert missing_confirmations(book, num_best=2, num_seeds=3)[0]["id"].startswith(PAPER)
    outcome = conclude(book, SEARCH, num_best=2, num_seeds=3)
    assert outcome is not None
    assert (outcome.best.id, len(outcome.best.seeds)) == (second.id, 3)


def small_index() -> VideoIndex:
    """Six videos of two classes, which lie nowhere."""
    columns = {"label": [0, 1] * 3, "split": ["train"] * 4 + ["test"] * 2, "status": ["ok"] * 6}
    return VideoIndex(
        data="nowhere",
        table=pa.table({"id": list("uvwxyz"), **columns}),
        classes=("a", "b"),
        convention=ShardConvention(flow=CodecSettings().flow_convention()),
        sampling=FrameSampling(fps=25.0, short_side=40),
    )


def begun_with(weights: Path, **network: Any) -> Tune:
    """A search that begins with a checkpoint."""
    settings = PRESETS["debug"].change(
        network={"stream": "rgb", **network},
        initial={"source": "checkpoint", "weights": str(weights)},
        schedule={"steps": 6},
    )
    return Tune(data="nowhere", output="out", space=Space(conv1_kernels=(7,)), settings=settings)


def save_network(folder: Path, **settings: Any) -> None:
    config = {"stream": "rgb", "width": 0.125, "size": 32, "frames": 16, **settings}
    model = models.build("i3d", num_classes=2, **config)
    checkpoint.save(folder, model, checkpoint.Metadata(classes=("a", "b"), clips=ClipSettings().to_json()))


@pytest.mark.parametrize("gamma", [True, False])
def test_a_search_records_the_batch_norm_that_its_weights_have(tmp_path: Path, gamma: bool) -> None:
    save_network(tmp_path / "weights", bn_gamma=gamma)
    config = begun_with(tmp_path / "weights", set=(f"bn_gamma={json.dumps(not gamma)}",))
    search = make_search(config, Scale(num_workers=1), 1)
    prepare = make_prepare(config, small_index(), search)
    trained = {**search.space.paper(), "frame_step": 2}
    for geometry, seed in ((search.space.paper(), 0), (trained, 0), (trained, 1)):
        prepared = prepare(geometry, seed)
        assert prepared.run.describe()["model"]["bn_gamma"] is gamma
        # As the trial's process makes it, whose run.json is held against this when it is taken up again.
        model = make_model(prepared.run.model, prepared.initial, prepared.run.train.classes, seed=0)
        assert model.config == prepared.run.model


def test_what_a_search_found_for_weights_is_trained_with_these_weights(tmp_path: Path) -> None:
    """A frame step that was searched is no mistake, and --set could not undo it."""
    save_network(tmp_path / "weights")
    config = begun_with(tmp_path / "weights")
    found = {**make_search(config, Scale(num_workers=1), 1).space.paper(), "frame_step": 2}
    run, _ = prepare_run(with_geometry(config.settings, found), small_index(), Scale(num_workers=1))
    assert run.model.frame_step == 2  # type: ignore[attr-defined]
    asked = config.settings.change(network={"set": ("frame_step=2",)})
    with pytest.raises(NetworkError, match="frame_step"):
        prepare_run(asked, small_index(), Scale(num_workers=1))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"network": {"frames": 32}}, "--frames 32 and --from-sweep"),
        ({"network": {"set": ("dropout=0.1", "conv1_kernel=5")}}, "--set conv1_kernel=5 and --from-sweep"),
        ({"schedule": {"learning_rate": 0.1}}, "--learning-rate 0.1 and --from-sweep"),
        ({"network": {"frames": 16}, "schedule": {"learning_rate": 0.01}}, None),
    ],
)
def test_a_flag_is_not_replaced_by_what_a_search_found(
    tmp_path: Path, change: dict[str, Any], words: str | None
) -> None:
    searched = replace(SPACE, learning_rate=(0.001, 0.1), paper_learning_rate=0.01)
    book = Book(str(tmp_path), identify(searched.paper()))
    trial = replace(make_trial(0, [report_of(90, 0.5)]), id=identify(searched.paper()), geometry=searched.paper())
    book.save(trial)
    make_finished(tmp_path, book=book)
    settings = PRESETS["debug"].change(**change)
    if words is None:
        assert take_best(settings, str(tmp_path)).network.frames == 16
        return
    with pytest.raises(SettingsError, match=words):
        take_best(settings, str(tmp_path))


def test_a_search_without_a_validation_split_is_refused_before_it_begins(motion_shards: str, tmp_path: Path) -> None:
    done = run_here("tune", *tune(motion_shards, tmp_path / "out", "--validation-split", "none")[2:])
    assert done.returncode == 1
    assert "error: a search compares top-1 of a validation split" in done.stderr
    assert "one of test, train" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_search_that_has_lost_its_output_writes_nothing_more_and_its_trials_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trials go on in Ray's processes while their driver sleeps, and another search has their folders by then."""
    with lock_output(str(tmp_path)) as lock:
        book = Book(str(tmp_path), PAPER, lock.claim)
        book.save(make_trial(0, [report_of(10, 0.3)], "running"))
        written = (tmp_path / "trials" / PAPER / "trial.json").read_bytes()
        book.claim = replace(lock.claim, token="of a search before")
        book.save(make_trial(0, [], "failed"))
    assert (tmp_path / "trials" / PAPER / "trial.json").read_bytes() == written

    given: list[object] = []

    def train(*run: object, claim: object, **_: object) -> SimpleNamespace:
        given.append(claim)
        return SimpleNamespace(metrics={})

    monkeypatch.setattr(trials_module, "train", train)
    monkeypatch.setattr(trials_module, "TuneReportCallback", object)
    monkeypatch.setattr(trials_module.tune, "report", lambda _: None)
    settings = PRESETS["debug"].change(network={"stream": "rgb"})
    run, _ = prepare_run(settings, small_index(), Scale(num_workers=1))
    prepared = trials_module.Prepared(run=run, initial=settings.initial)
    job = {"id": PAPER, "geometry": SPACE.paper()}
    told = {"output": str(tmp_path), "scale": Scale(num_workers=1), "claim": book.claim}
    trials_module.run_trial(job, prepare=lambda *_: prepared, **told)
    assert given == [book.claim]


def test_a_search_without_a_finished_trial_has_no_outcome(tmp_path: Path) -> None:
    book = Book(str(tmp_path), PAPER)
    book.save(make_trial(0, [], "failed"))
    assert conclude(book, SEARCH, num_best=2) is None
    with pytest.raises(ValueError, match="holds no finished sweep"):
        read_outcome(str(tmp_path))


FLAGS = "--num-gpus 0 --stream flow --preset debug --steps 6 --learning-rate 0.02 --trials 2 --rungs 2 --confirm 0"
FLAGS += " --concurrent 1"


def tune(data: str, output: Path, *more: str) -> list[str]:
    return [sys.executable, "jobs/tune.py", "--data", data, "--output", str(output), *FLAGS.split(), *more]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model", "c3d"], "only i3d has the geometry"),
        (["--search-inflation", "center"], "give --init imagenet"),
        (["--reduction", "1"], "--reduction at least 2"),
        (["--concurrent", "0"], "--concurrent is 0"),
        (["--num-workers", "-1"], "--num-workers is -1"),
        (["--set", "frame_step=2"], "--set frame_step=2 is what is searched"),
        (["--init", "kinetics", "--weights", "flow.pt"], "give --search-conv1-kernels 7"),
    ],
)
def test_wrong_flags_end_with_a_sentence(tmp_path: Path, flags: list[str], words: str) -> None:
    done = run_here("tune", *tune("data", tmp_path, *flags)[2:])
    assert done.returncode != 0
    assert words in " ".join((done.stdout + done.stderr).replace("│", " ").split())


def ended(output: Path) -> dict[str, str]:
    """The records of the trials that came to an end, by id."""
    texts = {path.parent.name: path.read_text() for path in output.glob("trials/*/trial.json")}
    return {name: text for name, text in texts.items() if json.loads(text)["state"] in ("finished", "stopped")}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_search_goes_on_and_its_best_is_trained(motion_shards: str, tmp_path: Path) -> None:
    succeed("tune", *tune(motion_shards, tmp_path / "sweep", "--trials", "1")[2:])
    go_on(motion_shards, tmp_path / "sweep")


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_killed_search_goes_on_and_its_best_is_trained(motion_shards: str, tmp_path: Path) -> None:
    output = tmp_path / "sweep"
    log = (tmp_path / "log").open("wb")
    first = subprocess.Popen(tune(motion_shards, output), cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
    deadline = time.monotonic() + 400
    while not ended(output):
        assert first.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.1)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    go_on(motion_shards, output)


def go_on(motion_shards: str, output: Path) -> None:
    """The search, of which one trial has ended, to its end, and what is trained from it."""
    kept = ended(output)
    printed = succeed("tune", *tune(motion_shards, output)[2:])
    assert f"{len(kept)} of them known already" in printed
    assert {name: ended(output)[name] for name in kept} == kept
    table = pq.read_table(output / "sweep.parquet").to_pylist()
    assert [row["number"] for row in table] == [0, 1]
    assert all(row["state"] in ("finished", "stopped") for row in table)
    assert table[0]["paper"]
    assert table[0]["step"] == 6
    assert [point["step"] for point in table[0]["curve"]] == [2, 4, 6]
    assert json.loads(table[0]["configuration"])["model"]["conv1_kernel"] == 7
    assert "CPU hours" in printed
    refused = run_here("tune", *tune(motion_shards, output, "--steps", "72")[2:])
    assert "was begun with other settings" in refused.stderr
    # The best geometry, at full length.
    settings = take_best(PRESETS["debug"].change(network={"stream": "flow"}), str(output))
    run, _ = prepare_run(settings, read_index(motion_shards), Scale(num_workers=1))
    best = json.loads((output / "result.json").read_text())["best"]["settings"]
    found = run.describe()["model"]
    assert {name: found[name] for name in best} == best
