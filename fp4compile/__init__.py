"""fp4compile: `torch.compile(model, backend="fp4")` runs existing models in NVFP4, for inference and for training.

The public names are loaded when they are first used, so that importing the package imports neither Triton nor Inductor.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "QTensor": "fp4compile.codegen.qtensor",
    "quantize": "fp4compile.codegen.qtensor",
    "Calibration": "fp4compile.calibration.record",
    "Fp4CompileError": "fp4compile.codegen.errors",
    "Diagnoser": "fp4compile.diagnosis.diagnose",
    "Report": "fp4compile.report.report",
    "calibrate": "fp4compile.calibration.run",
    "diagnose": "fp4compile.diagnosis.diagnose",
    "explain": "fp4compile.backend",
    "last_report": "fp4compile.backend",
    "sensitivity": "fp4compile.isolation.run",
    "list_options": "fp4compile.options",
    "list_presets": "fp4compile.policy.presets",
    "load_calibration": "fp4compile.calibration.record",
    "load_policy": "fp4compile.policy.load",
    "refresh": "fp4compile.originals",
    "restore": "fp4compile.originals",
    "current_step": "fp4compile.steps",
    "set_step": "fp4compile.steps",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fp4compile' has no attribute {name!r}")
    module = importlib.import_module(_HOME[name])
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
