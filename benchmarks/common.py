"""What every benchmark needs: threads, interleaved medians, one table, and the JSON beside it."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sedona_fx.files import replacing
from sedona_fx.report import table


def options(description: str | None, **defaults: Any) -> argparse.Namespace:
    """Read the command line every benchmark shares, and set the number of threads."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write environment, rows and goals to this file")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    for name, value in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    return chosen


def goal(name: str, value: float, bound: float) -> dict[str, Any]:
    """Describe a goal that is met where the value does not exceed its bound."""
    return {"name": name, "value": round(value, 4), "goal": bound, "met": value <= bound}


def report(
    rows: Sequence[dict[str, Any]], goals: Sequence[dict[str, Any]], chosen: argparse.Namespace, title: str
) -> None:
    """Print the table and the goals; write the JSON if it was asked for."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    print(f"\n{title}\n")
    print(table(columns, [[_text(row.get(name, "")) for name in columns] for row in rows]))
    print()
    for entry in goals:
        sign = "met   " if entry["met"] else "MISSED"
        print(f"{sign} {entry['name']}: {entry['value']:g} (goal: at most {entry['goal']:g})")
    if chosen.json is not None:
        environment = {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "threads": chosen.threads,
        }
        with replacing(chosen.json) as temporary:
            content = {"title": title, "environment": environment, "rows": list(rows), "goals": list(goals)}
            temporary.write_text(json.dumps(content, indent=1) + "\n")


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
