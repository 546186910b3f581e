"""The helper names of traker 0.3.2, and the check that an installation works."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from trak._kernels import native
from trak._kernels.choice import Backend, problem
from trak._linalg import spans
from trak._params import flatten_rows
from trak._version import __version__
from trak.errors import BackendError, BatchError, OptionError
from trak.projectors import (
    AdditiveProjector,
    BasicProjector,
    CudaProjector,
    ProjectionType,
    SparseProjector,
)
from trak.traker import TRAKer


def parameters_to_vector(parameters: Iterable[Tensor]) -> Shaped[Tensor, " d"]:
    """Concatenate tensors of any layout into one vector.

    Example:
        >>> parameters_to_vector([torch.ones(1, 2), torch.zeros(1)])
        tensor([1., 1., 0.])

    Returns:
        All entries, row-major. Shape ``(d,)``.
    """
    return torch.cat([parameter.reshape(-1) for parameter in parameters])


def get_num_params(model: torch.nn.Module) -> int:
    """Count a model's parameters, each tied one once."""
    return sum(parameter.numel() for parameter in model.parameters())


def is_not_buffer(ind: int, params_dict: Sequence[str] | Mapping[int, str]) -> bool:
    """Tell whether a name is not that of a batch normalisation buffer."""
    name = params_dict[ind]
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    return not any(buffer in name for buffer in buffers)


def vectorize(
    g: Mapping[str, Tensor],
    arr: Shaped[Tensor, "b d"] | None = None,
    device: str | torch.device | None = None,
) -> Shaped[Tensor, "b d"]:
    """Flatten per-sample gradients to one row an example.

    Args:
        g: ``{parameter: (b, *shape)}``.
        arr: Where to put the result; None for a new tensor. Shape ``(b, d)``.
        device: Where a new tensor is wanted; None to leave it where ``g`` is.

    Returns:
        The rows, in the mapping's order. Shape ``(b, d)``.

    Raises:
        BatchError: If the tensors differ in ``b``, or ``arr`` has another shape.
    """
    rows = flatten_rows(g)
    if arr is None:
        return rows if device is None else rows.to(device)
    if arr.shape != rows.shape:
        raise BatchError(
            f"arr has shape {tuple(arr.shape)}, the gradients {tuple(rows.shape)}."
        )
    return arr.copy_(rows)


def get_output_memory(
    features: Float[Tensor, "n p"],
    target_grads: Float[Tensor, "m p"],
    target_dtype: torch.dtype,
) -> int:
    """Count the bytes of ``features @ target_grads.T``.

    Example:
        >>> get_output_memory(torch.ones(3, 1), torch.ones(2, 1), torch.float16)
        12

    Returns:
        The bytes of an ``(n, m)`` result.
    """
    return len(features) * len(target_grads) * target_dtype.itemsize


def get_free_memory(device: str | torch.device) -> int:
    """Count the bytes that are free: on a CUDA device, or else of this machine.

    Args:
        device: The device.

    Returns:
        The bytes; 0 where the operating system does not tell.
    """
    parsed = torch.device(device)
    if parsed.type == "cuda":
        return int(torch.cuda.mem_get_info(parsed)[0])
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows; macOS
        return 0


def get_matrix_mult_standard(
    features: Float[Tensor, "n p"],
    target_grads: Float[Tensor, "m p"],
    target_dtype: torch.dtype,
) -> Float[Tensor, "n m"]:
    """Compute ``features @ target_grads.T`` in one product, in float32 or wider.

    Args:
        features: Left rows. Shape ``(n, p)``.
        target_grads: Right rows, of the same type. Shape ``(m, p)``.
        target_dtype: Type of the result.

    Returns:
        The product. Shape ``(n, m)``.
    """
    wide = torch.promote_types(features.dtype, torch.float32)
    return (features.to(wide) @ target_grads.to(wide).T).to(target_dtype)


def get_matrix_mult_blockwise(
    features: Float[Tensor, "n p"],
    target_grads: Float[Tensor, "m p"],
    target_dtype: torch.dtype,
    bs: int,
) -> Float[Tensor, "n m"]:
    """Compute ``features @ target_grads.T`` in blocks, into memory of the CPU.

    Args:
        features: Left rows. Shape ``(n, p)``.
        target_grads: Right rows, of the same type. Shape ``(m, p)``.
        target_dtype: Type of the result.
        bs: Rows and columns of a block.

    Returns:
        The product, on the CPU. Shape ``(n, m)``.

    Raises:
        OptionError: If ``bs`` is below 1.
    """
    if bs < 1:
        raise OptionError(f"bs must be at least 1; got {bs}.")
    n, m = len(features), len(target_grads)
    result = torch.empty(n, m, dtype=target_dtype)
    for low, high in spans(n, bs):
        for start, stop in spans(m, bs):
            result[low:high, start:stop] = get_matrix_mult_standard(
                features[low:high], target_grads[start:stop], target_dtype
            )
    return result


def get_matrix_mult(
    features: Float[Tensor, "n p"],
    target_grads: Float[Tensor, "m p"],
    target_dtype: torch.dtype | None = None,
    batch_size: int = 8096,
    use_blockwise: bool = False,  # noqa: FBT001  0.3.2's signature
) -> Float[Tensor, "n m"]:
    """Compute ``features @ target_grads.T``, in blocks where one product does not fit.

    Args:
        features: Left rows. Shape ``(n, p)``.
        target_grads: Right rows, of the same type. Shape ``(m, p)``.
        target_dtype: Type of the result; None for that of ``features``.
        batch_size: Rows and columns of a block.
        use_blockwise: Whether to use blocks in any case.

    Returns:
        The product. Shape ``(n, m)``.
    """
    dtype = features.dtype if target_dtype is None else target_dtype
    needed = get_output_memory(features, target_grads, dtype)
    if use_blockwise or needed > get_free_memory(features.device):
        return get_matrix_mult_blockwise(features, target_grads, dtype, batch_size)
    return get_matrix_mult_standard(features, target_grads, dtype)


def get_parameter_chunk_sizes(
    model: torch.nn.Module, batch_size: int
) -> tuple[int, list[int]]:
    """Group a model's parameters so that a batch of each group has 32-bit indices.

    Args:
        model: The model.
        batch_size: Examples in a batch.

    Returns:
        The most entries a group may have, and the entries of each group. A parameter
        that is too large alone is a group of its own.

    Example:
        >>> get_parameter_chunk_sizes(torch.nn.Linear(2, 3), batch_size=8)
        (536870911, [9])
    """
    most = (2**32 - 1) // batch_size
    groups: list[int] = []
    for parameter in model.parameters():
        size = parameter.numel()
        if groups and groups[-1] + size <= most:
            groups[-1] += size
        else:
            groups.append(size)
    return most, groups


def test_install(use_fast_jl: bool | None = None) -> None:  # noqa: FBT001, PT028  0.3.2's
    """Prove on a small problem that every back end of this machine is right.

    Prints a line for each back end: what ran and how far it is from float64, or why it
    did not run.

    Args:
        use_fast_jl: Whether the compiled ``fast_jl`` projection must have run; None if
            it need not.

    Raises:
        BackendError: If ``fast_jl`` was asked for and did not run, or a result is wrong.
    """
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    print(
        f"trak {__version__}, torch {torch.__version__}, devices: {', '.join(devices)}"
    )
    for device in devices:
        for projector in (
            SparseProjector(51, 24, device=device),
            BasicProjector(51, 24, 0, ProjectionType.rademacher, device),
        ):
            distance = _prove(projector, device)
            print(
                f"{type(projector).__name__} on {device}: {distance:.1e} from float64, "
                f"by {projector.running_backend().value}"
            )
    _print_backends(devices)
    try:
        CudaProjector(1024, 512, 0, "rademacher", devices[-1])
    except BackendError as error:
        if use_fast_jl:
            raise BackendError(
                f"fast_jl was asked for and cannot run: {error}. Call test_install() to "
                f"check what there is."
            ) from error
        print(f"fast_jl: not used ({error})")
    else:
        print("fast_jl on cuda: ran, and kept inner products")
    print("trak is installed correctly.")


def _print_backends(devices: list[str]) -> None:
    """Print which faster back ends can be used, and why others cannot."""
    for backend, device in ((Backend.native, "cpu"), (Backend.triton, "cuda")):
        if device not in devices:
            print(f"{backend.value} kernels: not used (there is no {device} device)")
            continue
        reason = problem(backend, torch.device(device))
        if reason is not None:
            print(f"{backend.value} kernels: not used ({reason})")
        elif backend is Backend.native:
            print(f"native kernels: ready on cpu, {native.variant().name} instructions")
        else:
            print(f"{backend.value} kernels: ready on {device}")


test_install.__test__ = False  # type: ignore[attr-defined]  # pytest: not a test


def _prove(projector: AdditiveProjector, device: str) -> float:
    """Compare TRAKer's scores with the textbook formula in float64."""
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(40, 16, generator=generator).to(device)
    labels = torch.randint(0, 3, (40,), generator=generator).to(device)
    model = torch.nn.Linear(16, 3, device=device)
    weight = torch.randn(3, 16, generator=generator).to(device)
    checkpoint = {"weight": weight, "bias": weight[:, 0].clone()}
    with tempfile.TemporaryDirectory() as directory:
        traker = TRAKer(
            model,
            "image_classification",
            train_set_size=40,
            save_dir=directory,
            projector=projector,
            logging_level=100,
            use_half_precision=False,
        )
        traker.load_checkpoint(checkpoint)
        traker.featurize((data, labels))
        traker.finalize_features()
        traker.start_scoring_checkpoint(checkpoint, num_targets=40)
        traker.score((data, labels))
        scores = torch.from_numpy(traker.finalize_scores() + 0.0)
    logits = data.double() @ weight.double().T + weight[:, 0].double()
    probability = logits.softmax(1)
    error = torch.nn.functional.one_hot(labels, 3).double() - probability
    chance = probability.gather(1, labels[:, None])
    # The margin's gradient in the logits: (1{y} - p) / (1 - p_y).
    slope = error / (1 - chance)
    grads = {"weight": slope[:, :, None] * data.double()[:, None, :], "bias": slope}
    rows = projector.project(grads, model_id=0).double() / 51**0.5
    a, b = traker.exponents
    weighted = (1 - chance) ** a * rows
    kernel = weighted.T @ weighted
    kernel.diagonal().add_(kernel.diagonal().mean())
    found = weighted @ torch.linalg.solve(kernel, rows.T)
    expected = (found * (1 - chance) ** b).cpu()
    distance = float((scores - expected).abs().max() / expected.abs().max())
    if not distance < 1e-4:
        raise BackendError(
            f"{type(projector).__name__} on {device} gives scores {distance:.1e} from their float64 "
            f"values; this installation of torch does not compute correctly."
        )
    return distance
