"""Running blocks: forward, local loss, backward inside the block, and what happens if a number is not finite.

Files

block            One block of a net, as schedules see it: its graphs, head, parameters and buffers
draws            Whether a block draws random numbers: only then are generators forked around it, which costs as
                 much as a layer
engine           The block engine: forward pass of a block, its local loss, its backward pass, free its graph, next
                 block
finite           Refuse to write weights that have turned infinite or NaN: they would take the place of the last
                 good ones
gradients        Whether the gradients of a block are finite: one fused check, whose answer may stay on the device
guard            Protect a block from a loss or a gradient that is not finite: it keeps its parameters, optimizer
                 state and buffers
optimizer_state  Check the saved state of an optimizer before it is loaded: PyTorch itself compares the sizes of
                 groups alone
options          What the engine is called with: one batch, and how its local steps are done
pending          A block between its forward pass and its backward pass: what it exports can be handed on already
precision        Mixed precision: forward under autocast, backward outside it, gradients scaled where float16 would
                 underflow
run              Run a block's graph on named values, and pass its exports on to the blocks that read them
"""

__all__: list[str] = []  # internal
