"""A reproducible study of pneumonia on chest radiographs: `load`, `evaluate_predictions`, `LogitCalibrator` and
`PatientSplitter` for Python, each imported when it is first used.

Docs: https://cxr-study.github.io/cxr_study/howto/python.html"""

import importlib

__version__ = "0.1.0"

_MODULES = {
    "load": "pipeline.model",
    "evaluate_predictions": "evaluate.evaluation",
    "LogitCalibrator": "calibrate.estimator",
    "PatientSplitter": "data.splits",
}
__all__ = list(_MODULES)


def __getattr__(name):
    if name in _MODULES:
        return getattr(importlib.import_module(f"cxr_study.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return [*globals(), *__all__]
