"""The likeliest tokens of rows of logits, by our kernel and without."""

from __future__ import annotations

import pytest
import torch

from engine.likeliest import PART, likeliest
from engine.native import library

TOP = 8


@pytest.fixture(params=["kernel", "torch"])
def how(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "torch":
        monkeypatch.setattr(library, "is_loaded", lambda: False)
    elif not library.load():
        pytest.skip("this machine can't have the native kernels")


@pytest.mark.parametrize("vocab", [TOP, PART, PART + 1, 20 * PART, 20 * PART + 1, 33 * PART - 1])
@pytest.mark.usefixtures("how")
def test_the_likeliest_are_those_of_topk(vocab: int) -> None:
    logits = 3 * torch.randn(6, vocab, generator=torch.Generator().manual_seed(vocab))
    logits[0] = torch.arange(vocab) / 50  # the largest all in one part, or after the last
    logits[1] = -torch.arange(vocab) / 50
    logits[2, 3:] = -torch.inf  # as a grammar leaves them
    rows = torch.tensor([5, 0, 2, 1, 1])
    ids, logprobs = likeliest(logits, rows, TOP)
    expected = logits[rows].log_softmax(-1)
    torch.testing.assert_close(logprobs, expected.topk(TOP).values, atol=1e-4, rtol=0)
    torch.testing.assert_close(expected.gather(1, ids), logprobs, atol=1e-4, rtol=0)
    assert all(len(set(row.tolist())) == TOP for row in ids)


@pytest.mark.usefixtures("how")
def test_rows_of_a_wider_array_are_read_where_they_are() -> None:
    wide = torch.randn(4, 700, generator=torch.Generator().manual_seed(1))
    rows = torch.arange(4)
    ids, logprobs = likeliest(wide[:, :600], rows, TOP)
    others = likeliest(wide[:, :600].contiguous(), rows, TOP)
    assert torch.equal(ids, others[0])
    torch.testing.assert_close(logprobs, others[1])


def test_a_row_that_is_not_there_is_refused() -> None:
    if not library.load():
        pytest.skip("this machine can't have the native kernels")
    with pytest.raises(RuntimeError, match="row 4 is not one of 4"):
        likeliest(torch.zeros(4, 600), torch.tensor([4]), TOP)


@pytest.mark.usefixtures("how")
def test_no_chance_is_above_one() -> None:
    logits = torch.zeros(1, 5000)
    for sure in torch.linspace(15, 60, 50):
        logits[0, 7] = sure
        assert likeliest(logits, torch.tensor([0]), TOP)[1].max() <= 0
