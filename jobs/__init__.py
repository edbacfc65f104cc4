"""Commands: one file per thing a person runs."""

from pipelines.garbage import collect_seldom

collect_seldom()  # before a job's own imports
