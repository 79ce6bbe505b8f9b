"""The frozen language model under llama.cpp. The only room that imports llama_cpp.

`Backbone` is an `inputs_embeds` / soft-prompt API over llama.cpp's C API: see docs/backbone.md.
"""

from mse_runtime.backbone.model import Backbone

__all__ = ["Backbone"]
