"""Every command of README and tutorial, run as it is written; the recipes on tiny data sets of the same layout."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from i3d_reference import released_variables
from test_pretrained import as_piergiaj

from pipelines import storage
from pipelines.datasets.motion_videos import write_motion_videos

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text()
TRAINING = (ROOT / "docs" / "training.md").read_text()
RAN_HERE = ("Five minutes", "Your own data", "Recipes")
# Commands of other sections, by how they begin, and the tests that run them.
TESTED_ELSEWHERE = {
    "make demo": "test_demo.py",
    "make test": "test_readme.py",
    "make setup": "test_readme.py",  # which every other target of the Makefile begins with
    "python jobs/tune.py --data out/debug": "test_readme.py",  # with the tour
    "python jobs/tune.py --data UT_SHARDS": "test_search.py",  # the whole search takes an hour
    "python jobs/serve.py": "test_serve.py",
    "ray get-auth-token": "ray_head.py",
    "python jobs/submit.py": "test_ray_job.py",
    # With docs/cluster-local.yaml: cluster.yaml wants machines at AWS, and the README says that none were rented.
    "ray up": "test_ray_up.py",
    "ray dashboard": "test_ray_up.py",
}
NOT_TESTED = ("ray down",)  # it ends every Ray of a machine that it reaches
OWN_DATA = {"DIR": "out/debug/videos", "SHARDS": "out/own"}  # what its placeholders stand for in the test
TINY = "--size 32 --frames 16 --num-workers 1 --batch 2 --steps 2 --checkpoint-every 2"
# What is added to a recipe so that it takes seconds, by how it begins; the last of equal flags counts.
SHORTER = {
    "python jobs/extract_flow.py": "--short-side 40 --videos-per-shard 4",
    "python jobs/train.py --data s3://": f"{TINY} --width 0.125",
    "python jobs/train.py --data ucf101": TINY,  # released weights are of the whole width
    "python jobs/train.py --data hmdb51": f"{TINY} --width 0.125",
    "python jobs/evaluate.py": "",
}


def commands(page: str, section: str) -> list[str]:
    """The commands of one section's indented blocks, without comments, lines that go on joined."""
    text = page.split(f"\n## {section}\n")[1].split("\n## ")[0].replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    found = [" ".join(shlex.split(line, comments=True)) for line in lines if re.match(r"(python|ray|make) ", line)]
    return [re.sub(r"\s+", " ", command) for command in found]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of what is in the repository, to stand in."""
    folder = tmp_path_factory.mktemp("tree")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    yield folder
    shutil.rmtree(folder)


def run(command: str, tree: Path) -> str:
    words = [sys.executable if word == "python" else word for word in shlex.split(command)]
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    done = subprocess.run(words, cwd=tree, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr[-5000:]}"
    assert "Traceback" not in done.stderr
    return done.stdout


def script_of(page: str) -> str:
    """All bash blocks of a page, one after the other."""
    return "\n".join(re.findall(r"^```bash\n(.*?)^```$", page, re.MULTILINE | re.DOTALL))


def test_sections_hold_the_commands() -> None:
    assert len(commands(README, "Five minutes")) >= 6
    assert len(commands(README, "Your own data")) == 2
    assert len(commands(TRAINING, "Recipes")) >= 8
    assert script_of(TUTORIAL).count("python jobs/") >= 8


def test_every_command_of_the_readme_is_run_by_a_test() -> None:
    sections = [(page, name) for page in (README, TRAINING) for name in re.findall(r"^## (.+)$", page, re.MULTILINE)]
    others = [command for page, name in sections if name not in RAN_HERE for command in commands(page, name)]
    assert [command for command in others if not command.startswith((*TESTED_ELSEWHERE, *NOT_TESTED))] == []
    assert all((ROOT / "tests" / name).exists() for name in TESTED_ELSEWHERE.values())


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_the_tour_runs_as_it_is_written(tree: Path) -> None:
    tour = [command for command in commands(README, "Five minutes") if command.startswith("python ")]
    own = [f" {command} " for command in commands(README, "Your own data")]
    for name, path in OWN_DATA.items():
        own = [command.replace(f" {name} ", f" {path} ") for command in own]
    search = [command for command in commands(TRAINING, "Search") if "out/debug" in command]
    assert len(search) == 1
    for command in [*tour, *own, *search]:
        run(command, tree)
    pages = [str(path.parent.relative_to(tree / "out")) for path in sorted((tree / "out").rglob("report.html"))]
    assert pages == ["debug/evaluation", "debug/flow", "debug/rgb", "debug/shards", "debug/sweep", "own"]


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_the_tutorial_runs_as_it_is_written(tree: Path) -> None:
    python = Path(sys.executable).parent
    environment = {**os.environ, "PYTHONPATH": str(tree), "PATH": f"{python}:{os.environ['PATH']}"}
    words = ["bash", "-euxc", script_of(TUTORIAL)]
    done = subprocess.run(words, cwd=tree, capture_output=True, text=True, timeout=1100, env=environment)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-5000:]}"
    assert "Traceback" not in done.stderr
    for shown in re.findall(r"^```text\n(.*?)^```$", TUTORIAL, re.MULTILINE | re.DOTALL):
        first = shown.split()[0]
        assert re.search(rf"^ *{re.escape(first)}\b", done.stdout, re.MULTILINE), f"the tutorial shows {first}"


def lay_out_kinetics(videos: Path, folder: Path, bucket: str) -> None:
    """Official CSVs, and files of their names in a bucket."""
    header = "label,youtube_id,time_start,time_end,split\n"
    for split, use in (("train", "train"), ("val", "test")):
        rows = []
        for index, path in enumerate(sorted((videos / use).rglob("*.mp4"))):
            name = f"{split[0]}{index:010d}"
            rows.append(f"{path.parent.name},{name},17,27,{split}\n")
            storage.put(f"{bucket}/k400/{name}_000017_000027.mp4", path.read_bytes())
        (folder / f"{split}.csv").write_text(header + "".join(rows))


def lay_out_ucf101(videos: Path, folder: Path) -> None:
    """Class folders, classInd.txt and the lists of three folds."""
    lists = folder / "ucfTrainTestlist"
    lists.mkdir()
    classes = sorted({path.parent.name for path in videos.rglob("*.mp4")})[:2]
    lines = "".join(f"{label} {name}\n" for label, name in enumerate(classes, start=1))
    (lists / "classInd.txt").write_text(lines)
    for label, name in enumerate(classes, start=1):
        (folder / "UCF-101" / name).mkdir(parents=True)
        for index, path in enumerate(sorted(videos.rglob(f"{name}_*.mp4"))):
            shutil.copyfile(path, folder / "UCF-101" / name / f"v_{name}_g0{index}_c01.mp4")
            for fold in (1, 2, 3):
                line = f"{name}/v_{name}_g0{index}_c01.mp4"
                use, text = ("test", f"{line}\n") if index == fold - 1 else ("train", f"{line} {label}\n")
                with (lists / f"{use}list0{fold}.txt").open("a") as file:
                    file.write(text)


def lay_out_hmdb51(videos: Path, folder: Path) -> None:
    """Class folders and the split files of three folds."""
    lists = folder / "testTrainMulti_7030_splits"
    lists.mkdir()
    for name in sorted({path.parent.name for path in videos.rglob("*.mp4")})[:2]:
        (folder / "hmdb51" / name).mkdir(parents=True)
        for index, path in enumerate(sorted(videos.rglob(f"{name}_*.mp4"))):
            shutil.copyfile(path, folder / "hmdb51" / name / f"clip_{name}_{index}.mp4")
            for fold in (1, 2, 3):
                with (lists / f"{name}_test_split{fold}.txt").open("a") as file:
                    file.write(f"clip_{name}_{index}.mp4 {2 if index == fold - 1 else 1}\n")


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_recipes_run_on_data_of_their_layout(tree: Path, tmp_path: Path, s3: str) -> None:
    videos = tmp_path / "videos"
    write_motion_videos(videos, videos_per_class=3, seed=0, num_frames=20, size=(64, 48))
    lay_out_kinetics(videos, tree, s3)
    lay_out_ucf101(videos, tree)
    lay_out_hmdb51(videos, tree)
    torch.save(as_piergiaj(released_variables(2, seed=1)), tree / "flow_imagenet.pt")
    means = []
    for command in commands(TRAINING, "Recipes"):
        more = next(flags for start, flags in SHORTER.items() if command.startswith(start))
        printed = run(f"{command} {more}".replace("s3://B", s3), tree)
        means += re.findall(r"folds +top-1 .*; mean [\d.]+%", printed)
    assert len(means) == 2
