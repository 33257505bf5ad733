"""A real model before and after: SmolLM2-135M and a Wikipedia sample out of two PyPI wheels, measured on this machine."""
