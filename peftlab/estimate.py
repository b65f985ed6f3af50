"""How much memory training needs: computed from shapes, without the memory or the weights.

The model, the method and one forward pass are built from torch's fake tensors, which have a
shape, a type and an autograd graph, but no data. So the one code that trains also tells what it
keeps, for every method, model and optimizer alike, and an 8B model takes seconds on a laptop.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from peftlab.backbone import DTYPES, SHORT, conv1d_to_linear
from peftlab.bits import LOGITS_PER_CHUNK
from peftlab.method import trainable
from peftlab.nf4 import pack, quantize_, unpack
from peftlab.optim import NetOptimizer, in_backward
from peftlab.run import build_method, build_optimizer
from peftlab.sites import find_sites, kinds_of


@dataclass(frozen=True)
class Memory:
    """Bytes that one step holds; not counted: Python, torch's code, and short-lived copies."""

    frozen: int  # the backbone's frozen weights and the method's constants
    trained: int  # float32
    gradients: int  # of all trained tensors; of the largest, if updated within backward
    optimizer: int  # its state
    activations: int  # what the forward pass keeps for backward
    loss: int  # the gradient of the last hidden state (of the head, if trained) and one chunk

    @property
    def peak(self) -> int:
        """The larger of the two tops: the end of the forward pass, and the optimizer's step."""
        always = self.frozen + self.trained + self.optimizer
        return always + max(self.activations + self.loss, self.gradients)


def estimate(
    model: PretrainedConfig,
    method: Mapping,
    optimizer: Mapping,
    *,
    rows: int,
    length: int,
    precision: str,
    quantize: str | None = None,
) -> Memory:
    """Estimate training with batches of rows x length tokens, each with a target, on the CPU.

    method, optimizer: config groups. precision: fp32 or bf16, as in conf/config.yaml.
    """
    autocast = precision == "bf16"
    unpack(pack(torch.ones(1, 64)), (1, 64), torch.float32)  # its cached tables must be real ones
    model._attn_implementation = "eager" if length <= SHORT else "sdpa"
    with FakeTensorMode(allow_non_fake_inputs=True):
        net = AutoModelForCausalLM.from_config(model, dtype=DTYPES[precision])
        conv1d_to_linear(net)
        if quantize is not None:
            sites = find_sites(net, kinds_of(model.model_type, None), "all")
            quantize_([site.module for site in sites], torch.device("cpu"))
        built = build_method(method, net, None)
        built.attach(net)
        net.train()
        params = [p for _, p in trainable(net)]
        chosen = build_optimizer(optimizer, params)
        if isinstance(chosen, NetOptimizer):
            chosen.attach(net)
        activations = _kept_for_backward(net, rows, length, autocast=autocast)
        head = net.get_output_embeddings().weight
        loss = rows * length * net.config.hidden_size * (2 if autocast else 4)
        loss += 4 * min(LOGITS_PER_CHUNK, rows * length * head.shape[0])
        loss += 4 * head.numel() if head.requires_grad else 0
        sizes = [4 * p.numel() for p in params]
        total = _bytes((*net.parameters(), *net.buffers()))
        return Memory(
            frozen=total - sum(sizes),
            trained=sum(sizes),
            gradients=max(sizes) if in_backward(chosen) else sum(sizes),
            optimizer=_state_bytes(chosen, params),
            activations=activations,
            loss=loss,
        )


def _kept_for_backward(net: PreTrainedModel, rows: int, length: int, *, autocast: bool) -> int:
    """Bytes that a forward pass saves, each storage once, without the model's own tensors."""
    own = {t.untyped_storage()._cdata for t in (*net.parameters(), *net.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # held, so that its address is not used again
        return tensor

    ids = torch.zeros(rows, length, dtype=torch.int64)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        net.base_model(input_ids=ids, use_cache=False)
    return sum(storage.nbytes() for storage in kept.values())


def _state_bytes(optimizer: torch.optim.Optimizer, params: Iterable[nn.Parameter]) -> int:
    """Bytes of the optimizer's state after a step."""
    for p in params:
        p.grad = torch.empty_like(p)
    optimizer.step()
    return _bytes(v for state in optimizer.state.values() for v in state.values())


def _bytes(tensors: Iterable[object]) -> int:
    """Bytes of all distinct storages; what is no tensor has none."""
    storages = (t.untyped_storage() for t in tensors if isinstance(t, Tensor))
    return sum({s._cdata: s.nbytes() for s in storages}.values())
