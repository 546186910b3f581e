"""The scheme against a scalar reference written from docs/projections.md."""

from __future__ import annotations

import hashlib
import math
from itertools import pairwise

import pytest
import torch

from trak import _signs
from trak.errors import OptionError

KEYS = [(0, 0, ""), (-3, 7, "fc.weight"), (2**70, -1, "straße\0x")]


def key_of(seed: int, model_id: int, name: str) -> tuple[int, int]:
    text = b"trak-1\0%d\0%d\0" % (seed, model_id) + name.encode()
    digest = hashlib.blake2b(text, digest_size=8).digest()
    value = int.from_bytes(digest, "little")
    return value % 2**32, value >> 32


def words_of(
    index: int, lane: int, domain: int, key: tuple[int, int], rounds: int = 7
) -> list[int]:
    c = [index % 2**32, index >> 32, lane, domain]
    k = list(key)
    for _ in range(rounds):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [
            (b >> 32) ^ c[1] ^ k[0],
            b % 2**32,
            (a >> 32) ^ c[3] ^ k[1],
            a % 2**32,
        ]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def sign_of(i: int, lane: int, domain: int, key: tuple[int, int]) -> float:
    word = words_of(i // 128, lane, domain, key)[i % 128 // 32]
    return -1.0 if word >> (i % 32) & 1 else 1.0


def normal_of(i: int, lane: int, key: tuple[int, int]) -> float:
    words = words_of(i // 4, lane, 1, key)
    u, v = words[i % 4 // 2 * 2 : i % 4 // 2 * 2 + 2]
    radius = math.sqrt(-2 * math.log((u + 1) / 2**32))
    angle = 2 * math.pi * v / 2**32
    return radius * (math.sin(angle) if i % 2 else math.cos(angle))


def rotation_of(chunk: int, block: int, size: int, key: tuple[int, int]) -> int:
    return words_of(chunk // 4, block, 3, key)[chunk % 4] * size >> 32


@pytest.mark.parametrize(
    ("rounds", "counter", "key", "expected"),
    [
        # The known-answer vectors published with Random123.
        (7, [0] * 4, [0] * 2, "5f6fb709 0d893f64 4f121f81 4f730a48"),
        (7, [2**32 - 1] * 4, [2**32 - 1] * 2, "5207ddc2 45165e59 4d8ee751 8c52f662"),
        (
            7,
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "4dfccaba 190a87f0 c47362ba b6b5242a",
        ),
        (10, [0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (10, [2**32 - 1] * 4, [2**32 - 1] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            10,
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_known_answers(
    rounds: int, counter: list[int], key: list[int], expected: str
) -> None:
    c0, c1, c2, c3 = (torch.tensor(word) for word in counter)
    words = _signs.philox((c0, c1, c2, c3), _signs.Key(*key), rounds)
    assert " ".join(f"{int(word):08x}" for word in words) == expected


@pytest.mark.parametrize(("seed", "model_id", "name"), KEYS)
def test_keys(seed: int, model_id: int, name: str) -> None:
    assert _signs.stream_key(seed, model_id, name) == key_of(seed, model_id, name)


def test_key_golden() -> None:
    assert _signs.stream_key(0, 0) == (0x9CCBDFE2, 0xB7405AA4)


def test_keys_differ_in_every_argument() -> None:
    addresses = [
        (seed, model_id, name)
        for seed in (-1, 0, 1, 10, 2**64, 2**64 + 1)
        for model_id in (-1, 0, 1, 10)
        for name in ("", "0", "1", "\x000", "a", "a.b")
    ]
    keys = {_signs.stream_key(*address) for address in addresses}
    assert len(keys) == len(addresses)


@pytest.mark.parametrize(("seed", "model_id", "name"), KEYS)
@pytest.mark.parametrize("start", [0, 1, 127, 128, 2**39 - 3])
def test_values_match_the_scalar_reference(
    seed: int, model_id: int, name: str, start: int
) -> None:
    key = _signs.stream_key(seed, model_id, name)
    stop = start + 7
    span = range(start, stop)
    signs = _signs.dense_signs(key, start, stop, range(3, 6))
    assert signs.tolist() == [
        [sign_of(i, j, 0, key) for j in range(3, 6)] for i in span
    ]
    normals = _signs.dense_normals(key, start, stop, range(3, 6))
    expected = [[normal_of(i, j, key) for j in range(3, 6)] for i in span]
    torch.testing.assert_close(normals, torch.tensor(expected), rtol=1e-6, atol=1e-6)
    signs = _signs.sparse_signs(key, start, stop, 3)
    assert signs.tolist() == [[sign_of(i, r, 2, key) for i in span] for r in range(3)]
    rotations = _signs.sparse_rotations(key, start, stop, range(1, 3), 1000)
    assert rotations.tolist() == [
        [rotation_of(c, r, 1000, key) for c in span] for r in range(1, 3)
    ]


def test_golden_values() -> None:
    # The table at the end of docs/projections.md.
    key = _signs.stream_key(0, 0)
    bits = _signs.dense_signs(key, 0, 8, range(2)).T
    assert ["".join("-" if v < 0 else "+" for v in row) for row in bits] == [
        "-----++-",
        "+++-+-+-",
    ]
    bits = _signs.sparse_signs(key, 0, 8, 2)
    assert ["".join("-" if v < 0 else "+" for v in row) for row in bits] == [
        "--+-+-+-",
        "+++--+--",
    ]
    rotations = _signs.sparse_rotations(key, 0, 6, range(2), 5)
    assert rotations.tolist() == [[1, 0, 1, 1, 4, 4], [4, 1, 4, 4, 1, 3]]
    normals = _signs.dense_normals(key, 0, 4, range(1))[:, 0]
    torch.testing.assert_close(
        normals, torch.tensor([1.9039260, -0.5491296, -0.8290152, 0.0637648])
    )


def test_any_cut_gives_the_same_values() -> None:
    key = _signs.stream_key(1, 2, "w")
    cuts = [0, 1, 5, 128, 129, 300, 511]
    for make in (_signs.dense_signs, _signs.dense_normals):
        whole = make(key, 0, 511, range(9))
        parts = [make(key, lo, hi, range(9)) for lo, hi in pairwise(cuts)]
        assert torch.equal(torch.cat(parts), whole)
    signs = _signs.sparse_signs(key, 0, 511, 4)
    parts = [_signs.sparse_signs(key, lo, hi, 4) for lo, hi in pairwise(cuts)]
    assert torch.equal(torch.cat(parts, 1), signs)


def test_empty_tiles() -> None:
    key = _signs.stream_key(0, 0)
    assert _signs.dense_signs(key, 5, 5, range(3)).shape == (0, 3)
    assert _signs.dense_normals(key, 5, 5, range(3)).shape == (0, 3)
    assert _signs.sparse_signs(key, 128, 128, 3).shape == (3, 0)


def test_moments() -> None:
    # Means of N independent values of variance 1 are within 5 / sqrt(N); squares of
    # normals have variance 2, fourth powers 96.
    key = _signs.stream_key(0, 0)
    n = 2**18
    signs = _signs.dense_signs(key, 0, n // 64, range(64)).double()
    assert abs(float(signs.mean())) < 5 / n**0.5
    # Neighbours in either direction, and the same address in another domain.
    other = _signs.sparse_signs(key, 0, n // 64, 64).T.double()
    for product in (
        signs[1:] * signs[:-1],
        signs[:, 1:] * signs[:, :-1],
        signs * other,
    ):
        assert abs(float(product.mean())) < 5 / product.numel() ** 0.5
    normals = _signs.dense_normals(key, 0, n // 64, range(64)).double()
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        sample = float(normals.pow(power).mean())
        assert abs(sample - mean) < 5 * (variance / n) ** 0.5
    size = 10
    rotations = _signs.sparse_rotations(key, 0, n // 4, range(4), size)
    counts = torch.bincount(rotations.flatten(), minlength=size).double()
    assert len(counts) == size
    spread = 5 * (n * (1 / size) * (1 - 1 / size)) ** 0.5
    assert float((counts - n / size).abs().max()) < spread


@pytest.mark.parametrize(
    ("p", "s", "sizes"), [(8, 4, (2, 2, 2, 2)), (7, 4, (2, 2, 2, 1)), (1, 1, (1,))]
)
def test_block_sizes(p: int, s: int, sizes: tuple[int, ...]) -> None:
    assert _signs.block_sizes(p, s) == sizes


@pytest.mark.parametrize("s", [0, 9])
def test_block_sizes_refuse(s: int) -> None:
    with pytest.raises(OptionError, match=f"between 1 and proj_dim=8, got {s}"):
        _signs.block_sizes(8, s)
