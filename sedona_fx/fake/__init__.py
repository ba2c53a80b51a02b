"""Operators on tensors without data: what they return, what they cost, and a memo of both.

Files

flops    FLOPs of operators: PyTorch's formulas, and those that it lacks
key      Keys for operations: everything that the effect of an operation on fake tensors can depend on, as a
         hashable value
memo     A memo of what operations do to fake tensors, since a deep net repeats a few dozen operations
meter    Count FLOPs, and the bytes that autograd keeps for the backward pass, on fake, meta or real tensors
tensors  Abstract tensors: geometry and storage only, from which a fake tensor is made when an operator has to run
         on it
values   Nested values in a run on fake tensors: the tensors in one, containers that may be written to, noise
"""

__all__: list[str] = []  # internal
