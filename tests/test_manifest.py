"""What a finished data set says of itself, and that an unfinished one says nothing."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shard_rows import NUM_FRAMES, convention_of, make_row

from pipelines.datasets import catalog, shards
from pipelines.datasets.catalog import Catalog
from pipelines.datasets.records import SplitCounts, Totals, read_dataset
from pipelines.datasets.shards import Row, ShardSettings
from pipelines.extraction import manifest
from pipelines.extraction.manifest import UnfinishedError
from pipelines.extraction.plan import ExtractionSettings, Plan, make_plan
from pipelines.media.codec import CodecSettings

CODEC = CodecSettings(flow_codec="h264")
SETTINGS = ExtractionSettings(codec=CODEC, shards=ShardSettings(videos_per_shard=2))
VIDEOS = {"train": ["a", "b", "c", "d", "e"], "test": ["f", "g"]}
FATES = {"b": "quarantined", "c": "missing", "f": "quarantined", "g": "quarantined"}  # the others are ok
ERRORS = {"a": (0.02, 0.03, 0.2, 1.0), "d": (0.04, 0.04, 0.1, 2.0)}  # of the sampled: mean, rms, p999, max


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """Shards train-00000 (a, b), train-00001 (c, d), train-00002 (e) and test-00000 (f, g)."""
    rows = [(name, split) for split, names in VIDEOS.items() for name in names]
    columns: dict[str, list[Any]] = {
        "id": [name for name, _ in rows],
        "path": [None if name in FATES and FATES[name] == "missing" else f"/v/{name}.mp4" for name, _ in rows],
        "label": [0] * len(rows),
        "class_name": ["wave"] * len(rows),
        "split": [split for _, split in rows],
        "start": [None] * len(rows),
        "end": [None] * len(rows),
    }
    found = Catalog(pa.table(columns, schema=catalog.SCHEMA), ("wave", "kick"), "a test")
    return make_plan(found, SETTINGS, videos="/v", output=str(tmp_path), kernel="cpu-test")


def commit(plan: Plan, shard: str) -> None:
    """Commit a planned shard whose videos fare as FATES and ERRORS say."""
    rows = []
    for planned in plan.rows(shard).to_pylist():
        name = planned["id"]
        error: dict[str, Any] = dict(zip(manifest.ERROR_COLUMNS, ERRORS.get(name, ()), strict=False))
        row = make_row(CODEC, id=name, split=planned["split"], **error)
        fate = FATES.get(name, "ok")
        rows.append({**row, "status": "ok"} if fate == "ok" else lost(row, fate))
    shards.commit_shard(
        plan.output,
        shard,
        rows,
        settings=plan.settings.shards,
        convention=convention_of(CODEC),
        fingerprint=plan.fingerprint,
    )


def lost(row: Row, fate: str) -> Row:
    facts = {name: row[name] for name in ("id", "split", "class_name", "label", "source")}
    kind = {"error_kind": "no_frames", "stage": "decode"} if fate == "quarantined" else {}
    return {**dict.fromkeys(shards.VIDEO_SCHEMA.names), **facts, **kind, "status": fate}


def commit_all(plan: Plan) -> None:
    for shard in plan.spans:
        commit(plan, shard)


def test_every_video_of_the_catalog_is_accounted_for(plan: Plan) -> None:
    commit_all(plan)
    assert manifest.assemble(plan).splits == {
        "train": SplitCounts(expected=5, ok=3, missing=1, quarantined=1, frames=3 * NUM_FRAMES),
        "test": SplitCounts(expected=2, ok=0, missing=0, quarantined=2, frames=0),
    }
    videos = pq.read_table(f"{plan.output}/videos.parquet")
    assert sorted(videos["id"].to_pylist()) == ["a", "b", "c", "d", "e", "f", "g"]
    assert sorted(pq.read_table(f"{plan.output}/quarantine.parquet")["id"].to_pylist()) == ["b", "f", "g"]


def test_totals_reasons_and_errors_add_up(plan: Plan) -> None:
    commit_all(plan)
    described = manifest.assemble(plan)
    sizes = pq.read_table(f"{plan.output}/videos.parquet").to_pydict()
    assert described.totals == Totals(
        frames=3 * NUM_FRAMES,
        flow_frames=3 * (NUM_FRAMES - 1),
        rgb_bytes=sum(size or 0 for size in sizes["rgb_bytes"]),
        flow_bytes=sum(size or 0 for size in sizes["flow_bytes"]),
    )
    assert described.quarantine_reasons == {"no_frames": 3}
    assert vars(described.flow_error_px) == pytest.approx(
        {"videos": 2, "mean": 0.03, "rms": (0.0025 / 2) ** 0.5, "p999": 0.2, "max": 2.0}
    )


def test_shards_are_listed_with_the_hash_of_what_is_there(plan: Plan) -> None:
    commit_all(plan)
    listed = manifest.assemble(plan).shards
    assert [(shard.file, shard.split, shard.rows) for shard in listed] == [
        ("shards/train-00000.parquet", "train", 1),
        ("shards/train-00001.parquet", "train", 1),
        ("shards/train-00002.parquet", "train", 1),
    ]  # every video of test-00000 failed
    for shard in listed:
        data = (Path(plan.output) / shard.file).read_bytes()
        assert (shard.bytes, shard.sha256) == (len(data), hashlib.sha256(data).hexdigest())


def test_a_missing_shard_is_named_and_no_table_is_left(plan: Plan) -> None:
    for shard in sorted(plan.spans)[:-1]:
        commit(plan, shard)
    with pytest.raises(
        UnfinishedError, match=r"lacks 1 shard, not made or not there as made, such as train-00002: the same"
    ):
        manifest.assemble(plan)
    assert not (Path(plan.output) / "dataset.json").exists()


@pytest.mark.parametrize("cut", [None, 100])
def test_a_shard_that_was_lost_or_cut_off_since_is_not_listed(plan: Plan, cut: int | None) -> None:
    commit_all(plan)
    lost = next(Path(plan.output).glob("shards/train-00001.*"))
    data = lost.read_bytes()
    lost.unlink()
    if cut:
        lost.write_bytes(data[:-cut])
    with pytest.raises(
        UnfinishedError, match=r"lacks 1 shard, not made or not there as made, such as shards/train-00001"
    ):
        manifest.assemble(plan)


def test_a_record_that_another_writer_left_beside_its_shard_is_settled_first(plan: Plan) -> None:
    """Of the same size, so that nothing but the hash tells."""
    commit_all(plan)
    record = Path(plan.output) / "commits" / "train-00001.json"
    truth = record.read_bytes()
    (record.parent / "train-00001.0123.pending").write_bytes(truth)
    record.write_bytes(re.sub(rb'"sha256": "[0-9a-f]{8}', b'"sha256": "00000000', truth, count=1))
    manifest.assemble(plan)
    assert record.read_bytes() == truth
    assert not list(record.parent.glob("*.pending"))


def test_records_of_another_plan_do_not_count(plan: Plan) -> None:
    commit_all(plan)
    commit(dataclasses.replace(plan, fingerprint="another"), "train-00001")
    with pytest.raises(UnfinishedError, match="train-00001"):
        manifest.assemble(plan)


def test_a_finished_data_set_is_read_as_it_was_described(plan: Plan) -> None:
    commit_all(plan)
    described = manifest.assemble(plan)
    manifest.finish(plan, described)
    found = read_dataset(plan.output)
    assert found == described
    assert found.classes == ("wave", "kick")
    assert found.fingerprint == plan.fingerprint
    assert found.convention.flow == CODEC.flow_convention()


def test_assembling_again_gives_the_same_bytes(plan: Plan) -> None:
    commit_all(plan)

    def assemble() -> dict[str, bytes]:
        manifest.finish(plan, manifest.assemble(plan))
        return {path.name: path.read_bytes() for path in Path(plan.output).iterdir() if path.is_file()}

    first = assemble()
    assert set(first) == {"videos.parquet", "quarantine.parquet", "dataset.json"}
    assert assemble() == first


def test_a_data_set_is_assembled_on_s3(plan: Plan, s3: str) -> None:
    commit_all(plan)
    remote = dataclasses.replace(plan, output=f"{s3}/out")
    commit_all(remote)
    assert manifest.assemble(remote) == manifest.assemble(plan)
