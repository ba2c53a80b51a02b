"""A pass of your own: count the nodes of every block. Run: python examples/extending/count_nodes.py

A pass is a plain function from graph module to graph module. `graph_pass` checks its result against the specification
of a phase (here LOWERED: every node has a block), always, and logs what it changed if SEDONA_FX_DEBUG=1 is set. What
passes know about a node is in its typed record, `info(node)`.
"""

from collections import Counter

import torch
from torch import fx, nn

import sedona_fx
from sedona_fx.passes import Phase, graph_pass, info


@graph_pass(Phase.LOWERED)
def count_nodes(gm: fx.GraphModule) -> fx.GraphModule:
    """Write into ``gm.meta["nodes"]`` how many operations each block runs, its boundary and its head included.

    Args:
        gm: a LOWERED graph. Only its `meta` changes.
    """
    operations = [node for node in gm.graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
    gm.meta["nodes"] = dict(Counter(info(node).block for node in operations))
    return gm


def main() -> None:
    """Count in a small net of three blocks."""
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(5)), nn.Linear(8, 2))
    data = (torch.randn(4, 8), torch.zeros(4, dtype=torch.long))
    net = sedona_fx.decouple(model, data, cuts=["0", "2"], heads="linear")
    for block, count in count_nodes(net.graph_module).meta["nodes"].items():
        print(f"block {block}: {count} operations")


if __name__ == "__main__":
    main()
