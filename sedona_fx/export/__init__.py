"""Export of a net to other formats: ONNX.

Files

attention  Attention in plain operators, because the ONNX exporter fails on some uses of PyTorch's fused operator
onnx       Export of the inference graph to an ONNX file, which is checked with ONNX Runtime before it gets its name
"""

__all__: list[str] = []  # internal
