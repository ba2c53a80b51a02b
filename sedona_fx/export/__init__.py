"""Export of a net to other formats: ONNX.

Files

attention     Attention in plain operators, because the ONNX exporter fails on some uses of PyTorch's fused operator
chunks        Chunks of the batch as slices, because a chunk along a free size is one that ``torch.export`` fixes
dynamic       Which sizes of inputs an ONNX file leaves free: that of the batch, and those that a captured net
              leaves free
flat          A graph as a function of tensors alone, each with a name: what an ONNX file holds
model         What is changed in an exported ONNX model before it is written: its names, and operators on short
              floats
onnx          Export of the inference graph to an ONNX file, which is checked with ONNX Runtime before it gets its
              name
parametrized  Parametrized weights (weight norm, spectral norm, orthogonal) as the plain weights that they give
"""

__all__: list[str] = []  # internal
