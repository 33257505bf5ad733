"""Lets the interpreter of Triton 3.6 count loops under numpy 2.4 and newer, which make no integer of an array with one dimension."""

from __future__ import annotations

from triton.runtime import interpreter


def teach_scalars() -> None:
    """As later Tritons do it, once a process: a scalar, kept as an array with one element, is an index."""
    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch_lang_tensor
