"""Counter-based random signs, normals and rotations, as pure tensor functions.

Every value is a function of an address alone: the key of its stream, the position of
its gradient entry, and the output it belongs to. Nothing here keeps a state, so batch
size, block size and device cannot change a result. ``docs/projections.md`` states the
scheme to the bit; how the values make a sketch is in ``trak.projectors``.
"""

from __future__ import annotations

import hashlib
import math
from enum import IntEnum
from functools import lru_cache
from typing import Final, NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trak.errors import OptionError

SCHEME: Final = "trak-1"
"""Name and version of the scheme; any change to the bits is a new version."""

SIGNS_PER_DRAW: Final = 128
NORMALS_PER_DRAW: Final = 4
ROTATIONS_PER_DRAW: Final = 4

_MASK: Final = 0xFFFFFFFF
# Multipliers and Weyl increments of Philox4x32 (Salmon et al., 2011, Section 3.3).
_MULTIPLIERS: Final = (0xD2511F53, 0xCD9E8D57)
_INCREMENTS: Final = (0x9E3779B9, 0xBB67AE85)

Words: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]
"""Four int64 tensors of unsigned 32-bit words, of shapes that broadcast."""


class Key(NamedTuple):
    """A 64-bit key, as the two 32-bit words that Philox takes."""

    low: int
    high: int


class Domain(IntEnum):
    """What a draw is for; the last counter word, so that no two uses share a draw."""

    DENSE_SIGN = 0
    DENSE_NORMAL = 1
    SPARSE_SIGN = 2
    SPARSE_ROTATION = 3


@lru_cache(maxsize=4096)
def stream_key(seed: int, model_id: int, parameter: str = "") -> Key:
    """Hash what a stream is for into its key.

    Args:
        seed: The projection's seed; any integer.
        model_id: The checkpoint's id; any integer.
        parameter: The parameter's name, or the empty string for gradients that come as
            one tensor.

    Returns:
        The key. Streams that differ in any argument have unrelated keys.

    Example:
        >>> stream_key(0, 0) == stream_key(0, 0, "")
        True
        >>> stream_key(0, 1) == stream_key(1, 0)
        False
    """
    text = f"{SCHEME}\0{int(seed)}\0{int(model_id)}\0{parameter}"
    data = text.encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(data, digest_size=8).digest()
    return Key(
        int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")
    )


def philox(counter: Words, key: Key, rounds: int = 7) -> Words:
    """Encrypt counters with Philox4x32.

    The generator of Salmon et al. (2011), "Parallel random numbers: as easy as 1, 2,
    3", https://doi.org/10.1145/2063384.2063405. Seven rounds are the fewest that pass
    BigCrush there.

    Args:
        counter: Four int64 tensors of words in ``[0, 2**32)``, of shapes that
            broadcast.
        key: The stream's key.
        rounds: Number of rounds.

    Returns:
        Four int64 tensors of words in ``[0, 2**32)``, of the broadcast shape and on the
        device of ``counter``.

    Example:
        >>> zero = torch.zeros((), dtype=torch.int64)
        >>> [hex(int(w)) for w in philox((zero, zero, zero, zero), Key(0, 0))]
        ['0x5f6fb709', '0xd893f64', '0x4f121f81', '0x4f730a48']
    """
    c0, c1, c2, c3 = counter
    low, high = key
    for _ in range(rounds):
        # The products wrap modulo 2**64, which leaves both 32-bit halves exact.
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = ((second >> 32) & _MASK) ^ c1 ^ low
        c2 = ((first >> 32) & _MASK) ^ c3 ^ high
        c1, c3 = second & _MASK, first & _MASK
        low, high = (low + _INCREMENTS[0]) & _MASK, (high + _INCREMENTS[1]) & _MASK
    return c0, c1, c2, c3


def dense_signs(
    key: Key, start: int, stop: int, outputs: range, device: torch.device | str = "cpu"
) -> Float[Tensor, "k j"]:
    """Return a tile of the dense random sign matrix.

    Args:
        key: The stream's key.
        start: First coordinate of the tile.
        stop: One past its last coordinate.
        outputs: The tile's outputs.
        device: Where to make the tile.

    Returns:
        Signs, -1 or 1 with equal probability, float32. Shape
        ``(stop - start, len(outputs))``.

    Example:
        >>> key = stream_key(0, 0)
        >>> tile = dense_signs(key, 0, 300, range(8))
        >>> torch.equal(dense_signs(key, 131, 140, range(2, 4)), tile[131:140, 2:4])
        True
    """
    lanes = torch.arange(outputs.start, outputs.stop, device=device)
    signs = _aligned_signs(key, start, stop, lanes, Domain.DENSE_SIGN)
    return signs.T


def dense_normals(
    key: Key, start: int, stop: int, outputs: range, device: torch.device | str = "cpu"
) -> Float[Tensor, "k j"]:
    """Return a tile of the dense standard normal matrix.

    Box and Muller's transform of Philox words, in float64 and then rounded to float32,
    so devices agree to the rounding of ``log``, ``cos`` and ``sin``.

    Args:
        key: The stream's key.
        start: First coordinate of the tile.
        stop: One past its last coordinate.
        outputs: The tile's outputs.
        device: Where to make the tile.

    Returns:
        Standard normal values, float32, none beyond 6.67. Shape
        ``(stop - start, len(outputs))``.

    Example:
        >>> key = stream_key(0, 0)
        >>> tile = dense_normals(key, 0, 30, range(8))
        >>> torch.equal(dense_normals(key, 13, 14, range(2, 4)), tile[13:14, 2:4])
        True
    """
    lanes = torch.arange(outputs.start, outputs.stop, device=device)
    first, last = _draws(start, stop, NORMALS_PER_DRAW)
    index = torch.arange(first, last, device=device)
    values = _normals(_draw(key, index, lanes, Domain.DENSE_NORMAL)).flatten(1)
    begin = start - first * NORMALS_PER_DRAW
    return values[:, begin : begin + stop - start].T


def sparse_signs(
    key: Key, start: int, stop: int, nonzeros: int, device: torch.device | str = "cpu"
) -> Float[Tensor, "s k"]:
    """Return the signs with which coordinates enter each block of a sparse sketch.

    Args:
        key: The stream's key.
        start: First coordinate.
        stop: One past the last coordinate.
        nonzeros: Number of blocks :math:`s`.
        device: Where to make the signs.

    Returns:
        Signs, -1 or 1 with equal probability, float32. Shape
        ``(nonzeros, stop - start)``.

    Example:
        >>> key = stream_key(0, 0)
        >>> signs = sparse_signs(key, 0, 300, 4)
        >>> torch.equal(sparse_signs(key, 131, 140, 4), signs[:, 131:140])
        True
    """
    lanes = torch.arange(nonzeros, device=device)
    return _aligned_signs(key, start, stop, lanes, Domain.SPARSE_SIGN)


def sparse_rotations(
    key: Key,
    first: int,
    last: int,
    blocks: range,
    size: int,
    device: torch.device | str = "cpu",
) -> Int[Tensor, "r c"]:
    """Return by how much each chunk is rotated before it is added to each block.

    Args:
        key: The stream's key.
        first: First chunk.
        last: One past the last chunk.
        blocks: Indices of the blocks; all of them have ``size`` outputs.
        size: Outputs of a block, and coordinates of a chunk.
        device: Where to make the rotations.

    Returns:
        Rotations in ``[0, size)``, int64; each has probability ``1 / size`` to within
        ``2**-32``. Shape ``(len(blocks), last - first)``.

    Example:
        >>> key = stream_key(0, 0)
        >>> rotations = sparse_rotations(key, 0, 10, range(4), 512)
        >>> part = sparse_rotations(key, 3, 5, range(1, 2), 512)
        >>> torch.equal(part, rotations[1:2, 3:5])
        True
    """
    lanes = torch.arange(blocks.start, blocks.stop, device=device)
    begin, end = _draws(first, last, ROTATIONS_PER_DRAW)
    index = torch.arange(begin, end, device=device)
    words = _draw(key, index, lanes, Domain.SPARSE_ROTATION).flatten(1)
    skip = first - begin * ROTATIONS_PER_DRAW
    return (words[:, skip : skip + last - first] * size) >> 32


def entries_at(
    key: Key,
    starts: Int[Tensor, " u"],
    width: int,
    lanes: range,
    domain: Domain,
) -> Float[Tensor, "l u w"]:
    """Return signs or normals of several runs of coordinates, wherever they begin.

    Args:
        key: The stream's key.
        starts: First coordinate of each run, int64; the result is on its device. Shape
            ``(u,)``.
        width: Coordinates of a run.
        lanes: Outputs of a dense projection, or blocks of a sparse sketch.
        domain: Which signs, or ``DENSE_NORMAL``.

    Returns:
        The same values as `dense_signs`, `dense_normals` and `sparse_signs` return for
        one run, float32. Shape ``(len(lanes), u, width)``.

    Example:
        >>> key, starts = stream_key(0, 0), torch.tensor([131, 2])
        >>> signs = entries_at(key, starts, 9, range(4), Domain.SPARSE_SIGN)
        >>> torch.equal(signs[:, 0], sparse_signs(key, 131, 140, 4))
        True
    """
    normal = domain == Domain.DENSE_NORMAL
    per_draw = NORMALS_PER_DRAW if normal else SIGNS_PER_DRAW
    device = starts.device
    # As many draws as the longest way of lying across them needs.
    draws = torch.arange((width + 2 * per_draw - 2) // per_draw, device=device)
    index = (starts // per_draw)[:, None] + draws
    words = _draw(
        key, index, torch.arange(lanes.start, lanes.stop, device=device), domain
    )
    values = (_normals(words) if normal else _signs(words)).flatten(2)
    columns = (starts % per_draw)[:, None] + torch.arange(width, device=device)
    return values.gather(2, columns.expand(len(lanes), *columns.shape))


def rotations_at(
    key: Key, chunks: Int[Tensor, "*k"], block: int, size: int
) -> Int[Tensor, "*k"]:
    """Return by how much each of some chunks is rotated before it is added to a block.

    Args:
        key: The stream's key.
        chunks: The chunks, int64, of any shape.
        block: Index of the block.
        size: Outputs of the block, and coordinates of a chunk.

    Returns:
        The same rotations as `sparse_rotations` returns, in the shape of ``chunks``.

    Example:
        >>> key = stream_key(0, 0)
        >>> rotations = sparse_rotations(key, 0, 10, range(1, 2), 512)[0]
        >>> torch.equal(rotations_at(key, torch.tensor([9, 3]), 1, 512), rotations[[9, 3]])
        True
    """
    lane = torch.tensor([block], device=chunks.device)
    words = _draw(key, chunks // ROTATIONS_PER_DRAW, lane, Domain.SPARSE_ROTATION)[0]
    word = words.gather(-1, (chunks % ROTATIONS_PER_DRAW)[..., None])[..., 0]
    return (word * size) >> 32


def block_sizes(proj_dim: int, nonzeros: int) -> tuple[int, ...]:
    """Split the outputs of a sparse sketch into blocks whose sizes differ by at most 1.

    Args:
        proj_dim: Number of outputs :math:`p`.
        nonzeros: Number of blocks :math:`s`, at most ``proj_dim``.

    Returns:
        The blocks' sizes, the larger ones first.

    Raises:
        OptionError: If there are fewer outputs than blocks, or no block.

    Example:
        >>> block_sizes(10, 4)
        (3, 3, 2, 2)
    """
    if not 1 <= nonzeros <= proj_dim:
        raise OptionError(
            f"nonzeros must be between 1 and proj_dim={proj_dim}, got {nonzeros}"
        )
    small, larger = divmod(proj_dim, nonzeros)
    return (small + 1,) * larger + (small,) * (nonzeros - larger)


def _draws(start: int, stop: int, per_draw: int) -> tuple[int, int]:
    """Return the range of draws that covers the values ``start..stop``."""
    return start // per_draw, -(-stop // per_draw)


def _draw(
    key: Key, index: Int[Tensor, "*k"], lanes: Int[Tensor, " l"], domain: Domain
) -> Int[Tensor, "l *k 4"]:
    """Return the words of some draws of each lane."""
    purpose = torch.tensor(int(domain), device=lanes.device)
    lanes = lanes.view(-1, *(1,) * index.ndim)
    counter = (index & _MASK, index >> 32, lanes, purpose)
    return torch.stack(philox(counter, key), -1)


def _normals(words: Int[Tensor, "*k 4"]) -> Float[Tensor, "*k 4"]:
    """Return four normals a draw, float32."""
    wide = words.double()
    # One is added so that the logarithm's argument is in (0, 1].
    radius = torch.sqrt(-2 * torch.log((wide[..., 0::2] + 1) * 2.0**-32))
    angle = wide[..., 1::2] * (math.tau * 2.0**-32)
    pairs = torch.stack((radius * angle.cos(), radius * angle.sin()), -1)
    return pairs.float().flatten(-2)


def _signs(words: Int[Tensor, "*k 4"]) -> Float[Tensor, "*k 128"]:
    """Return one sign per bit of the draws; a bit that is set makes it negative."""
    # Eight signs at a time from a table: a shift per sign costs three times as much.
    octets = (words[..., None] >> torch.arange(0, 32, 8, device=words.device)) & 255
    bits = torch.arange(256, device=words.device)[:, None] >> torch.arange(
        8, device=words.device
    )
    table = (1 - 2 * (bits & 1)).float()
    signs = table.index_select(0, octets.flatten())
    return signs.view(*words.shape[:-1], SIGNS_PER_DRAW)


def _aligned_signs(
    key: Key, start: int, stop: int, lanes: Int[Tensor, " l"], domain: Domain
) -> Float[Tensor, "l k"]:
    """Return the signs of one run of coordinates for each lane."""
    first, last = _draws(start, stop, SIGNS_PER_DRAW)
    index = torch.arange(first, last, device=lanes.device)
    signs = _signs(_draw(key, index, lanes, domain)).flatten(1)
    begin = start - first * SIGNS_PER_DRAW
    return signs[:, begin : begin + stop - start]
