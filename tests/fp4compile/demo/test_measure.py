"""Loss, greedy text and the paired difference, against transformers' own and against arithmetic."""

from __future__ import annotations

import math

import pytest
import torch

from fp4compile.demo.measure import TextScore, eager_losses, generate, loss_increase, score_text
from fp4compile.demo.model import load_tokenizer, open_gguf
from tests.fp4compile.demo.tiny_llama import TOKENS, tiny_llama, write_gguf


def test_loss_is_the_models_own():
    model = tiny_llama()
    windows = torch.randint(len(TOKENS), (3, 20))
    ticks = []
    score = score_text(model, windows, lambda: ticks.append(1))
    expected = torch.stack([model(input_ids=w[None], labels=w[None]).loss for w in windows])
    torch.testing.assert_close(score.nll.mean(1), expected)
    assert score.perplexity == pytest.approx(math.exp(expected.mean().item()), rel=1e-5)
    assert torch.equal(eager_losses(model, windows, lambda: None), score.nll)
    assert len(ticks) == len(score.seconds) == 4  # the first window runs twice


def test_greedy_text_is_transformers_own(tmp_path):
    model = tiny_llama()
    write_gguf(model, tmp_path / "tiny.gguf")
    tokenizer = load_tokenizer(open_gguf(tmp_path / "tiny.gguf"))
    prompt = tokenizer.encode("the cat").ids
    model.generation_config.eos_token_id = None
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=9, do_sample=False, pad_token_id=0)[0].tolist()
    found = generate(model, model, tokenizer, "the cat", 9, lambda: None)
    assert found.text == tokenizer.decode(expected)
    assert len(found.seconds) == len(prompt) + 9 - 1


def test_steady_figures_leave_out_the_calls_that_compile():
    score = TextScore(nll=torch.zeros(2, 3), seconds=(60.0, 1.0, 3.0, 2.0))
    assert (score.first_seconds, score.steady_seconds) == (60.0, 1.0)


def test_paired_difference_and_its_standard_error():
    baseline = TextScore(nll=torch.tensor([[1.0, 2.0], [3.0, 4.0]]), seconds=(0.0,))
    score = TextScore(nll=torch.tensor([[1.5, 2.0], [4.0, 4.5]]), seconds=(0.0,))
    mean, error = loss_increase(score, baseline)
    assert mean == pytest.approx(0.5)
    assert error == pytest.approx(math.sqrt((0 + 0.25 + 0.25 + 0) / 3) / 2)
    assert loss_increase(baseline, baseline) == (0.0, 0.0)
