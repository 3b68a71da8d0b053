"""Which precision is the faster one here."""

import pytest
import torch

from leapasr.model.precision import advice_against, bfloat16_speedup


@pytest.mark.parametrize(
    ("precision", "speedup", "advice"),
    [
        ("bf16", 0.125, "products in bf16 take 8.0 times as long as in fp32 on this cpu: --precision fp32 is faster"),
        ("bf16", 5.0, None),
        ("fp32", 0.125, None),
    ],
)
def test_advice_where_bfloat16_is_slow(monkeypatch, precision, speedup, advice):
    monkeypatch.setattr("leapasr.model.precision.bfloat16_speedup", lambda device: speedup)
    assert advice_against(precision, torch.device("cpu")) == advice


def test_products_are_timed_once():
    first = bfloat16_speedup(torch.device("cpu"))
    assert 0 < first < 1000
    assert bfloat16_speedup(torch.device("cpu")) == first  # another measurement would give other digits
