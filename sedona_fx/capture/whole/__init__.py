"""What a front end does not look into: modules that stay whole, functions that stay one node, derivatives in forward.

Files

derivatives     Calls of ``torch.autograd.grad`` in a forward: one node each, which finds its graph in whatever block
                it runs
kinds           Modules that symbolic tracing cannot look into, and so keeps whole without being asked to
reasons         Why code cannot be recorded: what it is that needs tensors with numbers
scripted        Functions of TorchScript, recorded as one node each
"""

__all__: list[str] = []  # internal
