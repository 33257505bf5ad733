"""What a check of a kernel may raise without ending the others: compilers, launches, assertions."""

from __future__ import annotations

import triton

FAILURES = (triton.TritonError, RuntimeError, ValueError, TypeError, AssertionError, NotImplementedError, AttributeError, KeyError)
