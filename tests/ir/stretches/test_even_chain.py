"""The evenest chain, against all chains of small graphs."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from sedona_fx.ir.stretches.even_chain import EvenChains


@st.composite
def graphs(draw):
    """Return what each of up to nine nodes needs, what they cost, and the nodes at which a block may end."""
    count = draw(st.integers(1, 9))
    needs = {
        k: sorted(draw(st.sets(st.integers(0, k - 1), max_size=3)), reverse=True) if k else [] for k in range(count)
    }
    work = {k: cost for k in range(count) if (cost := draw(st.integers(0, 9)))}
    ends = sorted(draw(st.sets(st.integers(0, count - 1))))
    return needs, work, ends


def held(needs, node):
    return {node}.union(*(held(needs, source) for source in needs[node]))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(graphs(), st.integers(2, 4))
def test_no_chain_is_more_even(graph, blocks):
    needs, work, ends = graph
    chains = EvenChains(ends, needs, work)
    inside, total = {node: held(needs, node) for node in ends}, sum(work.values())
    before = {node: sum(work.get(k, 0) for k in inside[node]) for node in ends}

    def largest(chain):
        edges = [0, *(before[node] for node in chain), total]
        return max(b - a for a, b in itertools.pairwise(edges))

    among = ends[:1] + ends[2:]  # the second may not be taken
    every = [
        chain
        for chain in itertools.combinations(among, blocks - 1)
        if all(first in inside[second] for first, second in itertools.pairwise(chain))
    ]
    found = chains.evenest(among, blocks)
    assert bool(found) == bool(every)
    if found:
        assert tuple(found) in every
        assert largest(found) == min(map(largest, every))
        expected = {n for n in ends if all(n in inside[k] or k in inside[n] for k in found)}
        assert chains.beside(found) == expected
