"""How kernels are launched: on the device of their tensors, and with all else bound, so that the second launch skips what the first found.

Triton's launcher derives the variant to run from every argument on every call: 43 microseconds for 30 arguments where the launch itself
takes 12 (Triton 3.6). Here all but the tensors are fixed, so the variant is.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

import torch
from torch import Tensor

_HERE: Final = nullcontext()


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be that of the tensor; switching costs more than looking."""
    here = not x.is_cuda or x.get_device() == torch.cuda.current_device()
    return _HERE if here else torch.cuda.device_of(x)


class KernelCall:
    """Launches `kernel` on `grid` with `numbers` by name; tensors, by position, are the parameters that `numbers` leaves.

    Which tensors are None, and what the dtypes and the alignments are that the kernel specializes on, must not change between calls; nor
    may the device. Under the interpreter there is no variant, and every call is a first one.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], options: dict[str, Any], **numbers: Any) -> None:
        self._kernel, self._options, self._numbers = kernel, options, numbers
        self._grid = (*grid, 1, 1)[:3]
        self._compiled: Any = None
        self._values = [numbers.get(name) for name in kernel.arg_names]
        self._places = [i for i, name in enumerate(kernel.arg_names) if name not in numbers]

    def __call__(self, *tensors: Tensor | None) -> None:
        if self._compiled is None:
            names = [self._kernel.arg_names[i] for i in self._places]
            named = dict(zip(names, tensors, strict=True)) | self._numbers
            self._compiled = self._kernel[self._grid](**named, **self._options)
            return
        values = self._values.copy()
        for place, tensor in zip(self._places, tensors, strict=True):
            values[place] = tensor
        self._compiled[self._grid](*values)
