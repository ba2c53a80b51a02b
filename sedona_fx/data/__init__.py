"""The user's data: arguments of the model, batches, and which examples two data sets have in common.

Files

args     Model inputs: how the inputs of a batch become the arguments of the user's ``forward``
overlap  Which examples two sets of data have in common, as far as that is known without reading them
sizes    Inputs of other sizes than those at hand, made of the same numbers
sources  Read the data given to ``decouple`` and ``fit``: an iterable of (inputs, target) pairs, or one such pair
"""

__all__: list[str] = []  # internal
