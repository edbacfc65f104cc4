"""A good data set passes; whatever is changed in one is found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fixtures_jobs import NO_GPUS, run_here, succeed
from page_text import read_page
from test_decode import write_video

from jobs.verify import Verify, run
from pipelines.datasets.video_index import read_index
from pipelines.extraction import verify
from pipelines.extraction.verify import choose_samples
from pipelines.media.decode import DecodeSettings


@pytest.fixture
def copy(motion_shards: str, tmp_path: Path) -> Path:
    """A data set that a test may spoil."""
    shutil.copytree(motion_shards, tmp_path / "copy")
    return tmp_path / "copy"


def found(output: Path, **flags: object) -> str:
    return "\n".join(f"{finding.where}: {finding.what}" for finding in run(Verify(data=str(output), **flags)))  # type: ignore[arg-type]


def test_a_good_data_set_passes_sources_included(motion_shards: str, capsys: pytest.CaptureFixture[str]) -> None:
    videos = str(Path(motion_shards).parent / "videos")
    assert found(Path(motion_shards), videos=videos, samples=3) == ""
    printed = capsys.readouterr().out
    assert printed.count("px mean") == 3
    assert "ok      20 videos in the tables" in printed


def test_videos_at_their_own_rate_pass_sources_included(
    ray_here: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the command to the check and the page: every picture once, at 15 and 30 a second, squeezed to one size."""
    for rate in (15, 30):
        (tmp_path / "videos" / f"at{rate}").mkdir(parents=True)
        write_video(tmp_path / "videos" / f"at{rate}" / "1.mp4", frames=3 * rate, rate=rate, size=(96, 64))
    out = tmp_path / "out"
    flags = ("--fps", "native", "--frame-size", "40x32", "--videos-per-shard", "1", *NO_GPUS)
    succeed("extract_flow", "--videos", tmp_path / "videos", "--output", out, *flags)
    assert found(out, videos=str(tmp_path / "videos"), samples=2) == ""
    rows = pq.read_table(out / "videos.parquet", columns=["class_name", "fps", "source_fps", "num_frames"]).to_pylist()
    assert [list(row.values()) for row in sorted(rows, key=lambda row: row["fps"])] == [
        ["at15", 15, 15, 45],
        ["at30", 30, 30, 90],
    ]
    page = read_page((out / "report.html").read_text())
    for line in ("6 s of video", "Frames a second 15 to 30, median 22.5", "Frames a video 45 to 90, median 68"):
        assert line in page
    assert "Frame sizes 40×32 (2)" in page
    assert "decode.fps native" in page
    assert "low-rate" not in page


def flip_a_byte(output: Path) -> None:
    path = output / "shards" / "train-00000.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def cut_a_shard(output: Path) -> None:
    path = output / "shards" / "test-00000.parquet"
    path.write_bytes(path.read_bytes()[:-100])


def forget_a_video(output: Path) -> None:
    table = pq.read_table(output / "videos.parquet")
    pq.write_table(table.slice(1), output / "videos.parquet")


def empty_the_quarantine(output: Path) -> None:
    table = pq.read_table(output / "quarantine.parquet")
    pq.write_table(pa.table(table.schema.empty_table()), output / "quarantine.parquet")


def edit_commit(output: Path, change: Callable[[dict[str, Any]], object], name: str = "train-00000") -> None:
    path = output / "commits" / f"{name}.json"
    commit = json.loads(path.read_text())
    change(commit)
    path.write_text(json.dumps(commit))


def take_a_video_twice(output: Path) -> None:
    other = json.loads((output / "commits" / "train-00001.json").read_text())["videos"][0]
    edit_commit(output, lambda commit: commit["videos"].append(other))


def relabel_a_video(output: Path) -> None:
    edit_commit(output, lambda commit: commit["videos"][0].update(label=5))


def lose_a_missing_video(output: Path) -> None:
    for name in ("test-00000", "test-00001"):
        edit_commit(
            output,
            lambda commit: commit.update(videos=[row for row in commit["videos"] if row["status"] != "missing"]),
            name,
        )


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (take_a_video_twice, "2 commit records hold it"),
        (relabel_a_video, "ids, labels or splits are not those of the catalog"),
        (lose_a_missing_video, "the catalog has 20 videos, the records 19"),
        (lambda output: edit_commit(output, lambda commit: commit.update(fingerprint="x")), "made with other settings"),
        (lambda output: (output / "plan.json").write_text("{}"), "plan.json: its settings are not those"),
        (flip_a_byte, "train-00000.parquet: its bytes are not those of its record"),
        (cut_a_shard, "test-00000.parquet: has"),
        (lambda output: (output / "shards" / "train-00001.parquet").unlink(), "train-00001.parquet: cannot be read"),
        (lambda output: (output / "commits" / "train-00001.json").unlink(), "no commit record vouches for it"),
        (lambda output: (output / "shards" / "extra.parquet").write_bytes(b"x"), "extra.parquet: no commit record"),
        (forget_a_video, "videos.parquet: only the commit records say"),
        (empty_the_quarantine, "quarantine.parquet: does not hold exactly"),
    ],
)
def test_what_is_spoilt_is_found(copy: Path, spoil: Callable[[Path], object], message: str) -> None:
    spoil(copy)
    assert message in found(copy, samples=0)


def test_the_remedy_is_the_same_command_and_not_a_part_of_it(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A command without the flags that the extraction had would be refused."""
    cut_a_shard(copy)
    assert found(copy, samples=0)
    last = capsys.readouterr().out.splitlines()[-1]
    assert "with all the flags it had and --verify" in last
    assert "jobs/extract_flow.py" not in last


def test_shards_that_do_not_decode_are_found(copy: Path) -> None:
    (copy / "shards" / "train-00000.parquet").write_bytes(b"PAR1 no")
    assert "cannot be decoded" in found(copy, samples=18)


def test_limits_of_the_extraction_do_not_matter(motion_shards: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They may have been raised, or be others by now; a data set does not record them."""
    monkeypatch.setitem(DecodeSettings.__init__.__kwdefaults__, "max_frames", 3)
    monkeypatch.setitem(DecodeSettings.__init__.__kwdefaults__, "max_gap_s", 0.001)
    assert DecodeSettings().max_frames == 3
    assert found(Path(motion_shards), videos=str(Path(motion_shards).parent / "videos"), samples=2) == ""


def test_a_long_video_is_compared_batch_by_batch(
    motion_shards: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    videos = str(Path(motion_shards).parent / "videos")
    found(Path(motion_shards), videos=videos, samples=2)
    whole = capsys.readouterr().out
    monkeypatch.setattr(verify, "WINDOW", 4)
    monkeypatch.setattr(verify, "BATCH_PIXELS", 3 * 40 * 40)
    assert found(Path(motion_shards), videos=videos, samples=2) == ""
    assert capsys.readouterr().out == whole


def test_a_damaged_shard_beside_its_source_is_a_finding(copy: Path, motion_shards: str) -> None:
    for path in (copy / "shards").iterdir():
        path.write_bytes(b"PAR1 no")
    said = found(copy, videos=str(Path(motion_shards).parent / "videos"), samples=2)
    assert said.count("cannot be decoded") == 2
    assert said.count(".mp4: ") == 2


def test_another_source_is_found(motion_shards: str, tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    shutil.copytree(Path(motion_shards).parent / "videos", videos)
    for path in videos.rglob("*.mp4"):
        path.write_bytes(path.read_bytes() + b"\0")
    assert "is not the file that it was made of" in found(Path(motion_shards), videos=str(videos), samples=2)


def test_the_exit_status_and_one_line_say_it(copy: Path) -> None:
    good = run_here("verify", copy, "--samples", "2")
    assert (good.returncode, good.stderr) == (0, "")
    assert "ok      2 videos decoded" in good.stdout
    assert "ok      20 videos of the catalog" in good.stdout
    flip_a_byte(copy)
    bad = run_here("verify", copy, "--samples", "0")
    assert (bad.returncode, bad.stderr) == (1, "")
    assert "WRONG" in bad.stdout
    assert (
        "repair      run the command that extracted it once more, with all the flags it had and --verify" in bad.stdout
    )
    (copy / "dataset.json").unlink()
    unfinished = run_here("verify", copy)
    assert unfinished.returncode == 1
    assert unfinished.stderr.startswith("error: ")


def test_unlabelled_videos_are_sampled_too(motion_shards: str) -> None:
    index = read_index(motion_shards)
    place = index.table.schema.get_field_index("label")
    table = index.table.set_column(place, "label", pa.array([-1] * len(index), pa.int32()))
    assert len(choose_samples(replace(index, table=table), 8, seed=0)) == 8
