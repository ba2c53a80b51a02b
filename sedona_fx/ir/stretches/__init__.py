"""Stretches of a graph between two places where blocks may end: what they hold, and their share of the work.

Files

even_chain  The chain of places that shares the work of a graph most evenly, among all chains there are
holdings    Which parameters the blocks hold that may be cut out of a graph, told for every place where a block
            could end
shares      How evenly blocks can share the work of a graph: what lies before the places of a chain, and the least
            largest block
"""

__all__: list[str] = []  # internal
