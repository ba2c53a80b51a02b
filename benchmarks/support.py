"""Which models are supported: every promise checked on the models of a dozen packages, as ``docs/support.md``.

    python benchmarks/support.py                        # all of them; what is done already is not done again
    python benchmarks/support.py --family timm --jobs 1
    python benchmarks/support.py --only 'swin*,vit*' --again

Each model has a process of its own with a limit of time and of memory, so that no crash and no hang stops the table.
The time is the processor's, so that other work beside it changes no row; a process that hangs is ended after ten times
as long.
Rows are kept in ``benchmarks/results/support.json``, one JSON object a line, and are done again when something changed
that they are made of (``versions.py``). Models of packages that are not installed are left out, and their rows kept.
``--cuts`` only decouples, which takes a fifth of the time: what a net is like is written down anew, the promises stay
as they were checked, and the row is done again the next time. ``--draw`` only writes the page from the rows there are.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import multiprocessing
import resource
import signal
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from support_classes import NUMBERS

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "support.json"
PAGE = ROOT / "docs" / "support.md"
PRELOADED = ["row", "timm", "torchvision", "transformers", "onnxruntime", "onnxscript"]

HANGS = 10
"""A process that takes so many times its limit by the clock hangs."""

Row = dict[str, Any]


def main() -> None:
    """Check what is asked for and write the page."""
    chosen = _options()
    from catalogue import catalogue
    from support_page import page
    from versions import version

    entries = catalogue()
    rows = _read(RESULTS)
    wanted = [] if chosen.draw else [key for key in entries if _matches(key, chosen)]
    missing = {key: entries[key].missing for key in wanted if entries[key].missing}
    versions = {key: version(entries[key]) for key in wanted if key not in missing}
    todo = [key for key in versions if chosen.again or rows.get(key, {}).get("version") != versions[key]]
    print(f"{len(wanted)} models, {len(todo)} to do", flush=True)
    if missing:
        packages = sorted({package for names in missing.values() for package in names})
        print(f"{len(missing)} models are left out, as there is no {', no '.join(packages)}", flush=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with ThreadPoolExecutor(chosen.jobs) as pool:
        tasks = {key: pool.submit(_one, context, key, chosen) for key in todo}
        for done, (key, task) in enumerate(tasks.items(), 1):
            rows[key] = _merged(rows.get(key), task.result()) if chosen.cuts else task.result()
            if not chosen.cuts:
                rows[key]["version"] = versions[key]
            print(f"{done}/{len(todo)} {_summary(rows[key])}", flush=True)
            _write(RESULTS, (rows[k] for k in entries if k in rows))
    PAGE.write_text(page([rows[key] for key in entries if key in rows]))
    print(f"{PAGE.relative_to(ROOT)} has {sum(key in rows for key in entries)} of {len(entries)} models")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="names, as shell patterns with commas between them")
    parser.add_argument("--family", default="", help="how the family's name begins: torchvision, timm, monai, ...")
    parser.add_argument("--jobs", type=int, default=2, help="models at a time, one thread each")
    parser.add_argument("--seconds", type=float, default=300, help="limit of a model's processor time")
    parser.add_argument("--memory", type=float, default=10, help="limit of address space of a model, GiB")
    parser.add_argument("--again", action="store_true", help="do again what is done already")
    parser.add_argument("--cuts", action="store_true", help="only decouple, and keep what is known of the promises")
    parser.add_argument("--draw", action="store_true", help="check nothing, only write the page")
    return parser.parse_args()


def _matches(key: str, chosen: argparse.Namespace) -> bool:
    family, _, name = key.partition("/")
    return family.startswith(chosen.family) and any(fnmatch.fnmatch(name, one) for one in chosen.only.split(","))


def _one(context: Any, key: str, chosen: argparse.Namespace) -> Row:
    """Check one model in a process of its own; return its row, as far as it came."""
    family, _, name = key.partition("/")
    row: Row = {"family": family, "name": name, "note": "", "promises": {}, "reason": "", "doing": "starting"}
    ours, theirs = context.Pipe(duplex=False)
    only = () if chosen.cuts else NUMBERS
    process = context.Process(target=_child, args=(theirs, key, chosen.memory, int(chosen.seconds), only))
    start = time.perf_counter()
    process.start()
    theirs.close()
    ended = ""
    while not ended:
        if not ours.poll(max(0.0, start + HANGS * chosen.seconds - time.perf_counter())):
            ended = f"took longer than {HANGS * chosen.seconds:g} s"
            break
        try:
            row = ours.recv()
        except EOFError:
            process.join()
            spent = process.exitcode == -signal.SIGXCPU
            ended = f"took longer than {chosen.seconds:g} s" if spent else f"ended with code {process.exitcode}"
    if process.is_alive():
        process.kill()
        process.join()
    if doing := row.pop("doing", ""):
        _blame(row, doing, row.pop("error", "") or ended)
    row["seconds"] = round(time.perf_counter() - start, 1)
    return row


def _blame(row: Row, doing: str, reason: str) -> None:
    """Write down what a process was doing when it ended before its time."""
    if doing.startswith("promise "):
        row["promises"][doing.removeprefix("promise ")] = reason
    else:
        row["reason"] = f"{doing}: {reason}"


def _merged(old: Row | None, new: Row) -> Row:
    """Return what is new of a net with the promises, the times and the version of the row that there was."""
    if old is None or new["reason"] or old["reason"]:
        return {"version": "", **new}
    return {**new, **{name: old[name] for name in ("promises", "steps", "seconds", "version") if name in old}}


def _child(connection: Connection, key: str, memory: float, seconds: int, only: Sequence[str]) -> None:
    limit = int(memory * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    import logging
    import warnings

    import torch
    from catalogue import catalogue
    from row import measure, one_line

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of the models' packages, about their own code
    logging.disable(logging.WARNING)
    last: Row = {}

    def tell(row: Row) -> None:
        last.update(row)
        connection.send(row)

    entry = catalogue()[key]
    try:
        measure(entry, tell, only)
    except BaseException as error:
        connection.send({**last, "error": one_line(error)})


def _read(path: Path) -> dict[str, Row]:
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {f"{row['family']}/{row['name']}": row for row in rows}


def _write(path: Path, rows: Iterable[Row]) -> None:
    from sedona_fx.files import replacing

    with replacing(path) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _summary(row: Row) -> str:
    marks = " ".join(f"{n}{'+' if r == 'kept' else '.' if r == '-' else '!'}" for n, r in row["promises"].items())
    broken = [f"{n}: {r}" for n, r in row["promises"].items() if r not in ("kept", "-")]
    text = "; ".join(filter(None, [row["reason"], *broken]))
    return f"{row['name']:32s} {row['seconds']:6.1f} s  {marks}  {text[:300]}"


if __name__ == "__main__":
    main()
