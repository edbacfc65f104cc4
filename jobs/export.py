"""Export what people share: a trained network, or a data set of shards, with its card.

    python jobs/export.py RUN OUT --evaluation EVALUATION --dataset UCF-101 --license cc-by-4.0
    python jobs/export.py SHARDS OUT --dataset UCF-101
    python jobs/export.py RUN OUT --push me/i3d-ucf101        the same, then onto Hugging Face's hub

Of a network OUT holds model.safetensors, config.json and README.md; of shards, the shards, their index and README.md.
OUT is ready for `huggingface_hub.upload_folder`, and every job takes it as it takes what it was made from. README.md is
yours to complete: --push of an OUT that is there uploads it as it lies.
"""

from __future__ import annotations

import posixpath
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from jobs.command import locate_output, run_command
from models import checkpoint
from pipelines import storage
from pipelines.datasets.records import DATASET
from pipelines.errors import OutputError, SettingsError
from pipelines.sharing import cards
from pipelines.sharing.dataset_export import export_dataset
from pipelines.sharing.hub import RepoType, push
from pipelines.sharing.model_export import ModelExport, export_model
from pipelines.training.weights_files import Which


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a network or a data set as a folder to share, and push it."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Run or checkpoint of jobs/train.py, or shards of jobs/extract_flow.py, on disk or s3://."""
    output: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder on this disk, new or empty."""
    which: Which = "last"
    """Which checkpoint of a run."""
    evaluation: str | None = None
    """Folder of jobs/evaluate.py for this very network: the card's accuracy. None: the card claims none."""
    name: str | None = None
    """What the card is headed by. None: the repository's or the folder's name."""
    dataset: str | None = None
    """What the data set is called. None: the card does not say."""
    license: str = cards.LICENCE
    """Identifier of a licence on the hub, such as cc-by-4.0. Weights and frames are bound by that of the videos."""
    push: str | None = None
    """Repository of Hugging Face's hub, NAMESPACE/NAME, to upload to: made where there is none."""
    public: bool = False
    """Let everybody see a repository that --push makes."""

    def __post_init__(self) -> None:
        cards.check_licence(self.license)
        if storage.is_remote(self.output):
            raise SettingsError(f"OUT is {self.output}: give a folder on this disk, which is what can be uploaded")
        if self.public and self.push is None:
            raise SettingsError("--public says who may see what --push uploads: give that too")
        for uri in (self.source, self.output, self.evaluation):
            if uri is not None:
                storage.absolute(uri)


def main() -> None:
    """Parse, export, print."""
    run_command(Export, run, __doc__, stopped="remove OUT and run the same command again")


def run(config: Export) -> None:
    """Write the folder, and push it where that is asked for."""
    source, folder = storage.absolute(config.source), Path(locate_output(config.output))
    kind: RepoType = "dataset" if storage.exists(storage.join(source, DATASET)) else "model"
    if kind == "dataset" and (config.evaluation is not None or config.which != "last"):
        raise SettingsError(f"--evaluation and --which are of networks, and {config.source} is a data set")
    if config.push is not None and (folder / "README.md").is_file():
        check_export(folder, kind)
        print(f"kept        {folder} as it lies, its README.md too; remove it to have it written anew", flush=True)
    elif folder.is_dir() and any(folder.iterdir()):
        raise OutputError(f"{folder} is not empty: what lies there would be shared too. Give a new folder")
    else:
        print(f"{write(config, source, folder, kind)}\nwritten     {folder}, the card above as README.md", flush=True)
        if config.license == cards.LICENCE:
            print("no licence  nobody may use it: say which by --license", flush=True)
    if config.push is not None:
        print(f"pushed      {push(folder, config.push, kind, private=not config.public)}")


def check_export(folder: Path, kind: RepoType) -> None:
    """OutputError where a folder that is to be pushed as it lies was not written by this job, for what it is now."""
    names = (DATASET,) if kind == "dataset" else checkpoint.HUB
    if absent := [name for name in names if not (folder / name).is_file()]:
        raise OutputError(
            f"{folder} has a README.md and no {' and no '.join(absent)}: it is no exported {kind}, and all that lies "
            "there would be shared. Give a new folder"
        )


def write(config: Export, source: str, folder: Path, kind: RepoType) -> str:
    """Write the folder; returns its card."""
    name = config.name or posixpath.basename(config.push or str(folder))
    said = cards.Said(name=name, dataset=config.dataset, licence=config.license, repo=config.push)
    if kind == "dataset":
        return export_dataset(source, said, folder)
    evaluation = None if config.evaluation is None else storage.absolute(config.evaluation)
    return export_model(ModelExport(run=source, which=config.which, evaluation=evaluation, said=said), folder)


if __name__ == "__main__":
    main()
