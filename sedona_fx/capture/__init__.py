"""Front ends: record what a model's forward computes as a graph, and prove that the graph computes the same.

``symbolic`` (with ``tracer`` and ``inplace``) is tried first, ``exporting`` where it fails, ``host`` where only a
sub-module can be recorded. ``whole`` has what neither looks into. ``sites`` names the nodes, ``proof`` compares the
graph with the model, ``state_watch`` and ``blame`` find side effects and the line of the user's code that has them, and
``attributes`` those that do no harm.

Files

exporting/    The second front end: ``torch.export``, its program in the graph dialect, and the sizes that it leaves
              free
whole/        What a front end does not look into: modules that stay whole, functions that stay one node,
              derivatives in forward
attributes    Attributes that a forward writes: no obstacle to a graph, if they carry no value from one call to the
              next
blame         Find the line of the user's code that caused an error or a side effect while a forward pass is
              recorded
checkpoints   Reentrant checkpoints (``torch.utils.checkpoint``, ``use_reentrant=True``) while a forward is recorded
              or proven
graph_module  What the front ends share: records of nodes, and the module that runs a recorded graph, without dead
              code
hooks         Hooks: those that a forward registers while it runs, and those that hang on modules before it does
host          ``root=``: only a sub-module becomes a graph; the code around it, its host, runs as plain Python in
              two calls
host_calls    The two calls that run the code around a sub-module as plain Python: up to the sub-module, and from it
              to the end
inplace       In-place operators of Python, recorded as functions that write to their first argument and return it
keep          Run a model without a trace: its attributes, buffers, parameters and gradients are as before
              afterwards
layer_stacks  PyTorch's stacks of layers (``nn.TransformerEncoder``, ``nn.TransformerDecoder``, ``nn.Transformer``)
              in a graph
names         Names that a model may have and torch.fx cannot write as code: keywords, ``self``, attributes of graph
              modules
proof         The last check of a trace: model and graph compute the same numbers from the same seed, buffers
              included
regions       Watch in which autocast and no-grad regions a forward pass runs while it is recorded
sites         Site names: names of nodes that are the same in the train graph and in the eval graph of a model
state_watch   Find and undo changes of state while a forward pass is recorded
symbolic      The first front end: symbolic tracing. It keeps modules and modes, and is thirty times faster than the
              second
tracer        An fx tracer that records what fx leaves out: buffers by name, in-place operators, the module path of
              every node
"""

__all__: list[str] = []  # internal
