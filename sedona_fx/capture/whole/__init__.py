"""What a front end does not look into: modules that stay whole, functions that stay one node, derivatives in forward.

Files

chosen        Which modules stay whole because their code cannot be recorded: found one after the other, as front
              ends fail
derivatives   Calls of ``torch.autograd.grad`` in a forward: one node each, which finds its graph in whatever block
              it runs
grad_calls    Calls of ``torch.autograd.grad`` in a graph, and the stretch of the graph that each of them
              differentiates
kinds         Modules that a front end cannot look into, and so keeps whole without being asked to
late_buffers  Buffers that get their size in the first forward pass: observers of quantization keep them empty until
              then
operators     Modules that stay whole in a program that ``torch.export`` captures: a call of one is one operator of
              the program
own_backward  The user's own backwards: a ``torch.autograd.Function`` whose forward is recorded would lose its
              backward
reasons       Why code cannot be recorded: what it is that needs tensors with numbers, and which module could be
              kept whole
scripted      TorchScript inside a model: functions become one node each, and modules are copied with parameters of
              their own
"""

__all__: list[str] = []  # internal
