"""Every import path and name of 0.3.2."""

from __future__ import annotations

import importlib
import inspect

import pytest

import trak
from trak import modelout_functions, projectors, traker
from trak.gradient_computers import AbstractGradientComputer
from trak.savers import AbstractSaver
from trak.score_computers import AbstractScoreComputer

NAMES = {
    "trak": ["TRAKer", "test_install", "__version__"],
    "trak.traker": ["TRAKer"],
    "trak.modelout_functions": [
        "AbstractModelOutput",
        "ImageClassificationModelOutput",
        "CLIPModelOutput",
        "TextClassificationModelOutput",
        "IterativeImageClassificationModelOutput",
        "TASK_TO_MODELOUT",
    ],
    "trak.gradient_computers": [
        "AbstractGradientComputer",
        "FunctionalGradientComputer",
        "IterativeGradientComputer",
    ],
    "trak.projectors": [
        "ProjectionType",
        "AbstractProjector",
        "NoOpProjector",
        "BasicSingleBlockProjector",
        "BasicProjector",
        "CudaProjector",
        "ChunkedCudaProjector",
    ],
    "trak.score_computers": [
        "AbstractScoreComputer",
        "BasicSingleBlockScoreComputer",
        "BasicScoreComputer",
    ],
    "trak.savers": ["AbstractSaver", "MmapSaver", "ModelIDException"],
    "trak.utils": [
        "test_install",
        "parameters_to_vector",
        "get_num_params",
        "is_not_buffer",
        "vectorize",
        "get_output_memory",
        "get_free_memory",
        "get_matrix_mult",
        "get_matrix_mult_standard",
        "get_matrix_mult_blockwise",
        "get_parameter_chunk_sizes",
    ],
}


@pytest.mark.parametrize(
    ("module", "name"), [(m, name) for m, names in NAMES.items() for name in names]
)
def test_a_name(module: str, name: str) -> None:
    assert hasattr(importlib.import_module(module), name)


def test_the_same_things_under_two_names() -> None:
    assert trak.TRAKer is traker.TRAKer
    assert trak.test_install is importlib.import_module("trak.utils").test_install
    assert isinstance(trak.__version__, str)


def test_the_task_names() -> None:
    kinds = modelout_functions.TASK_TO_MODELOUT
    assert kinds["image_classification"] is (
        modelout_functions.ImageClassificationModelOutput
    )
    assert kinds["text_classification"] is (
        modelout_functions.TextClassificationModelOutput
    )
    assert kinds["clip"] is modelout_functions.CLIPModelOutput
    assert kinds["iterative_image_classification"] is (
        modelout_functions.IterativeImageClassificationModelOutput
    )
    assert isinstance(kinds["clip"](), modelout_functions.AbstractModelOutput)


def test_projection_types_are_their_names() -> None:
    assert projectors.ProjectionType.normal == "normal"
    assert projectors.ProjectionType("rademacher") is (
        projectors.ProjectionType.rademacher
    )


@pytest.mark.parametrize(
    ("interface", "methods"),
    [
        (modelout_functions.AbstractModelOutput, "get_output get_out_to_loss_grad"),
        (
            AbstractGradientComputer,
            "load_model_params compute_per_sample_grad compute_loss_grad",
        ),
        (projectors.AbstractProjector, "project"),
        (AbstractScoreComputer, "get_xtx get_x_xtx_inv get_scores"),
        (
            AbstractSaver,
            (
                "register_model_id serialize_current_model_id_metadata init_store "
                "init_experiment load_current_store save_scores del_grads"
            ),
        ),
    ],
)
def test_a_seam_asks_for_no_more_methods(interface: type, methods: str) -> None:
    assert inspect.isabstract(interface)
    assert interface.__abstractmethods__ == frozenset(methods.split())  # type: ignore[attr-defined]
