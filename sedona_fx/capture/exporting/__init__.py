"""The second front end: ``torch.export``, its program in the graph dialect, and the sizes that it leaves free.

Files

convert         Rewrite an exported program in the graph dialect, so that no later pass need know which front end
                made a graph
exported        The second front end: ``torch.export``, for models that symbolic tracing cannot record
free_sizes      Which sizes of inputs an exported program leaves free: found out by the program's own guards, on
                meta tensors
inline_regions  Take the regions of an exported program apart: one flat list of nodes, each of which knows its
                region
"""

__all__: list[str] = []  # internal
