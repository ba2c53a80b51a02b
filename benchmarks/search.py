"""Seconds and bytes of the parts of SEDONA's search, relaxed steps and meta-iterations, beside plain training steps.

    python benchmarks/search.py --json benchmarks/results/search.json --page docs/search.md
    python benchmarks/search.py --small 1

The quarter-width VGG-19 on 32x32 images, batch 128, with four candidate heads at each of its 15 cuts; a meta-iteration
differentiates a validation batch of 1,024 through T steps. The rows take turns, so that a drift of the machine affects
all of them; the median counts. A step is gradient and SGD update, a meta-iteration is the hypergradient alone.

Bytes are counted by following storages: activations, gradients and copies of the state that the row allocates. Resident
memory for T = 5 is measured in a process of its own, which does nothing else.

The goals: the authors' released code takes 18 plain steps for a relaxed one (two threads), and 15.7 GB for T = 5.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from captured import captured
from common import goal, options, report
from page import fill, markdown
from torch.nn.functional import cross_entropy

import sedona_fx
from sedona_fx.measure import peak_bytes
from sedona_fx.search.relaxed.hypergradient import hypergradient
from sedona_fx.search.relaxed.one_step import one_step_hypergradient
from sedona_fx.search.relaxed.state import Logits, RelaxedNet, State, sgd_momentum_step
from sedona_fx.search.relaxed.training_step import relaxed_gradients, sample_cuts
from sedona_fx.search.sedona.relaxed_net import relaxed_blocks

HEADS = [f"sedona-{depth}" for depth in (1, 2, 3, 4)]
SAMPLED = 3
SGD = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-4}
PLAIN, RELAXED, APART = "plain step", "relaxed step", "relaxed step, one head at a time"
ONE, FIVE = "T = 1, alpha and beta", "T = 5"
NO_PAGE = Path("-")
Ways = dict[str, Callable[[], Any]]


def ways(small: bool) -> Ways:
    """Build the net once and return what is measured, by name."""
    torch.manual_seed(0)
    batch, validation = (16, 64) if small else (128, 1024)
    x, y = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
    val_x, val_y = torch.randn(validation, 3, 32, 32), torch.randint(10, (validation,))
    model = sedona_fx.models.vgg19(num_classes=10, width=0.25)
    problem = captured(model, [(x, y), (x, y)], loss=cross_entropy, heads=HEADS)
    blocks = relaxed_blocks(problem, problem.places())
    state, cuts = State.of(blocks), len(blocks) - 1
    (name,) = (str(n.target) for n in problem.train.graph.nodes if n.op == "placeholder")
    train, val = ({name: x}, y), ({name: val_x}, val_y)
    logits = Logits(torch.zeros(cuts, 2), [torch.zeros(len(HEADS)) for _ in range(cuts)])
    optimizer = torch.optim.SGD(model.parameters(), **SGD)

    def loss(block: int, output: Any, target: Any) -> torch.Tensor:
        return cross_entropy(output, target)

    net = RelaxedNet(blocks, loss)

    def plain() -> None:
        optimizer.zero_grad()
        cross_entropy(model.train()(x), y).backward()
        optimizer.step()

    def relaxed(sampled: int | None = None) -> None:
        drawn = None if sampled is None else sample_cuts(cuts, sampled)
        grads = relaxed_gradients(net, state, logits, train, create_graph=False, sampled=drawn).grads
        sgd_momentum_step(state, grads, **SGD, in_place=True)

    def apart() -> None:
        with patch(
            "sedona_fx.ir.split_point.run_together", lambda heads, activation: [head(activation) for head in heads]
        ):
            relaxed()

    return {
        PLAIN: plain,
        RELAXED: relaxed,
        APART: apart,
        f"relaxed step, {SAMPLED} of {cuts} cuts sampled": partial(relaxed, SAMPLED),
        ONE: partial(one_step_hypergradient, net, state, logits, train, val, **SGD),
        FIVE: partial(hypergradient, net, state, logits, [train] * 5, val, **SGD),
    }


def measure(measured: Ways, repeats: int) -> tuple[dict[str, float], dict[str, int]]:
    """Return the median seconds and the peak bytes of each. The run that counts bytes is the warm-up."""
    peaks = {name: peak_bytes(way) for name, way in measured.items()}
    seconds: dict[str, list[float]] = {name: [] for name in measured}
    for _ in range(repeats):
        for name, way in measured.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}, peaks


def resident(name: str, small: bool, threads: int) -> float:
    """Run one way once in a new process and return the process's peak resident memory in GB."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_resident, name, small, threads).result()


def _resident(name: str, small: bool, threads: int) -> float:
    torch.set_num_threads(threads)
    ways(small)[name]()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # Linux counts in KiB


def goals(seconds: dict[str, float], peaks: dict[str, int], gigabytes: float) -> list[dict[str, Any]]:
    """Compare the measurements with the goals."""
    step = seconds[RELAXED]
    return [
        goal("a relaxed step, in plain steps (the authors' 18, 1.5 times faster)", step / seconds[PLAIN], 12.0),
        goal("T = 5: GB resident (half of the authors' 15.7)", gigabytes, 7.85),
        goal("T = 5: GB counted", peaks[FIVE] / 1e9, 7.85),
        goal("T = 5, in relaxed steps", seconds[FIVE] / step, 25.0),
        goal("T = 1, alpha and beta, in relaxed steps", seconds[ONE] / step, 6.0),
    ]


def main(chosen: argparse.Namespace) -> None:
    """Measure and print."""
    gigabytes = resident(FIVE, bool(chosen.small), chosen.threads)
    seconds, peaks = measure(ways(bool(chosen.small)), chosen.repeats)
    rows = [
        {
            "way": name,
            "seconds": seconds[name],
            "times a plain step": seconds[name] / seconds[PLAIN],
            "times a relaxed step": seconds[name] / seconds[RELAXED],
            "peak MiB": round(peaks[name] / 2**20),
        }
        for name in seconds
    ]
    title = f"the search on a quarter-width VGG-19, {chosen.threads} threads, median of {chosen.repeats}"
    report(rows, goals(seconds, peaks, gigabytes), chosen, title)
    if chosen.page != NO_PAGE:
        fill(chosen.page, "search", page_part(title, rows, gigabytes))


def page_part(title: str, rows: Sequence[dict[str, Any]], gigabytes: float) -> str:
    """Return the text for the page: the title, the table, and the resident memory."""
    lines = [
        [
            row["way"],
            f"{row['seconds']:.2f}",
            f"{row['times a plain step']:.1f}",
            f"{row['times a relaxed step']:.2f}",
            str(row["peak MiB"]),
        ]
        for row in rows
    ]
    resident_text = f"A process that does nothing but T = 5 has at most {gigabytes:.2f} GB resident."
    return f"{title[0].upper()}{title[1:]}.\n\n{markdown(list(rows[0]), lines)}\n{resident_text}"


if __name__ == "__main__":
    main(options(__doc__, repeats=3, small=0, page=NO_PAGE))
