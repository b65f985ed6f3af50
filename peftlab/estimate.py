"""How much memory training needs: computed from shapes, without the memory or the weights.

The model, the method and one forward pass are built from torch's fake tensors, which have a
shape, a type and an autograd graph, but no data. So the one code that trains also tells what it
keeps, for every method, model and optimizer alike, and an 8B model takes seconds on a laptop.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    masking_utils,
)

from peftlab.backbone import DTYPES, conv1d_to_linear, eager_is_faster
from peftlab.bits import LOGITS_PER_CHUNK
from peftlab.errors import InputError
from peftlab.flops import FlopCounter
from peftlab.method import trainable
from peftlab.nf4 import pack, quantize_, unpack
from peftlab.optim import NetOptimizer, in_backward
from peftlab.parts import build_method, build_optimizer
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
    kinds: Mapping[str, str] | None = None,
) -> Memory:
    """Estimate training with batches of rows x length tokens, each with a target, on the CPU.

    method, optimizer: config groups. precision: fp32 or bf16, as in conf/config.yaml. kinds:
    model.kinds. Raises: InputError for a method that cannot be built without data.
    """
    width = 2 if precision == "bf16" else 4
    with _built(model, method, optimizer, length, precision, quantize, kinds) as (net, chosen):
        params = [p for _, p in trainable(net)]
        activations = _kept_for_backward(net, rows, length, autocast=precision == "bf16")
        head = cast(nn.Linear, net.get_output_embeddings()).weight
        loss = width * rows * length * net.config.hidden_size
        loss += width * min(LOGITS_PER_CHUNK, rows * length * head.shape[0])
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


def step_flops(
    model: PretrainedConfig,
    method: Mapping,
    optimizer: Mapping,
    *,
    rows: int,
    length: int,
    precision: str,
) -> int:
    """Count the floating-point operations of a training step, each token with a target.

    As `Progress.flops` does while it trains, but over tensors without data. Arguments as of
    `estimate`.
    """
    with _built(model, method, optimizer, length, precision, None, None) as (net, _):
        ids = torch.zeros(rows, length, dtype=torch.int64)
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
        with FlopCounter() as counter, autocast:
            hidden = net.base_model(input_ids=ids, use_cache=False).last_hidden_state
            hidden.float().sum().backward()
        head = cast(nn.Linear, net.get_output_embeddings()).weight
        products = (
            2 + head.requires_grad
        )  # the logits, the gradient of their input, and of the head
        return counter.total + products * 2 * rows * length * head.numel()


@contextmanager
def _built(
    model: PretrainedConfig,
    method: Mapping,
    optimizer: Mapping,
    length: int,
    precision: str,
    quantize: str | None,
    kinds: Mapping[str, str] | None,
) -> Iterator[tuple[PreTrainedModel, torch.optim.Optimizer]]:
    """Yield the model with the method attached, and the optimizer, all of tensors without data."""
    unpack(pack(torch.ones(1, 64)), (1, 64), torch.float32)  # its cached tables must be real ones
    eager = eager_is_faster(torch.device("cpu"), precision, length)
    model = copy(model)  # the caller's may be that of a model in use
    model._attn_implementation = "eager" if eager else "sdpa"
    with _converting(), _one_document(), _Shapes(allow_non_fake_inputs=True), _Scalars():
        net = AutoModelForCausalLM.from_config(model, dtype=DTYPES[precision])
        conv1d_to_linear(net)
        net.requires_grad_(False)
        if quantize is not None:
            sites = find_sites(net, kinds_of(model.model_type, kinds), "all")
            quantize_([site.module for site in sites], torch.device("cpu"))
        built = build_method(method, net, kinds)
        built.attach(net)
        net.train()
        chosen = build_optimizer(optimizer, [p for _, p in trainable(net)])
        if isinstance(chosen, NetOptimizer):
            chosen.attach(net)
        yield net, chosen


class _Shapes(FakeTensorMode):
    """torch's mode, shared by deep copies of its tensors, which would copy it with all it knows.

    After such a copy Python's garbage collector fails at random (torch 2.13).
    """

    def __deepcopy__(self, memo: dict) -> "_Shapes":
        return self


@contextmanager
def _converting() -> Iterator[None]:
    """Let `Module.to` and its like convert parameters without data, as libraries do.

    torch 2.13 swaps such a parameter for the converted one, and refuses where the fake mode holds a
    weak reference to one of the two (pytorch #184976).
    """
    swap = torch.utils.swap_tensors
    torch.utils.swap_tensors = _take_over
    try:
        with warnings.catch_warnings():  # a copy of such a tensor asks torch for its address
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
            yield
    finally:
        torch.utils.swap_tensors = swap


def _take_over(old: Tensor, new: Tensor) -> None:
    old.data = new.data


@contextmanager
def _one_document() -> Iterator[None]:
    """Let transformers take each row for one document, as it does where it sees the positions.

    Without data it cannot tell, and gives SDPA a mask, which takes another way and more memory.
    """
    find = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = find


class _Scalars(TorchDispatchMode):
    """Give 0 where a number is read out of a tensor without data: a seed, a draw, a comparison."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        try:
            return func(*args, **(kwargs or {}))
        except DataDependentOutputException:
            dtype = args[0].dtype
            return False if dtype == torch.bool else 0.0 if dtype.is_floating_point else 0
        except DynamicOutputShapeException as error:
            told = f"method: its sizes depend on numbers that are not there ({error})"
            raise InputError(told) from error


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
        hidden = net.base_model(input_ids=ids, use_cache=False).last_hidden_state
    head = cast(nn.Linear, net.get_output_embeddings()).weight
    if not hidden.requires_grad and any(p is not head for _, p in trainable(net)):
        raise InputError("method: whether it acts depends on numbers that are not there")
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
