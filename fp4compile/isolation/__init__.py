"""Which part of a model loses how much to FP4: each quantized alone, a first-order estimate, and a policy chosen from the table.

Not called after its verb: `fp4compile.sensitivity` is the function.
"""
