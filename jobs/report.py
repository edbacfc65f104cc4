"""Make the page of an extraction, a training, an evaluation or a sweep again: python jobs/report.py s3://bucket/k400"""

from __future__ import annotations

import json
import sys

import tyro

from pipelines import storage

# The file that each kind of folder has, in the order in which they are looked for.
KINDS = {"dataset.json": "extraction", "evaluation.json": "evaluation", "sweep.json": "sweep", "run.json": "training"}


def main(uri: tyro.conf.Positional[str]) -> None:
    """Make report.html of a folder again and print where it is.

    Args:
        uri: Folder that one of the jobs wrote, on disk or s3://.
    """
    try:
        folder = storage.absolute(uri)
        print(make_report(folder))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def make_report(folder: str) -> str:
    """The URI of the new page. Raises ValueError where the folder is none of ours, or unfinished."""
    found = next((kind for file, kind in KINDS.items() if storage.exists(storage.join(folder, file))), None)
    if found == "evaluation":
        from pipelines.evaluation_page import write_evaluation_report

        return write_evaluation_report(folder, json.loads(storage.read_bytes(storage.join(folder, "evaluation.json"))))
    if found == "sweep":
        from pipelines.sweep_page import write_sweep_report

        return write_sweep_report(folder)
    if found == "training":
        from pipelines.training_page import write_training_report

        return write_training_report(folder)
    from pipelines import report, shards

    return report.write_extraction_report(folder, shards.read_dataset(folder))


if __name__ == "__main__":
    tyro.cli(main)
