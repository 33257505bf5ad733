"""Middle: the passes over a joint aten graph, in the order that `pipeline.py` gives."""
