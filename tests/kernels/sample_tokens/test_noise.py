"""Noise from a counter: Philox's bits, and Gumbel's law to within what noise.py derives."""

import math

import pytest
import torch

from prism_kernels.sample_tokens import noise
from tests.oracle import assert_same

ALL = noise.MASK
KNOWN = [  # kat_vectors of Random123, philox4x32 10: counter, key, output
    ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ALL,) * 4, (ALL,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def philox(counter, key):
    """By Python's integers, from the paper."""
    a, b, c, d = counter
    for turn in range(10):
        k, m = ((key[i] + turn * step) & ALL for i, step in enumerate((0x9E3779B9, 0xBB67AE85)))
        p, q = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (q >> 32) ^ b ^ k, q & ALL, (p >> 32) ^ d ^ m, p & ALL
    return a, b, c, d


def bits(seed, response, step, word):
    """The schedule of noise.py, one word at a time."""
    counter = (word // 256 * 64 + word % 64, step, response & ALL, (response >> 32) & ALL)
    return philox(counter, (seed & ALL, (seed >> 32) & ALL))[word // 64 % 4]


def truth(b):
    """-log(-log((b + 1/2) / 2^32)) in float64; from the distance to 1 where that is shorter."""
    rest = ((ALL - b).double() + 0.5) * 2.0**-32
    exponential = torch.where(b > ALL >> 1, -torch.log1p(-rest), -((b.double() + 0.5) * 2.0**-32).log())
    return -exponential.log()


@pytest.mark.parametrize("counter,key,output", KNOWN)
def test_philox_gives_the_published_words(counter, key, output):
    got = noise.philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert tuple(map(int, got)) == output == philox(counter, key)


def test_bits_follow_the_schedule():
    seed, responses, steps = -(1 << 63) + 12345, [0, -1, (1 << 62) + 7, ALL + 1], [0, 1, ALL, 77]
    words = [0, 1, 63, 64, 65, 191, 255, 256, 1000, 151_935, (1 << 31) - 1]
    want = [[bits(seed, r, s, w) for w in words] for r, s in zip(responses, steps)]
    seed, responses, steps = (torch.tensor(x) for x in ([seed], responses, steps))
    got = noise.bits(seed, responses[:, None], steps[:, None], torch.tensor(words))
    assert got.tolist() == want
    for count in (1, 63, 1001):
        whole = noise.row_bits(seed, responses, steps, count)
        assert torch.equal(whole, noise.bits(seed, responses[:, None], steps[:, None], torch.arange(count)))


def some_bits():
    """All near the ends and where the arithmetic changes its way, and a million of the others."""
    far = int(noise.FAR * 2**32)
    edges = [0, ALL, 1 << 31, 1 << 30, 3 << 30, far, ALL - far, int(2**32 / math.e)]
    near = torch.tensor(edges)[:, None] + torch.arange(-5000, 5001)
    return torch.cat([near.flatten().clamp(0, ALL), torch.randint(0, ALL + 1, (1 << 20,))])


def test_noise_is_the_double_logarithm():
    b = some_bits()
    got, want = noise.gumbel(b), truth(b)
    assert got.dtype == torch.float32 and bool(got.isfinite().all())
    assert float(((got.double() - want).abs() / want.abs().clamp(min=1)).max()) <= noise.ERROR
    assert float(got.min()) > -3.14 and float(got.max()) < 22.88 < noise.LARGEST


@pytest.mark.parametrize("threshold", [-3.0, -1.0, 0.0, 0.3, 0.37, 1.0, 5.0, 12.0, 16.7, 20.0, 22.5])
def test_the_distribution_function_is_gumbels_to_half_a_step(threshold):
    """How many of the 2^32 bits give more, found by bisection, against 1 - exp(-exp(-t))."""
    low, high = 0, 1 << 32
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if float(noise.gumbel(torch.tensor([middle]))) > threshold else (middle + 1, high)
    found, want = (2**32 - low) / 2**32, -math.expm1(-math.exp(-threshold))
    density = math.exp(-threshold - math.exp(-threshold))
    assert abs(found - want) <= 2.0**-33 + density * noise.ERROR * max(1.0, abs(threshold))


def test_noise_has_gumbels_moments():
    """Mean and variance of 2^20 words within 6 of their standard errors; the fourth central moment is 5.4 variances."""
    n = 1 << 20
    got = noise.gumbel(noise.row_bits(torch.tensor([3]), torch.arange(4), torch.arange(4), n // 4)).double().flatten()
    variance = math.pi**2 / 6
    assert abs(float(got.mean()) - 0.5772156649) <= 6 * math.sqrt(variance / n)
    assert abs(float(got.var()) - variance) <= 6 * variance * math.sqrt(4.4 / n)
    assert_same(got[:64], truth(noise.row_bits(torch.tensor([3]), torch.arange(1), torch.arange(1), 64))[0].float(), 8)
