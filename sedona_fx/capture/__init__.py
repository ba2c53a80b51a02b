"""Front ends: record what a model's forward computes as a graph, and prove that the graph computes the same.

``symbolic`` (with ``tracer`` and ``inplace``) is tried first, ``exported`` (with ``convert``) where it fails, ``host``
where only a sub-module can be recorded. ``sites`` names the nodes, ``proof`` compares the graph with the model, and
``state_watch`` and ``blame`` find side effects and the line of the user's code that has them.
"""
