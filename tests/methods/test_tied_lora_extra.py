import pytest
import torch
from conftest import make, shake, tiny_llama


@pytest.mark.parametrize(("r_1", "r_2"), [(2, 5), (5, 2)])
def test_change_has_at_most_the_smaller_rank(r_1, r_2):
    method = make("tied_lora_extra", tiny_llama(), r_1=r_1, r_2=r_2, pre=True, post=True)
    shake(method)
    for site, t in zip(method.sites, method.tensors, strict=True):
        W = site.module.weight
        assert t.M.shape == (r_2, r_1)
        change = (method.weight(t, torch.zeros_like(W))).double()
        assert torch.linalg.matrix_rank(change, rtol=1e-5) == 2
