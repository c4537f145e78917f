"""The Hugging Face side of a model: parameter names, tensor layout, safetensors in and out."""
