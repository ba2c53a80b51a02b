"""Export of a net to other formats: ONNX."""
