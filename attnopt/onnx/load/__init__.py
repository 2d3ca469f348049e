"""ONNX files as torch modules, for models that exist as nothing else."""
