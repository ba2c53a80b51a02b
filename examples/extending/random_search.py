"""A search of your own: cuts and heads at random. Run: python examples/extending/random_search.py

A search is a subclass of `Search` with one method, `decide`. It gets a `Problem` (the places to cut at, the candidate
heads of each, and, if `needs_data` is set, batches and the loss) and returns K-1 of the places, in order, each with the
number of its head.
"""

import random

import torch
from torch import nn

import sedona_fx
from sedona_fx.search import Decision, Problem, Search


class RandomSearch(Search):
    """Draw the cuts uniformly among the base layers, then a head for each of them."""

    def decide(self, problem: Problem) -> Decision:
        """Choose by the problem's seed alone, so that the same call gives the same plan."""
        draws = random.Random(problem.seed)
        places = problem.places()
        chosen = sorted(draws.sample(range(len(places)), problem.blocks - 1))
        plan = [(places[k], draws.randrange(max(1, len(problem.candidates[places[k]])))) for k in chosen]
        return problem.decision(plan, {"search": "random"})


def main() -> None:
    """Cut a small net in three at random, twice."""
    stages = [nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(6)]
    model = nn.Sequential(*stages, nn.Linear(8, 2))
    data = (torch.randn(4, 8), torch.zeros(4, dtype=torch.long))
    for seed in (0, 1):
        net = sedona_fx.decouple(model, data, blocks=3, search=RandomSearch(), heads=["linear", "mlp-sr"], seed=seed)
        print(f"seed {seed}: cut behind {', '.join(net.plan.cuts)}, heads {', '.join(map(str, net.plan.heads))}")


if __name__ == "__main__":
    main()
