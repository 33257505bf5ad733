"""The GGUF reader: a model written with llama.cpp's names and permutation comes back with equal logits."""

from __future__ import annotations

import sys

import pytest
import torch

from fp4compile.demo.model import MissingPackage, hf_name, load_model, load_tokenizer, open_gguf, require, undo_rope_permutation
from tests.fp4compile.demo.tiny_llama import TOKENS, permuted_for_ggml, tiny_llama, write_gguf


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    model = tiny_llama()
    write_gguf(model, path)
    return model, open_gguf(path)


def test_logits_are_those_of_the_packed_model(packed):
    model, reader = packed
    loaded = load_model(reader, torch.float32)
    ids = torch.randint(len(TOKENS), (2, 19))
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_head_is_tied_and_dtype_is_bf16(packed):
    loaded = load_model(packed[1])
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert not loaded.training


@pytest.mark.parametrize(("heads", "size"), [(1, 2), (3, 8), (9, 64)])
def test_undo_rope_permutation_inverts_the_converter(heads, size):
    weight = torch.randn(heads * size, 5)
    assert torch.equal(undo_rope_permutation(permuted_for_ggml(weight, heads), heads), weight)


def test_permuted_rows_pair_neighbours():
    """Rotating neighbours of the permuted head is rotating (i, i + d/2) of the plain one: the reason the permutation exists."""
    head = torch.randn(8)
    angle = torch.rand(4)
    first, second = head[:4], head[4:]
    halves = torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()])
    even, odd = permuted_for_ggml(head[:, None], 1)[:, 0].view(4, 2).unbind(-1)
    neighbours = torch.stack([even * angle.cos() - odd * angle.sin(), odd * angle.cos() + even * angle.sin()], -1).flatten()
    torch.testing.assert_close(undo_rope_permutation(neighbours[:, None], 1)[:, 0], halves)


def test_names():
    assert hf_name("blk.12.ffn_down.weight") == "model.layers.12.mlp.down_proj.weight"
    assert hf_name("token_embd.weight") == "model.embed_tokens.weight"


def test_tokenizer_merges_splits_digits_and_keeps_control_tokens(packed):
    tokenizer = load_tokenizer(packed[1])
    text = "the cat 100\n\n5"
    ids = tokenizer.encode(text).ids
    # "00" is in the vocabulary and "0 0" a merge, yet digits stay single; the space before them stays alone.
    assert [TOKENS[i] for i in ids] == ["the", "Ġ", "c", "a", "t", "Ġ", "1", "0", "0", "Ċ", "Ċ", "5"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode("a<|start|>b").ids == [TOKENS.index("a"), 1, TOKENS.index("b")]


@pytest.mark.parametrize("package", ["gguf", "transformers"])
def test_a_missing_package_is_named_with_what_to_do(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackage, match=rf"'{package}' is missing. Run: pip install 'fp4compile\[demo\]'"):
        require(package)


def test_a_broken_package_is_not_called_missing(monkeypatch, tmp_path):
    (tmp_path / "broken_package.py").write_text("import not_there_either\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="not_there_either") as raised:
        require("broken_package")
    assert not isinstance(raised.value, MissingPackage)
