"""Seconds and memory to read a catalog: a made-up Kinetics CSV against a folder that holds some of its files, empty.

python benchmarks/catalog.py            # 250,000 rows, 50,000 files, and a tenth of both for comparison
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path

from pipelines.datasets.catalog import read_catalog

CLASSES = 400


def write_data_set(folder: Path, rows: int, files: int) -> Path:
    """A CSV of `rows` ten-second spans, every other file of the first `files` trimmed, in class folders."""
    annotations = folder / "train.csv"
    with annotations.open("w") as csv:
        csv.write("label,youtube_id,time_start,time_end,split,is_cc\n")
        for row in range(rows):
            csv.write(f"class {row % CLASSES:03d},id-{row:08d},{row % 300},{row % 300 + 10},train,0\n")
    for label in range(CLASSES):
        (folder / "videos" / f"class_{label:03d}").mkdir(parents=True)
    for row in range(files):
        span = f"_{row % 300:06d}_{row % 300 + 10:06d}" if row % 2 else ""
        (folder / "videos" / f"class_{row % CLASSES:03d}" / f"id-{row:08d}{span}.mp4").touch()
    return annotations


def measure(rows: int, files: int) -> None:
    """Print one row of the table; meant for a process of its own, so that peak memory is this catalog's."""
    with tempfile.TemporaryDirectory() as name:
        annotations = write_data_set(Path(name), rows, files)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start, start_cpu = time.perf_counter(), time.process_time()
        catalog = read_catalog(f"{name}/videos", str(annotations))
        seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
        peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        missing = catalog.table["path"].null_count
        table = catalog.table.nbytes / 2**20
        print(f"{rows:>8} {files:>8} {missing:>8} {seconds:>8.2f} {cpu:>8.2f} {peak:>8.0f} {table:>9.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=250_000, help="rows of the CSV")
    parser.add_argument("--files", type=int, default=50_000, help="files in the videos folder")
    settings = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    print("    rows    files  missing  seconds    cpu s  peak MB  table MB")
    spawn = multiprocessing.get_context("spawn")
    for share in (10, 1):
        process = spawn.Process(target=measure, args=(settings.rows // share, settings.files // share))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(process.exitcode)


if __name__ == "__main__":
    main()
