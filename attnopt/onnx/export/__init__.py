"""ONNX for ONNX Runtime: each attention in the fastest form that the runtime has for it, verified before it is written."""
