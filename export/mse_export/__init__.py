"""Export: published checkpoints and Hugging Face folders become bundles for `mse_runtime`.

Nothing here is needed to run a bundle; torch, onnx and transformers come with the extra
`mse-runtime[export]` and are imported by the modules that use them.
"""

__version__ = "0.1.0"
