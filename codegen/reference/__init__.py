"""Bit-exact truth in plain PyTorch. Nothing here is fast; everything else is measured against it."""
