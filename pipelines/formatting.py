"""Times, sizes and counts for people, the same in logs and on pages."""

from __future__ import annotations


def format_seconds(seconds: float) -> str:
    """`2 h 05 min`, `3 min 20 s`, `12 s` or `1.2 s`."""
    if seconds < 10:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"


def format_count(count: float, noun: str) -> str:
    """`1 class`, `2,000 classes`, `0.5 CPUs`."""
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{f'{count:,}' if isinstance(count, int) else f'{count:,g}'} {noun if count == 1 else plural}"


def format_bytes(count: float) -> str:
    """`1.5 GB`, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB" if count < 999.5 else f"{count:,.0f} TB"
