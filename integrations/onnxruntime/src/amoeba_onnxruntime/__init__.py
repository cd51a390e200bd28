"""ONNX Runtime for amoeba_plugin: subnets as ONNX, measured, compared and run."""
