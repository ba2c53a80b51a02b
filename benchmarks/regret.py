"""Where searches stand among all plans of a small net, each at the cost of a quarter of one training run.

    python benchmarks/regret.py --setting conv --table benchmarks/results/plans_conv.json \
        --json benchmarks/results/regret_conv.json --page docs/search.md

The table is that of ``plan_table.py``. Every search runs with several seeds: other first weights, another order of the
data and another split than any run of the table. *Regret* is what the plans found lose in test accuracy against the
best one, as a share of what the mean plan loses; the best one is taken from the table's other seeds. *Half* is the same
among plans whose largest block has at most half of the net's FLOPs, found with that as the budget. *Rank correlation*
is that of the search's score of plans with their accuracy, over all plans it has a score of.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cifar import Batches, Images
from common import goal, options, report
from page import fill, markdown
from plan_table import BATCH, BLOCKS, HEADS, SETTINGS, Setting, problem_of
from regret_statistics import Plan, Table
from torch import nn

import sedona_fx
from sedona_fx.errors import SettingsError
from sedona_fx.heads.registry import head_name
from sedona_fx.search import Balanced, Guided, Latest, Rollout, Search, Sedona, Uniform
from sedona_fx.search.problem.plan_costs import PlanCosts
from sedona_fx.search.sedona.decode import preferences

NAMES = [head_name(head) for head in HEADS]
OTHER_SEEDS = 100
"""Searches begin from weights that no run of the table began from."""


@dataclass(frozen=True)
class Way:
    """A search at a cost, in training steps: a share of a run (0: none), or so many epochs."""

    name: str
    search: Callable[[int], Search]
    share: float = 0.25
    epochs: int | None = None
    scores: Callable[[dict[str, Any]], dict[Plan, float]] | None = None
    control: bool = True


def guided_scores(found: dict[str, Any]) -> dict[Plan, float]:
    """Return the scores of the plans that the guided search ranked."""
    return {tuple((place, NAMES.index(head)) for place, head in plan): score for plan, score in found["plans"]}


def sedona_scores(found: dict[str, Any]) -> dict[Plan, float]:
    """Return the sum over cuts of log-odds to isolate and of the log-share of the head."""
    rows = preferences(torch.tensor(found["alpha"]), [torch.tensor(row) for row in found["beta"]])
    return _Sums(
        {(place, head): term for place, row in zip(found["places"], rows, strict=True) for head, term in enumerate(row)}
    )


class _Sums(dict[Plan, float]):
    """Scores of all plans, from those of their parts."""

    def __init__(self, terms: dict[tuple[str, int], float]) -> None:
        super().__init__()
        self._terms = terms

    def __contains__(self, plan: object) -> bool:
        return isinstance(plan, tuple)

    def __missing__(self, plan: Plan) -> float:
        return sum(self._terms[pair] for pair in plan)


def guided(name: str, share: float = 0.25, epochs: int | None = None, **settings: Any) -> Way:
    """Return the guided search at a cost."""
    return Way(name, lambda n: Guided(training_steps=n, **settings), share, epochs, scores=guided_scores, control=False)


def sedona(name: str, share: float = 0.25, **settings: Any) -> Way:
    """Return SEDONA's search at a cost."""
    return Way(name, lambda n: Sedona(training_steps=n, **settings), share, scores=sedona_scores)


WAYS = [
    guided("guided (default)"),
    guided("guided, half a run", 0.5),
    guided("guided, a whole run", 1.0),
    guided("the same, without rollouts", 1.0, finalists=0),
    guided("guided, 25 epochs", epochs=25),
    guided("the same 25, without rollouts", epochs=25, finalists=0),
    sedona("SEDONA, T = 1", unroll=1),
    sedona("SEDONA, T = 5", unroll=5),
    sedona("SEDONA, T = 5, a whole run", 1.0, unroll=5),
    sedona("SEDONA, T = 1, by perturbation, a whole run", 1.0, unroll=1, decode="perturbation"),
    Way("random plans, short training", lambda n: Rollout(training_steps=n, plans=8), 0.25),
    Way("latest", lambda n: Latest(), 0),
    Way("uniform", lambda n: Uniform(), 0),
    Way("balanced", lambda n: Balanced(), 0),
    Way("latest, largest head", lambda n: Latest(head="largest"), 0),
    Way("uniform, largest head", lambda n: Uniform(head="largest"), 0),
    Way("balanced, largest head", lambda n: Balanced(head="largest"), 0),
]


def find(
    way: Way, setting: Setting, train: Images, seed: int, steps: int, half: int | None
) -> tuple[Plan, dict[str, Any], float]:
    """Search once; return the plan, its provenance, and seconds."""
    data = Batches(*train, size=BATCH, seed=OTHER_SEEDS + seed, pad=2)
    began = time.process_time()  # which a busy machine does not stretch
    found = sedona_fx.decouple(
        setting.model(OTHER_SEEDS + seed),
        data,
        blocks=BLOCKS,
        heads=HEADS,
        search=way.search(max(1, round(way.share * steps) if way.epochs is None else way.epochs * len(data))),
        budget={"block_flops": half} if half is not None else None,
        seed=OTHER_SEEDS + seed,
        progress=False,
    ).plan
    seconds = time.process_time() - began
    plan = tuple((cut, NAMES.index(str(head))) for cut, head in zip(found.cuts, found.heads, strict=True))
    return plan, dict(found.provenance), seconds


def row_of(
    way: Way,
    setting: Setting,
    table: Table,
    halves: Table,
    train: Images,
    steps: int,
    half: int,
    seeds: int,
    run: float,
) -> dict[str, Any]:
    """Run a search with several seeds, free and within half of the FLOPs."""
    free = [find(way, setting, train, seed, steps, None) for seed in range(seeds)]
    bounded = [find(way, setting, train, seed, steps, half) for seed in range(seeds)]
    row: dict[str, Any] = {"search": way.name, "cost of a run": statistics.median(s for _, _, s in free) / run}
    for name, part, found in (("regret", table, free), ("half", halves, bounded)):
        value, low, high = part.regret([plan for plan, _, _ in found])
        row |= {name: value, f"{name}, 95 %": [low, high]}
    if way.scores is not None:
        row["rank correlation"] = statistics.mean(table.agreement(way.scores(found)) for _, found, _ in free)
        row["rank correlation, half"] = statistics.mean(halves.agreement(way.scores(found)) for _, found, _ in free)
    row["plans"], row["plans, half"] = (_counted([plan for plan, _, _ in found]) for found in (free, bounded))
    print(f"{way.name}: {row['regret']:.2f}, half {row['half']:.2f}", flush=True)
    return row


def _counted(plans: list[Plan]) -> str:
    """Return plans as text, with how often each was found: ``3x 4b 6b, 2x 5a 6b`` (head a is the linear one)."""
    texts = Counter(" ".join(f"{place}{'ab'[head]}" for place, head in plan) for plan in plans)
    return ", ".join(f"{count}x {text}" for text, count in texts.most_common())


def seconds_of_a_run(setting: Setting, train: Images) -> float:
    """Return the seconds of a plain training run of the net, its data included, from the second of two epochs."""
    model, data = setting.model(0), Batches(*train, size=BATCH, seed=0, pad=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    began = 0.0
    for _ in range(2):
        began = time.process_time()
        for x, y in data:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    return setting.epochs * (time.process_time() - began)


def main() -> None:
    """Run every search and print the table."""
    chosen = options(
        __doc__, setting="conv", table=Path("benchmarks/results/plans_conv.json"), data=Path("../shared/data"), seeds=5,
        page=Path("-"),
    )  # fmt: skip
    setting = SETTINGS[chosen.setting]
    train, _, _ = setting.data(chosen.data)
    table = Table.read(chosen.table)
    problem = problem_of(setting, train, 0)
    costs = PlanCosts.of(problem)
    half = int(costs.runs["block_flops"][0][len(costs.places)] / 2)

    def small(plan: Plan) -> bool:
        return costs.value("block_flops", tuple((problem.position(place), head) for place, head in plan)) <= half

    halves = table.among(small)
    spreads = {
        "all plans": (len(table.plans), table.spread()),
        "half of the FLOPs": (len(halves.plans), halves.spread()),
    }
    for name, (count, spread) in spreads.items():
        print(f"{name}: {count}, " + ", ".join(f"{key} {value:.4f}" for key, value in spread.items()))
    steps = setting.epochs * (setting.train // BATCH)
    run = seconds_of_a_run(setting, train)
    rows, left_out = [], []
    for way in WAYS:
        try:
            rows.append(row_of(way, setting, table, halves, train, steps, half, chosen.seeds, run))
        except SettingsError as error:  # so short a run does not pay for this search
            left_out.append(f"{way.name}: {error}")
            print(left_out[-1], flush=True)
    default = rows[0]
    fair = {way.name for way in WAYS if way.control and way.share <= 0.25}
    controls = [row for row in rows if row["search"] in fair]
    goals = [
        goal("default search: regret", default["regret"], 0.25),
        goal("default search: regret among plans of half the FLOPs", default["half"], 0.25),
        goal("default search: 1 - rank correlation", 1 - default["rank correlation"], 0.4),
        goal(
            "default search: regret less the best control's", default["regret"] - min(r["regret"] for r in controls), 0
        ),
        goal("the same, half the FLOPs", default["half"] - min(r["half"] for r in controls), 0),
        goal("default search: cost of a training run", default["cost of a run"], 0.25),
    ]
    title = f"{chosen.setting}: {len(table.plans)} plans, {len(table.test)} seeds, a run of {run:.0f} s"
    report(rows, goals, chosen, title)
    if str(chosen.page) != "-":
        fill(chosen.page, f"regret-{chosen.setting}", page_part(title, spreads, rows, left_out))


def page_part(
    title: str, spreads: dict[str, tuple[int, dict[str, float]]], rows: list[dict[str, Any]], left_out: list[str]
) -> str:
    """Return the tables as the page has them."""
    head = ["plans", "number", "sd between plans, points", "sd between seeds, points", "seed-to-seed rank correlation"]
    lines = [
        [name, str(count), f"{100 * s['plans']:.2f}", f"{100 * s['seeds']:.2f}", f"{s['rank_correlation']:.2f}"]
        for name, (count, s) in spreads.items()
    ]
    columns = ["search", "cost of a run", "regret (95 %)", "rank corr.", "half the FLOPs: regret (95 %)", "rank corr."]
    found = [
        [
            row["search"],
            f"{row['cost of a run']:.2f}",
            f"{row['regret']:.2f} ({row['regret, 95 %'][0]:.2f} to {row['regret, 95 %'][1]:.2f})",
            f"{row['rank correlation']:.2f}" if "rank correlation" in row else "",
            f"{row['half']:.2f} ({row['half, 95 %'][0]:.2f} to {row['half, 95 %'][1]:.2f})",
            f"{row['rank correlation, half']:.2f}" if "rank correlation, half" in row else "",
        ]
        for row in rows
    ]
    missing = "".join(f"\nNot run: {text}\n" for text in left_out)
    return f"{title}.\n\n{markdown(head, lines)}\n{markdown(columns, found)}{missing}"


if __name__ == "__main__":
    main()
