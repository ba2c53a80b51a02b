"""Which parameters a gradient reaches that enters a value in some of its rows alone (one token, the last step).

Files

arithmetic  Rows of computations: element by element, along some dimensions, sums, products, attention
moves       Rows of operations that move numbers and compute none: concatenations, reshapes, permutations, indexing
need        What is needed of a value: nothing, all, some rows of a tensor, or elements of a tuple
reach       Which parameters a gradient reaches that enters a value in some of its rows alone (one token, the last
            step)
recurrence  Rows of a recurrent layer: steps in time, and the weights that have no part in some of them
rules       The rule of every operation that is known: which rows of its inputs it needs for some rows of its result
"""

__all__: list[str] = []  # internal
