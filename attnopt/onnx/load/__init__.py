"""ONNX files as torch modules, for models without PyTorch code."""
