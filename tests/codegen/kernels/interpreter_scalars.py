"""Lets older interpreters of Triton do what later ones do, and the hardware: count loops, and take the number of a number and NaN.

That of 3.6 makes an integer of an array with one dimension, which numpy 2.4 refuses. Those of 3.6 and 3.7 return NaN.
"""

from __future__ import annotations

import numpy as np
from triton.runtime import interpreter


def teach_scalars() -> None:
    """Replace a method of tensors and two operations, once a process."""
    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch_lang_tensor
    interpreter.InterpreterBuilder.create_minnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmin)
    interpreter.InterpreterBuilder.create_maxnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmax)
