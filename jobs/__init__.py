"""Commands: one file per thing a person runs."""
