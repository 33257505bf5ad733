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


def kinds_of(*tensors: Tensor | None) -> tuple[tuple[torch.dtype, bool] | None, ...]:
    """What Triton derives a variant from in them, for the keys of calls that are kept: dtypes, and whether they begin at 16 bytes."""
    return tuple([None if tensor is None else (tensor.dtype, tensor.data_ptr() % 16 == 0) for tensor in tensors])


class KernelCall:
    """Launches `kernel` on `grid` with `numbers` by name; tensors, by position, are the parameters that `numbers` leaves.

    `options` may hold constants of the kernel too. A tensor may be a descriptor of one. Which tensors are None, and what the dtypes and the
    alignments are that the kernel specializes on (`kinds_of`), must not change between calls; nor may the device. Under the interpreter
    there is no variant, and every call is a first one.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], options: dict[str, Any], **numbers: Any) -> None:
        numbers = numbers | {name: value for name, value in options.items() if name in kernel.arg_names}
        self._kernel, self._numbers = kernel, numbers
        self._options = {name: value for name, value in options.items() if name not in numbers}
        self._grid = (*grid, 1, 1)[:3]
        self._launch: Any = None  # of the compiled kernel, on the grid
        self._values = [numbers.get(name) for name in kernel.arg_names]
        self._places = [i for i, name in enumerate(kernel.arg_names) if name not in numbers]

    def __call__(self, *tensors: Any) -> None:
        if self._launch is None:
            names = [self._kernel.arg_names[i] for i in self._places]
            named = dict(zip(names, tensors, strict=True)) | self._numbers
            compiled = self._kernel[self._grid](**named, **self._options)
            self._launch = None if compiled is None else compiled[self._grid]
            return
        values = self._values.copy()
        for place, tensor in zip(self._places, tensors, strict=True):
            values[place] = tensor
        self._launch(*values)
