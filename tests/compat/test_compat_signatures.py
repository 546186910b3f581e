"""The signatures of 0.3.2: what may be passed by position, and the defaults."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from trak import TRAKer, utils
from trak.gradient_computers import (
    AbstractGradientComputer,
    FunctionalGradientComputer,
    HookGradientComputer,
    IterativeGradientComputer,
)
from trak.modelout_functions import (
    CLIPModelOutput,
    ImageClassificationModelOutput,
    TextClassificationModelOutput,
)
from trak.projectors import (
    AbstractProjector,
    BasicProjector,
    BasicSingleBlockProjector,
    ChunkedCudaProjector,
    CudaProjector,
    NoOpProjector,
)
from trak.savers import AbstractSaver, MmapSaver
from trak.score_computers import AbstractScoreComputer, BasicScoreComputer

NEEDED = inspect.Parameter.empty

TRAKER = {
    "model": NEEDED,
    "task": NEEDED,
    "train_set_size": NEEDED,
    "save_dir": "./trak_results",
    "load_from_save_dir": True,
    "device": None,  # "cuda" in 0.3.2
    # 0.3.2: FunctionalGradientComputer, which gives the same gradients more slowly.
    "gradient_computer": HookGradientComputer,
    "projector": None,
    "saver": None,
    "score_computer": None,
    "proj_dim": 2048,
    "logging_level": logging.INFO,
    "use_half_precision": True,
    "proj_max_batch_size": 32,
    "projector_seed": 0,
    "grad_wrt": None,
    "lambda_reg": "auto",  # 0.0 in 0.3.2
}


def positional(function: Callable[..., Any]) -> dict[str, Any]:
    """What may be passed by position, in order, with the defaults."""
    parameters = inspect.signature(function).parameters
    return {
        name: parameter.default
        for name, parameter in parameters.items()
        if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD and name != "self"
    }


def test_the_constructor() -> None:
    assert positional(TRAKer) == TRAKER
    assert list(positional(TRAKer)) == list(TRAKER)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        # An id that is left out is found by the weights, new in this library.
        (
            TRAKer.load_checkpoint,
            {
                "checkpoint": NEEDED,
                "model_id": None,
                "_allow_featurizing_already_registered": False,
            },
        ),
        (TRAKer.featurize, {"batch": NEEDED, "inds": None, "num_samples": None}),
        (TRAKer.finalize_features, {"model_ids": None, "del_grads": False}),
        (TRAKer.score, {"batch": NEEDED, "inds": None, "num_samples": None}),
        (
            TRAKer.finalize_scores,
            {"exp_name": None, "model_ids": None, "allow_skip": False},
        ),
    ],
)
def test_a_method(method: Callable[..., Any], expected: dict[str, Any]) -> None:
    assert positional(method) == expected
    assert list(positional(method)) == list(expected)


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (AbstractProjector, "grad_dim proj_dim seed proj_type device"),
        (NoOpProjector, "grad_dim proj_dim seed proj_type device"),
        (
            BasicSingleBlockProjector,
            "grad_dim proj_dim seed proj_type device dtype model_id",
        ),
        (
            BasicProjector,
            "grad_dim proj_dim seed proj_type device block_size dtype model_id",
        ),
        (CudaProjector, "grad_dim proj_dim seed proj_type device max_batch_size"),
        (
            ChunkedCudaProjector,
            "projector_per_chunk max_chunk_size params_per_chunk feat_bs device dtype",
        ),
        (AbstractGradientComputer, "model task grad_dim dtype device grad_wrt"),
        (FunctionalGradientComputer, "model task grad_dim dtype device grad_wrt"),
        (IterativeGradientComputer, "model task grad_dim dtype device grad_wrt"),
        (AbstractScoreComputer, "dtype device logging_level lambda_reg"),
        (
            BasicScoreComputer,
            "dtype device CUDA_MAX_DIM_SIZE logging_level lambda_reg",
        ),
        (
            AbstractSaver,
            "save_dir metadata load_from_save_dir logging_level use_half_precision",
        ),
        (
            MmapSaver,
            (
                "save_dir metadata train_set_size proj_dim load_from_save_dir "
                "logging_level use_half_precision"
            ),
        ),
        (MmapSaver.init_experiment, "exp_name num_targets model_id"),
        (MmapSaver.load_current_store, "model_id exp_name exp_num_targets mode"),
        (
            MmapSaver.register_model_id,
            "model_id _allow_featurizing_already_registered",
        ),
        (MmapSaver.del_grads, "model_id"),
        (MmapSaver.save_scores, "exp_name"),
        (utils.vectorize, "g arr device"),
        (
            utils.get_matrix_mult,
            "features target_grads target_dtype batch_size use_blockwise",
        ),
        (utils.get_matrix_mult_standard, "features target_grads target_dtype"),
        (utils.get_matrix_mult_blockwise, "features target_grads target_dtype bs"),
        (utils.get_parameter_chunk_sizes, "model batch_size"),
        (utils.get_output_memory, "features target_grads target_dtype"),
        (utils.get_free_memory, "device"),
        (utils.is_not_buffer, "ind params_dict"),
        (utils.get_num_params, "model"),
        (utils.parameters_to_vector, "parameters"),
        (utils.test_install, "use_fast_jl"),
        (ImageClassificationModelOutput, "temperature"),
        (TextClassificationModelOutput, "temperature"),
        (CLIPModelOutput, "temperature simulated_batch_size seed"),
        (
            CLIPModelOutput.get_embeddings,
            (
                "model loader batch_size embedding_dim size preprocess_fn_img "
                "preprocess_fn_txt"
            ),
        ),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_the_order_of_arguments(function: Callable[..., Any], names: str) -> None:
    assert list(positional(function)) == names.split()


@pytest.mark.parametrize(
    ("function", "defaults"),
    [
        (NoOpProjector, {"grad_dim": 0, "proj_dim": 0, "seed": 0, "proj_type": "na"}),
        (BasicProjector, {"block_size": 100, "dtype": torch.float32, "model_id": 0}),
        (BasicSingleBlockProjector, {"dtype": torch.float32, "model_id": 0}),
        (BasicScoreComputer, {"CUDA_MAX_DIM_SIZE": 20_000}),
        (
            MmapSaver.load_current_store,
            {"exp_name": None, "exp_num_targets": -1, "mode": "r+"},
        ),
        (
            utils.get_matrix_mult,
            {"target_dtype": None, "batch_size": 8096, "use_blockwise": False},
        ),
        (ImageClassificationModelOutput, {"temperature": 1.0}),
        (CLIPModelOutput, {"temperature": None, "simulated_batch_size": 300}),
        (CLIPModelOutput.get_embeddings, {"size": 50_000}),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_defaults(function: Callable[..., Any], defaults: dict[str, Any]) -> None:
    found = positional(function)
    assert {name: found[name] for name in defaults} == defaults


@pytest.mark.parametrize(
    "kind", [NoOpProjector, BasicProjector, BasicSingleBlockProjector]
)
def test_projectors_accept_the_names_that_0_3_2_passed(kind: Any) -> None:
    projector = kind(
        grad_dim=8,
        proj_dim=8,
        seed=0,
        proj_type="normal",
        device="cpu",
        max_batch_size=32,
        dtype=torch.float16,
        block_size=4,
        model_id=3,
    )
    assert projector.proj_dim == 8
