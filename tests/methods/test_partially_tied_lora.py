import torch
from conftest import make, shake, tiny_llama


def test_another_basis_of_the_tied_space_is_the_same_function():
    method = make("partially_tied_lora", tiny_llama(), l_a=2, l_b=3)
    shake(method)
    weights = [site.module.weight for site in method.sites]
    with torch.no_grad():
        before = [method.weight(t, W) for t, W in zip(method.tensors, weights, strict=True)]
        turns = {"A": torch.tensor([[2.0, 1.0], [-1.0, 3.0]]), "B": torch.randn(3, 3).double()}
        for letter, turn in turns.items():
            turn = turn.double()
            for space in getattr(method, f"L_{letter}").parameters():
                space.copy_(torch.einsum("lm,mij->lij", turn, space.double()))
            for w in getattr(method, f"w_{letter}").parameters():
                w.copy_(torch.linalg.inv(turn).T @ w.double())
        after = [method.weight(t, W) for t, W in zip(method.tensors, weights, strict=True)]
    for W, one, other in zip(weights, before, after, strict=True):
        assert (one - W).abs().max() > 1e-2
        torch.testing.assert_close(other, one, atol=1e-5, rtol=1e-5)


def test_layers_share_the_space_and_choose_their_own_point_in_it():
    method = make("partially_tied_lora", tiny_llama(), l_a=2, l_b=3)
    q = [t for s, t in zip(method.sites, method.tensors, strict=True) if s.kind == "q"]
    assert len({id(t.L_A) for t in q}) == len({id(t.L_B) for t in q}) == 1
    assert len({id(t.w_A) for t in q}) == len({id(t.w_B) for t in q}) == 3
    assert q[0].L_A.shape == (2, 4, 16) and q[0].L_B.shape == (3, 16, 4)
