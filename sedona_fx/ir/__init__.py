"""The graph dialect: what is recorded about a node, the specification of each phase, data flow, and costs.

Files

rows/          Which parameters a gradient reaches that enters a value in some of its rows alone (one token, the
               last step)
stretches/     Stretches of a graph between two places where blocks may end: what they hold, and their share of the
               work
analysed       What analysis found out about a model: its ANALYSED graphs, its output, and what a head has to fit at
               each cut
channels       Find the dimension of an activation that holds the channels, from the layers that computed it
copies         Copies of modules that hold what Python does not copy: tensors with a graph, locks, open files,
               iterators
cost           FLOPs, parameters and activation bytes of a stretch of the graph, a block or a head
flow           Data flow: what must run before a node, writes included, and which block runs a node
graph          What the passes record about a node, and how to read a graph
graph_pass     The decorator of every pass: it verifies the result, and logs the changes if ``SEDONA_FX_DEBUG`` is
               set
loss           Losses by name: what a plan notes of a net's loss, since functions are not saved, and the way back
               from the name
modules        Helpers on modules: copies that share tensors, training modes, devices, fast attribute access
output_format  How a head's output is put in the place of the primary output, in the form that the loss reads
outputs        What a model returns: its fields, the tensors in it, and which of them is the primary output
pickled        Programs from pickles: fx makes a graph module again by tracing its code; here its regions are traced
               as well
program        The module that runs a graph: an ``fx.GraphModule`` in which a model's layers and tensors may have
               any name
region         Regions of a forward pass: ``with torch.autocast(...)`` and ``with torch.no_grad()``, recorded at
               every node in them
same_numbers   When two nested values hold the same numbers: bit for bit, or up to a part of their norm
spec           The specification of each phase, checked on the result of every pass
split_point    The split point: the module at a cut point while it is undecided whether to cut there, and with which
               head
"""

__all__: list[str] = []  # internal
