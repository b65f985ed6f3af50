import torch
from conftest import make, shake, tiny_llama


def test_stacked_changes_have_the_multilinear_rank_of_a_tucker_decomposition():
    r_1, r_2, l_1 = 4, 3, 2
    method = make("tensor_embedding", tiny_llama(layers=5), r_1=r_1, r_2=r_2, l_1=l_1)
    shake(method)
    for kind in ("q", "k", "down"):
        change = torch.stack(
            [
                method.weight(t, torch.zeros_like(s.module.weight))
                for s, t in zip(method.sites, method.tensors, strict=True)
                if s.kind == kind
            ]
        ).double()  # [layers, d_out, d_in]
        # each of them also divides by nu, its own per layer: a factor of the mode of layers
        ranks = [
            int(torch.linalg.matrix_rank(change.movedim(mode, 0).flatten(1), rtol=1e-5))
            for mode in range(3)
        ]
        assert ranks == [l_1, r_2, r_1], kind
