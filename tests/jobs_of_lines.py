"""Runs jobs on one Ray: python jobs_of_lines.py.

Reads a job's name and flags a line, as JSON, and answers each by its exit status and what it printed, on one line too.
A script, because a Ray and its workers keep the environment in which it was started.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from fixtures_jobs import run_here


def main() -> None:
    sys.path.append(str(Path(__file__).resolve().parents[1]))  # Ray's workers take it over
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what comes unasked, from threads of Ray, is no answer
    for line in sys.stdin:
        done = run_here(*json.loads(line))
        print(json.dumps([done.returncode, done.stdout + done.stderr]), file=answers, flush=True)


if __name__ == "__main__":
    main()
