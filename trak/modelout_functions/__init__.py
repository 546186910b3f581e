"""Tasks: what of a model is differentiated, and how strongly training pulled on it."""

from __future__ import annotations

from trak.modelout_functions._abstract import AbstractModelOutput
from trak.modelout_functions._classification import (
    ImageClassificationModelOutput,
    IterativeImageClassificationModelOutput,
    TextClassificationModelOutput,
)
from trak.modelout_functions._clip import CLIPModelOutput
from trak.modelout_functions._function import FunctionTask
from trak.modelout_functions._registry import TASK_TO_MODELOUT, resolve_task
from trak.modelout_functions._scalar import (
    BinaryClassificationModelOutput,
    MultilabelModelOutput,
    RegressionModelOutput,
)
from trak.modelout_functions._tokens import (
    CausalLMModelOutput,
    MaskedLMModelOutput,
    Seq2SeqLMModelOutput,
)

__all__ = [
    "TASK_TO_MODELOUT",
    "AbstractModelOutput",
    "BinaryClassificationModelOutput",
    "CLIPModelOutput",
    "CausalLMModelOutput",
    "FunctionTask",
    "ImageClassificationModelOutput",
    "IterativeImageClassificationModelOutput",
    "MaskedLMModelOutput",
    "MultilabelModelOutput",
    "RegressionModelOutput",
    "Seq2SeqLMModelOutput",
    "TextClassificationModelOutput",
    "resolve_task",
]
