"""Make a data set's page again, on disk or S3: python jobs/report.py --data s3://bucket/kinetics400"""

from __future__ import annotations

import sys

import tyro


def main(data: str) -> None:
    """Make report.html of an extracted data set again and print where it is.

    Args:
        data: Folder that an extraction wrote, on disk or s3://.
    """
    from pipelines import report, shards

    try:
        print(report.write_extraction_report(data, shards.read_dataset(data)))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    tyro.cli(main)
