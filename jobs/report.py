"""Make the page of any job's output again: python jobs/report.py s3://bucket/k400"""

from __future__ import annotations

from dataclasses import dataclass

import jinja2
import tyro

from jobs.command import run_command
from pipelines import storage
from pipelines.errors import DataError

# The file that each kind of folder has, in the order in which they are looked for.
KINDS = {
    "dataset.json": "extraction",
    "features.json": "features",
    "evaluation.json": "evaluation",
    "sweep.json": "search",
    "run.json": "training",
}


@dataclass(frozen=True, kw_only=True)
class Report:
    """Make report.html of a folder again and print where it is."""

    folder: tyro.conf.Positional[str]
    """Folder that one of the jobs wrote, on disk or s3://."""


def main() -> None:
    """Parse, make the page, print where it is."""
    run_command(Report, lambda config: print(make_report(storage.absolute(config.folder))), __doc__)


def make_report(folder: str) -> str:
    """The URI of the new page. Raises ValueError where the folder is none of ours, unfinished, or damaged."""
    file = next((file for file in KINDS if storage.exists(storage.join(folder, file))), None)
    if file is None:
        raise DataError(
            f"{folder} holds none of {', '.join(KINDS)}, which a page is made of: give the --output of a job. "
            "If an extraction or an evaluation was interrupted, run its command again"
        )
    uri = storage.join(folder, file)
    try:
        return _write(KINDS[file], folder)
    # A page asks for what its job always writes: a file that lacks it was changed, or is another program's.
    except (KeyError, TypeError, jinja2.UndefinedError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise DataError(f"{uri}, or a file beside it, is damaged or no job's: {reason}") from error


def _write(kind: str, folder: str) -> str:
    # Imported where it is needed: a search's page brings Ray Tune with it, a training's torch.
    if kind == "evaluation":
        from pipelines import records
        from pipelines.evaluation.records import EVALUATION, Evaluation
        from pipelines.pages.evaluation import write_evaluation_report

        return write_evaluation_report(folder, records.read(storage.join(folder, EVALUATION), Evaluation))
    if kind == "features":
        from pipelines.features.records import read_features
        from pipelines.pages.features import write_features_report

        return write_features_report(folder, read_features(folder))
    if kind == "search":
        from pipelines.pages.search import write_search_report

        return write_search_report(folder)
    if kind == "training":
        from pipelines.pages.training import write_training_report

        return write_training_report(folder)
    from pipelines.datasets.records import read_dataset
    from pipelines.pages import extraction

    return extraction.write_extraction_report(folder, read_dataset(folder))


if __name__ == "__main__":
    main()
