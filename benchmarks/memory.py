"""Peak activation bytes and seconds of every way to train, on the CIFAR ResNet-110, in one run.

    python benchmarks/memory.py --json benchmarks/results/memory.json --page docs/methods.md
    python benchmarks/memory.py --quick

Memory-balanced cuts, whole training steps. Three kinds of groups: ``torch.utils.checkpoint``; the schedules that keep
little between steps, a group for each K (heads ``mlp-sr``; at K = 16 also SEDONA's); and delayed gradients, which keep
up to several GiB. Within a group the ways take turns, so that a drift of the machine hits all alike; "times backprop"
and "of backprop" are beside plain backprop in the same group. Delayed gradients have groups of their own since what
they keep slows down whatever allocates much beside them: plain backprop by a third, with 8 GiB kept.

Bytes are counted by following storages, over as many steps from the very start as it takes until nothing more is kept
between steps (K + 2 for delayed gradients): stashed graphs, copies of weights and of batches, buffers and gradients
count; parameters and the batch in hand do not, and the optimizer, plain SGD, has no state in any way. On an accelerator
the allocator's own peak stands beside it.

What would need more than half of the machine's memory is left out, and its row says how much that is.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from common import goal, report
from memory_ways import CAPACITY, Measured, Pair, checkpointing, delayed_ways, head_ways, measure, plain, schedule_ways
from page import fill, markdown

import sedona_fx

SEGMENTS = (2, 4, 6, 8, 9, 12, 18, 27)
"""Of checkpointing, for 54 residual blocks."""
SEDONA_HEADS = ("sedona-1", "sedona-4")
Results = dict[str, dict[str, Measured]]


def main() -> None:
    """Measure and print."""
    chosen = _options()
    device = torch.device(chosen.device)
    torch.manual_seed(0)
    pair = torch.randn(chosen.batch, 3, 32, 32).to(device), torch.randint(0, 10, (chosen.batch,)).to(device)
    results: Results = {}
    for name, ways in _groups(pair, chosen):
        results[name] = {one.way.name: one for one in measure(ways, chosen.repeats, device)}
        print(f"{name}: measured", flush=True)
    rows = [row for name in results for row in _rows(name, results[name])]
    what = f"training ResNet-110, batch {chosen.batch}, {chosen.threads} threads, median of {chosen.repeats}"
    report(rows, _goals(results), chosen, what)
    if chosen.page is not None:
        fill(chosen.page, "memory", page(rows, f"{what}, `Replay` with capacity {CAPACITY}"))


def page(rows: Sequence[dict[str, Any]], title: str) -> str:
    """Return the training steps as a table in Markdown: a line a way, a column a K."""
    counts = list(dict.fromkeys(row["group"].removesuffix(LATE) for row in rows if row["group"] != "no blocks"))
    lines = {}
    for row in rows:
        line = lines.setdefault(row["way"], dict.fromkeys(counts, ""))
        text = row.get("left out") or f"{row['of backprop']}, {row['times backprop']:.2f}"
        line.update(dict.fromkeys(counts if row["group"] == "no blocks" else [row["group"].removesuffix(LATE)], text))
    about = f"{title[0].upper()}{title[1:]}. Peak bytes, then time, beside plain backprop.\n\n"
    return about + markdown(["way", *counts], [[way, *line.values()] for way, line in lines.items() if way != PLAIN])


PLAIN = "plain backprop"
LATE = ", delayed gradients"


def _groups(pair: Pair, chosen: argparse.Namespace) -> Iterator[tuple[str, list[Any]]]:
    """Yield the groups one after the other: what one keeps alive is gone when the next one begins."""
    model = sedona_fx.models.resnet110(num_classes=10).to(pair[0].device)
    yield "no blocks", [plain(model, pair), *(checkpointing(model, pair, n) for n in chosen.segments)]
    for blocks in chosen.blocks:
        heads = head_ways(model, pair, blocks, SEDONA_HEADS) if blocks == 16 else []
        yield f"K = {blocks}", [plain(model, pair), *schedule_ways(model, pair, blocks), *heads]
        yield f"K = {blocks}{LATE}", [plain(model, pair), *delayed_ways(model, pair, blocks)]


def _rows(group: str, results: dict[str, Measured]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a group; of checkpointing the best in memory and the best in time."""
    first, greedy = next(iter(results.values())), results.get("Greedy")
    shown = [first, *_best(results)] if group == "no blocks" else list(results.values())
    for one in dict.fromkeys(shown):
        row: dict[str, Any] = {"group": group, "way": one.way.name}
        if one.needed:
            row["left out"] = f"needs about {one.needed / 2**30:.0f} GiB"
        else:
            row |= {
                "peak MiB": _mib(one.peak),
                **({"allocator MiB": _mib(one.allocator)} if one.allocator is not None else {}),
                "of backprop": f"{100 * one.peak / first.peak:.1f} %",
                "seconds": one.seconds,
                "times backprop": one.seconds / first.seconds,
            }
        if one.way.bound is not None and greedy is not None:
            row |= {"bytes beside Greedy": one.peak / greedy.peak, "bound": one.way.bound}
        if one.way.heads_bytes:
            row["parameters of heads, MiB"] = _mib(one.way.heads_bytes)
        yield row


def _best(results: dict[str, Measured]) -> list[Measured]:
    """Return the checkpointing that takes the fewest bytes, and the one that takes the least time."""
    swept = [one for name, one in results.items() if name.startswith("checkpoint")]
    return [min(swept, key=lambda one: one.peak), min(swept, key=lambda one: one.seconds)]


def _goals(results: Results) -> list[dict[str, Any]]:
    """Return the goals of the groups that were measured."""
    goals = []
    if "K = 8" in results:
        greedy, base = results["K = 8"]["Greedy"], results["K = 8"][PLAIN]
        lean, quick = _best(results["no blocks"])
        other = results["no blocks"][PLAIN]
        share = greedy.peak / base.peak / (lean.peak / other.peak)
        slowdown = greedy.seconds / base.seconds / (quick.seconds / other.seconds)
        goals.append(goal(f"K = 8, Greedy: bytes beside {lean.way.name}", share, 1.0))
        goals.append(goal(f"K = 8, Greedy: time beside {quick.way.name}", slowdown, 1.0))
    if "K = 16" in results:
        for name, (share, slowdown) in {
            "Greedy": (0.11, 1.10),
            **{f"Greedy, {head}": (0.16, 1.30) for head in SEDONA_HEADS},
        }.items():
            goals += _beside(f"K = 16, {name}", results["K = 16"][name], results["K = 16"][PLAIN], share, slowdown)
    if "K = 4" in results:
        four = results["K = 4"]
        goals += _beside("K = 4, Greedy", four["Greedy"], four[PLAIN], 0.30, 1.10)
        link, greedy = four["BackLink, reach 1"], four["Greedy"]
        goals.append(goal("K = 4, BackLink, reach 1: bytes beside Greedy", link.peak / greedy.peak, 1.20))
        goals.append(goal("K = 4, BackLink, reach 1: time beside Greedy", link.seconds / greedy.seconds, 1.15))
        current, stashed = (results[f"K = 4{LATE}"][f"Delayed, {weights}"] for weights in ("current", "stashed"))
        if not stashed.needed:
            goals.append(goal("K = 4, Features Replay: bytes beside DDG", current.peak / stashed.peak, 0.20))
    return goals


def _beside(name: str, one: Measured, other: Measured, share: float, slowdown: float) -> list[dict[str, Any]]:
    return [
        goal(f"{name}: share of bytes", one.peak / other.peak, share),
        goal(f"{name}: times backprop", one.seconds / other.seconds, slowdown),
    ]


def _mib(count: int) -> float:
    mib = count / 2**20
    return round(mib, 1) if mib < 100 else round(mib)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write environment, rows and goals to this file")
    parser.add_argument("--page", type=Path, help="also put the table into this page")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 4, 8, 16, 54])
    parser.add_argument("--segments", type=int, nargs="+", default=list(SEGMENTS))
    parser.add_argument("--quick", action="store_true", help="a look: batch 16, K = 2 and 4, each once")
    chosen = parser.parse_args()
    if chosen.quick:
        chosen.batch, chosen.repeats, chosen.blocks, chosen.segments = 16, 1, [2, 4], [4, 9]
    torch.set_num_threads(chosen.threads)
    return chosen


if __name__ == "__main__":
    main()
