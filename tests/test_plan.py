"""Which video goes into which shard, what is left to do, and what happens when a command changes."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import pyarrow as pa
import pytest
from shard_rows import make_row

from pipelines import records, storage
from pipelines.datasets import catalog, shards
from pipelines.datasets.catalog import Catalog
from pipelines.datasets.records import ShardConvention
from pipelines.datasets.shards import ShardSettings
from pipelines.errors import RunError, SettingsChangedError, SettingsError
from pipelines.extraction import manifest
from pipelines.extraction import plan as plan_module
from pipelines.extraction.plan import ExtractionSettings, Plan, make_plan
from pipelines.extraction.work import begin_output, find_committed, find_work, iter_blocks
from pipelines.media import codec as codec_module
from pipelines.media.codec import CodecSettings
from pipelines.media.decode import DecodeSettings

SETTINGS = ExtractionSettings(codec=CodecSettings(flow_codec="h264"), shards=ShardSettings(videos_per_shard=3))


def catalog_of(sizes: dict[str, int], missing: Sequence[str] = ()) -> Catalog:
    """`sizes` videos of each split, called train0, train1, …; those in `missing` have no file."""
    ids = [(split, f"{split}{i}") for split, size in sizes.items() for i in range(size)]
    columns = {
        "id": [name for _, name in ids],
        "path": [None if name in missing else f"/videos/wave/{name}.mp4" for _, name in ids],
        "label": [0] * len(ids),
        "class_name": ["wave"] * len(ids),
        "split": [split for split, _ in ids],
        "start": [None] * len(ids),
        "end": [None] * len(ids),
    }
    return Catalog(pa.table(columns, schema=catalog.SCHEMA), ("wave",), "a test")


def plan_of(found: Catalog, output: Path, settings: ExtractionSettings = SETTINGS, kernel: str = "cpu") -> Plan:
    return make_plan(found, settings, videos="/videos", output=str(output), kernel=kernel)


def commit(plan: Plan, shard: str, status: dict[str, str]) -> None:
    """A commit record of a shard whose videos fared as `status` says."""
    row = {**dict.fromkeys(shards.ROW_SCHEMA.names), "split": shard.split("-")[0], "rgb": b"", "flow": b""}
    put_shard(plan, shard, [{**row, "id": name, "status": state} for name, state in status.items()])


def put_shard(plan: Plan, shard: str, rows: list[shards.Row]) -> None:
    settings, convention = plan.settings.shards, ShardConvention(flow={})
    shards.commit_shard(
        plan.output, shard, rows, settings=settings, convention=convention, fingerprint=plan.fingerprint
    )


def blocks_of(plan: Plan, *, retry: bool = False) -> list[dict[str, str]]:
    """Id → status for each block; padding left out."""
    blocks = [block.to_pylist() for block in iter_blocks(plan, find_committed(plan), retry=retry)]
    return [{row["id"]: row["status"] for row in block if row["status"] != "pad"} for block in blocks]


def test_a_task_reserves_memory_for_the_longest_video_that_there_may_be(tmp_path: Path) -> None:
    found = catalog_of({"train": 2})
    settings = ExtractionSettings(decode=DecodeSettings(max_frames=10_000, fps=25))
    spans = found.table.set_column(5, "start", pa.array([0.0, 3.0])).set_column(6, "end", pa.array([10.0, 23.0]))

    def reserve(**known: Any) -> int:
        catalog = dataclasses.replace(found, **known)
        return plan_of(catalog, tmp_path, settings).task_bytes - plan_module.TASK_BYTES

    longest = reserve()
    assert longest == plan_module.STORED_BYTES * 10_000 * 256 * 256 * 4 // 3
    assert reserve(table=spans) == pytest.approx(longest * 20 / 400, abs=1)
    assert reserve(largest_bytes=12_500 * 40) == pytest.approx(longest * 40 / 400, abs=1)
    assert reserve(largest_bytes=1 << 40) == longest


def test_memory_for_videos_at_their_own_rate_and_for_frames_of_an_exact_size(tmp_path: Path) -> None:
    found = dataclasses.replace(catalog_of({"train": 2}), largest_bytes=12_500 * 40)

    def reserve(**decode: Any) -> int:
        settings = ExtractionSettings(decode=DecodeSettings(**decode))
        return plan_of(found, tmp_path, settings).task_bytes - plan_module.TASK_BYTES

    at_25 = reserve()
    assert reserve(fps="native") == pytest.approx(at_25 * plan_module.NATIVE_FPS / 25, abs=4)
    assert reserve(fps="native", max_frames=100) == pytest.approx(at_25 * 100 / 1000, abs=4)
    assert reserve(frame_size="128x64") == pytest.approx(at_25 * 128 * 64 / (256 * 256 * 4 / 3), abs=4)


def test_plan_and_convention_say_rate_and_size(tmp_path: Path) -> None:
    settings = ExtractionSettings(decode=DecodeSettings(fps="native", frame_size="340x256"))
    named = plan_of(catalog_of({"train": 2}), tmp_path, settings).record.settings["decode"]
    said = {"fps": "native", "short_side": 256, "frame_size": "340x256"}
    assert named == said == plan_module.make_convention(settings, "cpu").sampling


def test_shards_hold_no_frames_of_odd_sizes() -> None:
    with pytest.raises(SettingsError, match=r"^--frame-size is native: shards hold"):
        ExtractionSettings(decode=DecodeSettings(frame_size="native"))


def test_a_shard_holds_one_split_in_catalog_order(tmp_path: Path) -> None:
    plan = plan_of(catalog_of({"train": 7, "test": 2}), tmp_path)
    assert plan.spans == {"train-00000": (0, 3), "train-00001": (3, 3), "train-00002": (6, 1), "test-00000": (7, 2)}
    assert plan.rows("train-00001")["id"].to_pylist() == ["train3", "train4", "train5"]
    assert plan.table["index"].to_pylist() == list(range(9))


def test_sources_are_relative_to_the_videos_folder(tmp_path: Path) -> None:
    plan = plan_of(catalog_of({"train": 2}, missing=["train1"]), tmp_path)
    assert plan.table.select(["source", "status"]).to_pylist() == [
        {"source": "wave/train0.mp4", "status": "new"},
        {"source": None, "status": "missing"},
    ]


def test_a_catalog_that_mixes_splits_is_not_planned(tmp_path: Path) -> None:
    found = catalog_of({"train": 2, "test": 1})
    mixed = dataclasses.replace(found, table=found.table.take([0, 2, 1]))
    with pytest.raises(AssertionError, match="ordered by split"):
        _ = plan_of(mixed, tmp_path).spans


def test_blocks_are_padded_to_the_same_size(tmp_path: Path) -> None:
    blocks = list(iter_blocks(plan_of(catalog_of({"train": 4, "test": 1}), tmp_path), {}, retry=False))
    assert [len(block) for block in blocks] == [3, 3, 3]
    assert [block["status"].to_pylist().count("pad") for block in blocks] == [0, 2, 2]
    assert [set(block["shard"].to_pylist()) for block in blocks] == [{"train-00000"}, {"train-00001"}, {"test-00000"}]
    assert all(block["id"].num_chunks == 1 for block in blocks)


def test_committed_shards_are_skipped(tmp_path: Path) -> None:
    plan = plan_of(catalog_of({"train": 5}), tmp_path)
    assert blocks_of(plan) == [dict.fromkeys(["train0", "train1", "train2"], "new"), {"train3": "new", "train4": "new"}]
    commit(plan, "train-00000", {"train0": "ok", "train1": "quarantined", "train2": "missing"})
    assert blocks_of(plan) == [{"train3": "new", "train4": "new"}]


def test_a_record_of_another_plan_is_no_commit(tmp_path: Path) -> None:
    plan = plan_of(catalog_of({"train": 3}), tmp_path)
    commit(dataclasses.replace(plan, fingerprint="another"), "train-00000", {"train0": "ok"})
    assert find_committed(plan) == {}
    assert len(blocks_of(plan)) == 1


def test_retry_keeps_what_is_held_and_does_the_rest_again(tmp_path: Path) -> None:
    plan = plan_of(catalog_of({"train": 9}), tmp_path)
    commit(plan, "train-00000", dict.fromkeys(["train0", "train1", "train2"], "ok"))
    commit(plan, "train-00001", {"train3": "ok", "train4": "quarantined", "train5": "ok"})
    assert blocks_of(plan, retry=True) == [
        {"train3": "kept", "train4": "new", "train5": "kept"},
        dict.fromkeys(["train6", "train7", "train8"], "new"),
    ]


def test_retry_takes_missing_videos_that_came_but_not_those_still_missing(tmp_path: Path) -> None:
    before = plan_of(catalog_of({"train": 6}, missing=["train1", "train4"]), tmp_path)
    commit(before, "train-00000", {"train0": "ok", "train1": "missing", "train2": "ok"})
    commit(before, "train-00001", {"train3": "ok", "train4": "missing", "train5": "ok"})
    now = plan_of(catalog_of({"train": 6}, missing=["train1"]), tmp_path)
    assert blocks_of(now, retry=True) == [{"train3": "kept", "train4": "new", "train5": "kept"}]


def test_retry_keeps_a_video_whose_file_has_gone_since(tmp_path: Path) -> None:
    before = plan_of(catalog_of({"train": 2}), tmp_path)
    commit(before, "train-00000", {"train0": "ok", "train1": "quarantined"})
    now = plan_of(catalog_of({"train": 2}, missing=["train0"]), tmp_path)
    assert blocks_of(now, retry=True) == [{"train0": "kept", "train1": "new"}]


def test_the_same_command_settles_again(tmp_path: Path) -> None:
    begin_output(plan_of(catalog_of({"train": 4}), tmp_path))
    written = (tmp_path / "plan.json").read_bytes()
    begin_output(plan_of(catalog_of({"train": 4}, missing=["train2"]), tmp_path))
    assert (tmp_path / "plan.json").read_bytes() == written


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "codec": ({"codec": CodecSettings(flow_codec="jpeg")}, "settings.codec.flow_codec: 'h264' there, 'jpeg' now"),
    "bound": ({"codec": CodecSettings(flow_codec="h264", bound=16)}, "settings.codec.bound: 20.0 there, 16 now"),
    "fps": ({"decode": DecodeSettings(fps=12.5)}, "settings.decode.fps: 25.0 there, 12.5 now"),
    "preset": ({"flow_preset": "fast"}, "settings.flow_preset: 'faithful' there, 'fast' now"),
    "shards": ({"shards": ShardSettings(videos_per_shard=4)}, "settings.shards.videos_per_shard: 3 there, 4 now"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_setting_is_named_and_no_other(tmp_path: Path, change: str) -> None:
    found = catalog_of({"train": 4})
    begin_output(plan_of(found, tmp_path))
    changed, line = CHANGES[change]
    with pytest.raises(SettingsChangedError) as refusal:
        begin_output(plan_of(found, tmp_path, dataclasses.replace(SETTINGS, **changed)))
    assert str(refusal.value).splitlines()[1:-1] == [f"  {line}"]
    assert "choose another --output" in str(refusal.value)


def test_all_changed_settings_are_named(tmp_path: Path) -> None:
    found = catalog_of({"train": 4})
    begin_output(plan_of(found, tmp_path))
    settings = dataclasses.replace(SETTINGS, flow_preset="fast", decode=DecodeSettings(short_side=128))
    with pytest.raises(
        SettingsChangedError, match=r"settings\.decode\.short_side.*\n.*settings\.flow_preset.*\n.*settings\.kernel"
    ):
        begin_output(plan_of(found, tmp_path, settings, kernel="another"))


def test_another_version_of_what_a_preset_stands_for_is_named(tmp_path: Path) -> None:
    plan = plan_of(catalog_of({"train": 4}), tmp_path)
    begin_output(plan)
    record = json.loads((tmp_path / "plan.json").read_bytes())
    record["derived"]["tvl1"]["theta"] = 0.5
    (tmp_path / "plan.json").write_bytes(records.encode(record))
    with pytest.raises(SettingsChangedError, match=r"derived\.tvl1\.theta: 0.5 there, 0.3 now"):
        begin_output(plan)


def test_a_limit_may_be_raised_on_the_same_output(tmp_path: Path) -> None:
    found = catalog_of({"train": 4})
    begin_output(plan_of(found, tmp_path))
    begin_output(
        plan_of(found, tmp_path, dataclasses.replace(SETTINGS, decode=DecodeSettings(timeout_s=300, max_frames=9)))
    )


def test_a_changed_catalog_is_named(tmp_path: Path) -> None:
    begin_output(plan_of(catalog_of({"train": 4}), tmp_path))
    with pytest.raises(SettingsChangedError, match=r"catalog\.sha256: .*\n  catalog\.videos: 4 there, 5 now"):
        begin_output(plan_of(catalog_of({"train": 5}), tmp_path))


def test_a_setting_that_only_one_side_knows_is_a_change_even_where_it_is_none(tmp_path: Path) -> None:
    plan = plan_of(catalog_of({"train": 4}), tmp_path)
    begin_output(plan)
    record = json.loads((tmp_path / "plan.json").read_bytes())
    del record["settings"]["codec"]["flow_quality"]
    (tmp_path / "plan.json").write_bytes(records.encode(record))
    with pytest.raises(SettingsChangedError, match=r"settings\.codec\.flow_quality: nothing there, None now"):
        begin_output(plan)


def test_fingerprints_tell_settings_and_catalogs_apart_but_not_places(tmp_path: Path) -> None:
    found = catalog_of({"train": 4})
    same = [plan_of(found, tmp_path), plan_of(found, tmp_path / "elsewhere")]
    same.append(plan_of(catalog_of({"train": 4}, missing=["train1"]), tmp_path))
    other = [plan_of(found, tmp_path, kernel="gpu"), plan_of(catalog_of({"train": 3}), tmp_path)]
    other.append(plan_of(found, tmp_path, dataclasses.replace(SETTINGS, error_sample_every=1)))
    assert len({plan.fingerprint for plan in same}) == 1
    assert len({plan.fingerprint for plan in same + other}) == 4


def constants() -> list[tuple[str, str]]:
    """(module, name) of whatever decides about frames without being a setting."""
    return [(module.__name__, name) for module in plan_module.DECODING for name in vars(module) if name.isupper()]


@pytest.mark.parametrize(("module", "name"), constants())
def test_a_constant_that_decides_about_frames_is_in_the_fingerprint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, name: str
) -> None:
    before = plan_of(catalog_of({"train": 1}), tmp_path).fingerprint
    monkeypatch.setattr(f"{module}.{name}", "changed")
    after = plan_of(catalog_of({"train": 1}), tmp_path).fingerprint
    assert (before == after) == (name in plan_module.BOUNDS)


def test_the_constants_that_are_known_to_decide_are_found() -> None:
    names = {name for _, name in constants()}
    assert {"MIN_DECODED_SHARE", "TRIM_MARGIN_S", "LAST_FRAME_S", "SCALING", "MAX_ASPECT_RATIO", "PAUSE_S"} <= names
    assert set(plan_module.BOUNDS) < names


@pytest.mark.parametrize(("table", "codec"), [("_FLOW_FORMATS", "h264"), ("_RGB_FORMATS", "h264")])
def test_an_encoders_options_are_in_the_fingerprint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: str, codec: str
) -> None:
    before = plan_of(catalog_of({"train": 1}), tmp_path).fingerprint
    formats = dict(getattr(codec_module, table))
    video = formats[codec].video if table == "_FLOW_FORMATS" else formats[codec]
    changed = dataclasses.replace(video, options={**video.options, "x264-params": "mbtree=1"})
    formats[codec] = dataclasses.replace(formats[codec], video=changed) if table == "_FLOW_FORMATS" else changed
    monkeypatch.setattr(codec_module, table, formats)
    assert plan_of(catalog_of({"train": 1}), tmp_path).fingerprint != before


def test_any_distribution_of_opencv_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def find_none(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", find_none)
    plan = plan_of(catalog_of({"train": 4}), tmp_path)
    assert plan.record.derived["libraries"]["opencv"] == cv2.__version__
    assert set(plan.record.derived["libraries"]) == {"av", "numpy", "opencv", "pyarrow"}


def spoil(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    path.unlink()
    if how == "flipped":
        data[len(data) // 2] ^= 1
    if how != "lost":
        path.write_bytes(data[:-1] if how == "cut off" else data)


@pytest.mark.parametrize("how", ["lost", "cut off", "flipped"])
def test_a_shard_that_is_not_as_it_was_committed_is_made_again(tmp_path: Path, how: str) -> None:
    plan = plan_of(catalog_of({"train": 3}), tmp_path)
    rows = [make_row(CodecSettings(), index, id=f"train{index}") for index in range(3)]
    put_shard(plan, "train-00000", [{**row, "status": "ok"} for row in rows])
    assert find_committed(plan, verify=True).keys() == {"train-00000"}
    spoil(tmp_path / "shards" / "train-00000.parquet", how)
    assert find_committed(plan).keys() == ({"train-00000"} if how == "flipped" else set())  # bytes are not read
    assert find_committed(plan, verify=True) == {}


@pytest.mark.parametrize("how", ["lost", "cut off", "flipped"])
def test_a_damaged_shard_is_not_made_again_without_the_files_of_its_videos(tmp_path: Path, how: str) -> None:
    """Made again it would be replaced by a shard without them, or by none: whatever of it is whole would be lost."""
    rows = [make_row(CodecSettings(), index, id=f"train{index}") for index in range(3)]
    before = plan_of(catalog_of({"train": 3}), tmp_path)
    put_shard(before, "train-00000", [{**row, "status": "ok"} for row in rows])
    now = plan_of(catalog_of({"train": 3}, missing=["train1", "train2"]), tmp_path)
    assert find_committed(now, verify=True).keys() == {"train-00000"}
    spoil(tmp_path / "shards" / "train-00000.parquet", how)
    with pytest.raises(RunError, match=r"the files of 2 videos in it are gone, such as that of train1\.") as refusal:
        find_committed(now, verify=True)
    Path(str(refusal.value).rpartition(" delete ")[2]).unlink()  # as it says
    assert find_committed(now, verify=True) == {}


def test_what_a_lost_node_left_is_gone_when_the_data_set_is_finished(tmp_path: Path) -> None:
    plan = plan_of(catalog_of({"train": 1}), tmp_path)
    put_shard(plan, "train-00000", [{**make_row(CodecSettings(), 0, id="train0"), "status": "ok"}])
    for folder in ("shards", "commits", "runs"):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / f"{storage.UNFINISHED}0123").touch()
    manifest.finish(plan, manifest.assemble(plan))
    assert not list(tmp_path.rglob(f"{storage.UNFINISHED}*"))


def test_a_damaged_shard_that_a_retry_was_about_to_replace_keeps_its_record_where_its_files_are_gone(
    tmp_path: Path,
) -> None:
    rows = [make_row(CodecSettings(), index, id=f"train{index}") for index in range(3)]
    plan = plan_of(catalog_of({"train": 3}), tmp_path)
    put_shard(plan, "train-00000", [{**row, "status": "ok"} for row in rows[:2]])
    with pytest.MonkeyPatch.context() as patch:
        puts = iter([None])
        patch.setattr(storage.Draft, "put", lambda draft, put=storage.Draft.put: (next(puts), put(draft)))
        with pytest.raises(StopIteration):  # the pending record was put, the shard was not
            put_shard(plan, "train-00000", [{**row, "status": "ok"} for row in rows])
    spoil(tmp_path / "shards" / "train-00000.parquet", "flipped")
    commits_there = sorted(path.name for path in (tmp_path / "commits").iterdir())
    assert len(commits_there) == 2
    now = plan_of(catalog_of({"train": 3}, missing=["train1"]), tmp_path)
    for _ in range(2):
        with pytest.raises(RunError, match="the files of 1 video in it are gone, such as that of train1"):
            find_work(now)
        assert sorted(path.name for path in (tmp_path / "commits").iterdir()) == commits_there
    assert [block["status"].to_pylist() for block in find_work(plan)] == [["new"] * 3]


def test_a_damaged_shard_is_made_again_where_only_videos_that_it_lacked_have_no_file(tmp_path: Path) -> None:
    plan = plan_of(catalog_of({"train": 3}, missing=["train1"]), tmp_path)
    commit(plan, "train-00000", {"train0": "ok", "train1": "missing", "train2": "ok"})
    spoil(tmp_path / "shards" / "train-00000.parquet", "lost")
    assert find_committed(plan) == {}
