"""The steps of the graph one by one, and the graph on a real Ray with CPU workers and pretended GPUs."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import io
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import pytest
import ray
from extracted import hashes
from test_decode import write_video

from pipelines import storage
from pipelines.datasets import shards
from pipelines.datasets.catalog import read_catalog
from pipelines.datasets.motion_videos import write_broken_videos, write_motion_videos
from pipelines.datasets.records import Dataset
from pipelines.datasets.shards import ShardSettings
from pipelines.errors import OutageError, OutputLockedError, RunError
from pipelines.extraction import flow_pool, manifest
from pipelines.extraction.flow_actor import FlowActor
from pipelines.extraction.graph import Steps, extract, start_actors
from pipelines.extraction.plan import ExtractionSettings, Plan, make_plan
from pipelines.extraction.tasks import OtherKernelError, Placement, build_graph, configure_ray_data, run_graph
from pipelines.extraction.work import find_committed, find_work, iter_blocks
from pipelines.lock import Claim, lock_output
from pipelines.media import codec
from pipelines.media.codec import CodecSettings
from pipelines.media.decode import DecodeSettings

SETTINGS = ExtractionSettings(
    decode=DecodeSettings(short_side=64),
    codec=CodecSettings(flow_codec="h264"),
    shards=ShardSettings(videos_per_shard=3),
    error_sample_every=4,
)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 good videos and 4 broken ones in a class of their own, all of one split."""
    folder = tmp_path_factory.mktemp("videos")
    write_motion_videos(folder, videos_per_class=2, seed=1, num_frames=6, size=(48, 32))
    write_broken_videos(folder / "train" / "broken")
    return folder


@pytest.fixture(scope="module")
def ray_cluster(ray_here: None) -> None:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test


def plan_of(videos: Path, output: Path, settings: ExtractionSettings = SETTINGS, kernel: str = "cpu") -> Plan:
    from pipelines import tvl1

    catalog = read_catalog(str(videos))
    return make_plan(catalog, settings, videos=str(videos), output=str(output), kernel=tvl1.kernel_target(kernel))


def steps_of(plan: Plan, kind: type[Steps] = Steps) -> Any:
    return kind.of(plan, backend="cpu")


def run(plan: Plan, *, retry: bool = False, placement: Placement | None = None) -> Dataset:
    """Extract to the end, as the job does."""
    for _ in extract(plan, find_work(plan, retry=retry), backend="cpu", placement=placement or Placement()):
        pass
    described = manifest.assemble(plan)
    manifest.finish(plan, described)
    return described


def good_rows(plan: Plan) -> list[dict[str, Any]]:
    return [row for row in plan.table.to_pylist() if "broken" not in row["id"]]


def test_extracted_row_is_true_to_the_video(videos: Path, tmp_path: Path) -> None:
    plan = plan_of(videos, tmp_path)
    row = next(row for row in good_rows(plan) if "right" in row["id"])
    done = steps_of(plan).extract(dict(row))
    assert (done["status"], done["num_frames"], done["height"], done["width"]) == ("ok", 6, 64, 96)
    assert (done["fps"], done["source_fps"]) == (25.0, 25.0)
    assert codec.decode_rgb(done["rgb"]).shape == (6, 64, 96, 3)
    flow = codec.decode_flow(done["flow"], SETTINGS.codec.flow_convention())
    assert flow.shape == (5, 64, 96, 2)
    assert flow[..., 0].mean() > 3 * abs(flow[..., 1].mean())
    assert done["source_sha256"] == hashlib.sha256(Path(row["path"]).read_bytes()).hexdigest()


@pytest.mark.parametrize("rate", [15, 30])
def test_a_video_at_its_own_rate_and_of_an_exact_size(tmp_path: Path, rate: int) -> None:
    settings = dataclasses.replace(SETTINGS, decode=DecodeSettings(fps="native", frame_size="68x64"))
    (tmp_path / "videos" / "wave").mkdir(parents=True)
    write_video(tmp_path / "videos" / "wave" / "1.mp4", frames=12, rate=rate, size=(96, 64))
    plan = plan_of(tmp_path / "videos", tmp_path, settings)
    done = steps_of(plan).extract(plan.table.to_pylist()[0])
    assert (done["status"], done["num_frames"], done["height"], done["width"]) == ("ok", 12, 64, 68)
    assert done["fps"] == done["source_fps"] == pytest.approx(rate)
    for blob in (done["rgb"], done["flow"]):
        with av.open(io.BytesIO(blob)) as container:
            assert container.streams.video[0].average_rate == rate
    assert codec.decode_flow(done["flow"], settings.codec.flow_convention()).shape == (11, 64, 68, 2)


def test_flow_error_is_measured_on_sampled_videos_only(videos: Path, tmp_path: Path) -> None:
    plan = plan_of(videos, tmp_path)
    row = good_rows(plan)[0]
    sampled, other = (steps_of(plan).extract({**row, "index": index}) for index in (4, 5))
    assert 0 < sampled["flow_error_mean"] <= sampled["flow_error_rms"] <= sampled["flow_error_max"] < 2
    assert other["flow_error_mean"] is None


def test_a_video_of_one_frame_has_no_flow(tmp_path: Path) -> None:
    write_motion_videos(tmp_path / "videos", videos_per_class=1, seed=0, num_frames=1, size=(32, 32))
    plan = plan_of(tmp_path / "videos", tmp_path / "out")
    done = steps_of(plan).extract(good_rows(plan)[0])
    assert (done["status"], done["num_frames"], done["flow"]) == ("ok", 1, b"")


def test_broken_videos_become_rows_with_a_reason(videos: Path, tmp_path: Path) -> None:
    plan = plan_of(videos, tmp_path)
    broken = [steps_of(plan).extract(dict(row)) for row in plan.table.to_pylist() if "broken" in row["id"]]
    assert {row["status"] for row in broken} == {"quarantined"}
    assert {row["stage"] for row in broken} == {"decode"}
    assert all(row["error_message"] and row["rgb"] is None for row in broken)


@pytest.mark.parametrize("span", ["20,10", "5,5", "zero,10", ","])
def test_a_span_without_time_is_quarantined_with_that_reason(tmp_path: Path, span: str) -> None:
    write_motion_videos(tmp_path / "videos", videos_per_class=1, seed=0, num_frames=2, size=(32, 32))
    rows = "label,youtube_id,time_start,time_end", "up,up_0000,0,1", f"up,up_0000,{span}"
    (tmp_path / "list.csv").write_text("\n".join(rows))
    catalog = read_catalog(str(tmp_path / "videos"), str(tmp_path / "list.csv"))
    plan = make_plan(catalog, SETTINGS, videos=str(tmp_path / "videos"), output=str(tmp_path), kernel="cpu")
    bad, good = sorted(map(steps_of(plan).extract, plan.table.to_pylist()), key=lambda row: row["status"] == "ok")
    assert (bad["status"], bad["error_kind"], good["status"]) == ("quarantined", "empty_span", "ok")
    json.dumps([bad["start"], bad["end"]], allow_nan=False)


def test_a_failure_of_another_kind_costs_one_video(videos: Path, tmp_path: Path, monkeypatch: Any) -> None:
    plan = plan_of(videos, tmp_path)

    def fail(*args: object, **kwargs: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr("pipelines.tvl1.iter_flow", fail)
    row = steps_of(plan).extract(good_rows(plan)[0])
    assert (row["status"], row["stage"], row["error_kind"], row["error_message"]) == (
        "quarantined", "flow", "MemoryError", "no room",
    )  # fmt: skip


def test_what_a_machine_has_run_out_of_ends_the_run_and_costs_no_video(
    videos: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    plan = plan_of(videos, tmp_path)

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr("pipelines.tvl1.iter_flow", fail)
    with pytest.raises(OutageError, match="Too many open files"):
        steps_of(plan).extract(good_rows(plan)[0])


def test_a_file_that_is_gone_costs_that_video_and_a_folder_that_is_gone_the_run(tmp_path: Path) -> None:
    write_motion_videos(tmp_path / "videos", videos_per_class=1, seed=0, num_frames=2, size=(32, 32))
    plan = plan_of(tmp_path / "videos", tmp_path / "out")
    row = good_rows(plan)[0]
    Path(row["path"]).unlink()
    assert steps_of(plan).extract(dict(row))["error_kind"] == "unreadable"
    shutil.rmtree(tmp_path / "videos")
    for _ in range(2):
        with pytest.raises(OutageError, match="videos"):
            steps_of(plan).extract(dict(row))
        (tmp_path / "videos").mkdir(exist_ok=True)  # where something was mounted


@pytest.mark.parametrize("how", ["written to", "replaced", "removed"])
def test_a_source_that_changes_while_it_is_decoded_is_not_hashed_as_if_it_had_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    write_motion_videos(tmp_path / "videos", videos_per_class=1, seed=0, num_frames=2, size=(32, 32))
    plan = plan_of(tmp_path / "videos", tmp_path / "out")
    row, other = good_rows(plan)[:2]
    path, decode = Path(row["path"]), Steps._encode

    def change_after_decoding(self: Steps, *given: Any) -> Any:
        encoded = decode(self, *given)
        if how == "written to":
            with path.open("r+b") as file:
                file.write(b"x")
        elif how == "replaced":
            shutil.copy(other["path"], tmp_path / "new")
            (tmp_path / "new").replace(path)
        else:
            path.unlink()
        return encoded

    monkeypatch.setattr(Steps, "_encode", change_after_decoding)
    done = steps_of(plan).extract(dict(row))
    assert (done["status"], done["stage"], done["error_kind"]) == ("quarantined", "decode", "changed")
    monkeypatch.undo()
    assert steps_of(plan).extract(dict(other))["status"] == "ok"


def test_refused_credentials_end_the_run(s3: str, s3_faults: list[str], tmp_path: Path) -> None:
    storage.put(f"{s3}/videos/a.mp4", b"x")
    plan = make_plan(read_catalog(f"{s3}/videos"), SETTINGS, videos=f"{s3}/videos", output=str(tmp_path), kernel="cpu")
    (row,) = plan.table.to_pylist()
    s3_faults.append("403 AccessDenied")
    assert steps_of(plan).extract(dict(row))["error_kind"] == "unreadable"
    for faults in (["403 ExpiredToken"], ["403 AccessDenied"] * 2, ["404 NoSuchBucket"]):
        s3_faults[:] = faults
        with pytest.raises(OutageError, match=faults[0].split()[1]):
            steps_of(plan).extract(dict(row))


def test_a_worker_of_another_processor_family_is_refused(videos: Path, tmp_path: Path) -> None:
    plan = dataclasses.replace(plan_of(videos, tmp_path), kernel="cpu of another family")
    with pytest.raises(OtherKernelError, match="another family"):
        steps_of(plan).make_shard(next(iter_blocks(plan, {}, retry=False)))
    assert not hashes(tmp_path)


def test_every_video_is_accounted_for(ray_cluster: None, videos: Path, tmp_path: Path) -> None:
    described = run(plan_of(videos, tmp_path))
    counts = [(split.expected, split.ok, split.quarantined) for split in described.splits.values()]
    assert list(map(sum, zip(*counts, strict=True))) == [16, 12, 4]
    rows = [row for shard in described.shards for row in shards.read_rows(str(tmp_path / shard.file))]
    assert len({row["id"] for row in rows}) == 12
    assert sum(described.quarantine_reasons.values()) == 4


def test_one_worker_and_three_make_the_same_bytes(ray_cluster: None, videos: Path, tmp_path: Path) -> None:
    run(plan_of(videos, tmp_path / "one"), placement=Placement(num_cpus=1))
    run(plan_of(videos, tmp_path / "three"), placement=Placement(num_cpus=3))
    assert hashes(tmp_path / "one") == hashes(tmp_path / "three")


def test_a_restart_does_only_what_is_missing(ray_cluster: None, videos: Path, tmp_path: Path) -> None:
    plan = plan_of(videos, tmp_path)
    run(plan)
    before = hashes(tmp_path)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "shards").iterdir()}
    lost = max(kept)
    lost.unlink()
    (tmp_path / "commits" / f"{lost.stem}.json").unlink()
    run(plan)
    assert hashes(tmp_path) == before
    assert {path for path in kept if path.stat().st_mtime_ns != kept[path]} == {lost}


def test_retry_takes_in_a_repaired_video_as_if_it_had_never_failed(
    ray_cluster: None, videos: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "videos"
    write_motion_videos(folder, videos_per_class=2, seed=1, num_frames=6, size=(48, 32))
    repaired = folder / "train" / "left" / "left_0001.mp4"
    good = repaired.read_bytes()
    run(plan_of(folder, tmp_path / "undisturbed"))
    repaired.write_bytes(good[:100])
    assert run(plan_of(folder, tmp_path / "out")).quarantine_reasons
    repaired.write_bytes(good)
    assert not run(plan_of(folder, tmp_path / "out"), retry=True).quarantine_reasons
    assert hashes(tmp_path / "out") == hashes(tmp_path / "undisturbed")


def test_a_task_that_outlived_its_run_replaces_no_shard(videos: Path, tmp_path: Path) -> None:
    """The sources of a finished data set are gone: to such a task all of them look broken."""
    copy = tmp_path / "videos"
    shutil.copytree(videos, copy, ignore=shutil.ignore_patterns("broken"))
    plan = plan_of(copy, tmp_path / "out")
    blocks = find_work(plan)
    with lock_output(plan.output) as first:
        steps = dataclasses.replace(steps_of(plan), claim=first.claim)
        for block in blocks:
            steps.make_shard(block)
    before = hashes(tmp_path / "out")
    shutil.rmtree(copy / "train" / "up")
    late = dataclasses.replace(steps, claim=None)
    with lock_output(plan.output):
        for claim_is_lost_at in range(3):  # before the first video, after it, and before the commit
            claim = LostClaim(output=plan.output, token=first.claim.token, passes=iter([None] * claim_is_lost_at))
            with pytest.raises(OutputLockedError, match="taken over"):
                dataclasses.replace(late, claim=claim).make_shard(blocks[-1])
            assert hashes(tmp_path / "out") == before


@dataclasses.dataclass(frozen=True, kw_only=True)
class LostClaim(Claim):
    """The claim of a run that loses its lock after so many looks."""

    passes: Iterator[None]

    def check(self) -> None:
        if next(self.passes, self) is self:
            super().check()


def test_a_retry_keeps_nothing_of_a_shard_that_has_changed(videos: Path, tmp_path: Path) -> None:
    plan = plan_of(videos, tmp_path)
    steps = steps_of(plan)

    def extract_here(*, retry: bool) -> None:
        for block in iter_blocks(plan, find_committed(plan), retry=retry):
            steps.make_shard(block)

    extract_here(retry=False)
    for path in (tmp_path / "shards").iterdir():
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    with pytest.raises(RunError, match=r"is not as it was committed.* --verify"):
        extract_here(retry=True)


class NotingSteps(Steps):
    """Steps that note, in a folder beside the output, how many GPUs the task had."""

    def extract(self, row: dict[str, Any]) -> dict[str, Any]:
        note(Path(f"{self.output}.notes"), "extract")
        return super().extract(row)


class NotingActor(FlowActor):
    """A flow actor that notes the same, and the bytes that its frames take."""

    notes = ""

    def solve(self, frames: Any, num_samples: int) -> Any:
        note(Path(self.notes), "flow", frames.nbytes)
        return super().solve(frames, num_samples)


def note(folder: Path, step: str, size: int = 0) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{step}-{len(ray.get_gpu_ids())}gpus-{os.getpid()}-{size}").touch()


def test_with_gpus_flow_runs_on_actors_that_hold_them_and_nothing_else_does(
    ray_cluster: None, videos: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    run(plan_of(videos, tmp_path / "cpu"))
    plan = plan_of(videos, tmp_path / "gpu")
    monkeypatch.setattr(NotingActor, "notes", f"{plan.output}.notes")
    monkeypatch.setattr(flow_pool, "FlowActor", NotingActor)
    placement = Placement(flow_actors=2, gpus_per_actor=0.5)
    with start_actors(plan.settings, "cpu", placement) as pool:
        assert pool is not None
        assert pool.kernel() == plan.kernel
        pool.batch_pixels = 2 * 64 * 96  # two pairs a batch, of five: pieces of any size give the same bytes
        noting = NotingSteps.of(plan, backend="none", pool=pool)
        committed = list(run_graph(iter_blocks(plan, {}, retry=False), noting, placement))
        assert len([seconds for seconds in pool.busy_seconds() if seconds > 0]) == 2
    assert [row["shard"] for row in committed] == list(plan.spans)
    manifest.finish(plan, manifest.assemble(plan))
    assert hashes(tmp_path / "gpu").keys() - {"plan.json"} == hashes(tmp_path / "cpu").keys() - {"plan.json"}
    assert all(hashes(tmp_path / "cpu")[name] == sha for name, sha in hashes(tmp_path / "gpu").items())
    notes = {tuple(path.name.split("-")) for path in (tmp_path / "gpu.notes").iterdir()}
    assert {(step, gpus) for step, gpus, *_ in notes} == {("extract", "0gpus"), ("flow", "1gpus")}
    flow_pids = {pid for step, _, pid, _ in notes if step == "flow"}
    assert len(flow_pids) == 2
    assert flow_pids.isdisjoint(pid for step, _, pid, _ in notes if step != "flow")
    assert {int(size) for step, *_, size in notes if step == "flow"} == {frames * 64 * 96 for frames in (2, 3)}


def test_the_graph_is_one_operator(ray_cluster: None, videos: Path, tmp_path: Path) -> None:
    plan = plan_of(videos, tmp_path)
    configure_ray_data(Placement())
    graph = build_graph(list(iter_blocks(plan, {}, retry=False))[:1], steps_of(plan), Placement())
    assert len(graph.take_all()) == 1
    assert "MapBatches(make_or_leave)" in graph.stats()


class DyingSteps(Steps):
    """Steps whose worker dies in the middle of a certain video: once, or every time."""

    once = True

    def extract(self, row: dict[str, Any]) -> dict[str, Any]:
        mark = Path(f"{self.output}.died")
        if row["id"] and "up_0001" in row["id"] and not (self.once and mark.exists()):
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().extract(row)


class AlwaysDyingSteps(DyingSteps):
    once = False


def test_a_killed_worker_changes_nothing(ray_cluster: None, videos: Path, tmp_path: Path) -> None:
    run(plan_of(videos, tmp_path / "undisturbed"))
    plan = plan_of(videos, tmp_path / "killed")
    dying = steps_of(plan, DyingSteps)
    list(run_graph(iter_blocks(plan, {}, retry=False), dying, Placement()))
    assert Path(f"{plan.output}.died").exists()
    run(plan)
    assert hashes(tmp_path / "killed") == hashes(tmp_path / "undisturbed")


@pytest.mark.slow
def test_a_video_that_always_kills_its_worker_ends_the_run(ray_cluster: None, videos: Path, tmp_path: Path) -> None:
    plan = plan_of(videos, tmp_path)
    dying = steps_of(plan, AlwaysDyingSteps)
    with pytest.raises(RunError, match="a worker process died 4 times in the same task"):
        list(run_graph(iter_blocks(plan, {}, retry=False), dying, Placement()))
