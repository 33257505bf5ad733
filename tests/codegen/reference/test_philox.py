"""Philox4x32-10: Random123's known answers, an independent implementation, and the bytes each element reads."""

from __future__ import annotations

import pytest
import torch

from fp4compile.codegen.reference.philox import philox_bytes_ref, philox_ref
from tests.codegen import oracle

# Random123, kat_vectors: "philox4x32 10 <counter> <key> <answer>".
KNOWN = (
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
)
SEEDS = (0, 1, -1, 2**31, 2**32, 2**63 - 1, -(2**63), 0x123456789ABCDEF)


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_the_oracle_gives_the_known_answers(counter: tuple[int, int, int, int], key: tuple[int, int], answer: tuple[int, ...]):
    assert oracle.philox4x32_10(counter, key) == answer


def test_counter_zero_key_zero():
    words = philox_ref(torch.tensor(0), torch.tensor([0]))
    assert words.tolist() == [list(KNOWN[0][2])]


@pytest.mark.parametrize("seed", SEEDS)
def test_every_seed_and_counter_matches_the_oracle(seed: int):
    counters = [0, 1, 2, 15, 16, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1]
    words = philox_ref(torch.tensor(seed), torch.tensor(counters))
    key = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    assert words.tolist() == [list(oracle.philox4x32_10((c, 0, 0, 0), key)) for c in counters]


def test_element_4j_plus_i_reads_byte_i_of_word_j():
    expected = [b for word in KNOWN[0][2] for b in word.to_bytes(4, "little")]
    assert philox_bytes_ref(torch.tensor(0), 1).tolist() == [expected]


@pytest.mark.parametrize("seed", SEEDS)
def test_bytes_match_the_oracle(seed: int):
    ours = philox_bytes_ref(torch.tensor(seed), 40)
    assert ours.dtype == torch.uint8
    assert ours.tolist() == oracle.random_bytes(seed, (40, 16)).tolist()


def test_bytes_are_uniform():
    counts = torch.bincount(philox_bytes_ref(torch.tensor(7), 1 << 14).flatten().int(), minlength=256).double()
    expected = counts.sum() / 256
    chi_squared = ((counts - expected) ** 2 / expected).sum().item()
    assert 170 < chi_squared < 360  # 255 degrees of freedom: mean 255, standard deviation 22.6; +-4 of them
