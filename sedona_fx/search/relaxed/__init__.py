"""The mathematics of the relaxed net: its training step and the gradients through it.

Files

block_forward  Forward pass of one block of the relaxed net, and the segment of the autograd graph that it added
cut_record     What a relaxed training step records at each cut, so that one block's forward pass can be repeated
               later
hypergradient  The exact gradient of a validation loss with respect to alpha and beta, through training steps of the
               relaxed net
one_step       The exact gradient with respect to alpha and beta through one training step, without a second-order
               graph of the net
second_order   Convolution and BatchNorm with cheap second derivatives, which replace PyTorch's within a context
state          The relaxed net, and everything that a training step of it changes
training_step  The training step of the relaxed net
unrolled_step  One relaxed training step to differentiate through: its second-order graph is kept, or built again
               when needed
vjp            Vector-Jacobian products of one segment of an autograd graph that stays connected to what precedes it
"""

__all__: list[str] = []  # internal
