"""The seams of a method: it owns every trainable tensor once, and acts at named sites by hooks.

A method file states one equation. Everything that is the same for all methods stands here: who
owns a tensor, how sites share it, how the equation enters the forward pass, and how it is merged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from peftlab.errors import require
from peftlab.nf4 import dequantize_
from peftlab.peft_form import NoPeftForm, PeftForm, lora_form
from peftlab.products import linear
from peftlab.sites import FUSED, Site
from peftlab.thin import add_thin_

if TYPE_CHECKING:
    from peftlab.data import Batch


class NotMergeable(TypeError):
    """The method has no dense weight that reproduces it, so it cannot be merged."""


class NotPartial(TypeError):
    """The method acts on the model as a whole, so it cannot be switched off in some layers."""


class Method(nn.Module):
    """What every method is: attached to a backbone, owner of what is trained, perhaps mergeable.

    While attached it is the backbone's submodule `peft`: its only registration, so each of its
    tensors has exactly one name, however many sites share it.
    """

    mergeable = False
    identity = True  # whether the function at step 0 is the backbone's; if not, "Init:" says why
    parts = False  # whether the method keeps to a site's `rows`, if it has some
    cached = True  # whether the adapted model can generate with a key-value cache
    n_positions = 0  # that attention has to look at beside the tokens

    def __init__(self, sites: Sequence[Site]) -> None:
        super().__init__()
        for site in sites:
            allowed = f"here only rows of {FUSED}, and {type(self).__name__} changes whole layers"
            require(self.parts or site.rows is None, "method.sites", site.kind, allowed)
        self.sites = tuple(sites)  # a plain tuple: the backbone is not registered a second time
        self.handles: list[torch.utils.hooks.RemovableHandle] = []

    def read(self, encode: Callable[[str], Sequence[int]]) -> None:
        """Take the tokens of the texts among its settings, before it is attached; most have none.

        encode: the backbone's tokenizer, which adds nothing at either end.
        """

    def attach(self, backbone: nn.Module) -> None:
        """Freeze the backbone and let the method act on it."""
        backbone.requires_grad_(False)
        self.hook(backbone)
        backbone.peft = self
        self.train(backbone.training)

    def detach(self, backbone: nn.Module) -> None:
        """Take the method off again; a backbone whose own tensors were not trained is as before."""
        self.unhook(backbone)
        del backbone.peft

    def hook(self, backbone: nn.Module) -> None:
        """Enter the forward pass of the frozen backbone; keep the `handles`. May refuse."""

    def unhook(self, backbone: nn.Module) -> None:
        """Undo `hook`."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def only(self, backbone: nn.Module, on: Callable[[str], bool]) -> AbstractContextManager[None]:
        """Act, inside, on those sites alone whose names `on` accepts; nothing is trained there.

        Raises: NotPartial.
        """
        raise NotPartial(f"{type(self).__name__} acts on the model as a whole")

    def prepare(self, nats: Callable[[Batch], Tensor], batches: Sequence[Batch]) -> None:
        """Look at the training data once, attached, before the optimizer is built.

        nats: differentiable sum of nats of a batch. batches: all of the train split.
        """

    def objective(
        self,
        nats: Callable[[Batch], Tensor],
        logits: Callable[[Batch], Tensor],
        batch: Batch,
    ) -> tuple[Tensor, Tensor]:
        """Return (objective, nats) of a batch, both sums over its targets: nats twice, for most.

        nats: as in `prepare`. logits: [targets, V], float32, differentiable. Each call of either
        is a forward pass.
        """
        value = nats(batch)
        return value, value

    def penalty(self) -> Tensor | None:
        """Return what is added to the mean objective per target of a step, if anything."""
        return None

    def after_step(self, step: int, total: int) -> None:
        """Act on the trained tensors after optimizer step `step` of `total`, from 1.

        Gradients are still there.
        """

    def compact(self) -> None:
        """Drop for good what only training needs; in eval mode the function stays what it is.

        An adapter is saved, loaded and merged in this form. Doing it twice is doing it once.
        """

    def loaded(self) -> None:
        """Make anew what is not in the file out of what is, just after that was loaded."""

    def merge(self, backbone: nn.Module) -> None:
        """Write the method into the backbone's weights and detach. There is no way back: reload.

        Raises: NotMergeable where no dense weight reproduces the method.
        """
        raise NotMergeable(f"{type(self).__name__} cannot be merged into dense weights")

    def peft_form(self, backbone: nn.Module) -> PeftForm:
        """Return the same function as an adapter of Hugging Face's peft, for the bare backbone.

        Called attached and in eval mode, without gradients.
        Raises: NoPeftForm where peft has no such type.
        """
        raise NoPeftForm(f"peft has no type that computes what {type(self).__name__} does")


def attached(net: nn.Module) -> Method:
    """Return the method that is attached to `net`."""
    method = net.peft
    if not isinstance(method, Method):
        raise TypeError(f"{type(net).__name__}.peft is not a Method")
    return method


def trainable(net: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield (name, tensor) of all that is trained: the one answer for optimizer, count and file."""
    return ((name, p) for name, p in net.named_parameters() if p.requires_grad)


class SiteMethod(Method):
    """Changes the output of each site.

    A subclass declares its tensors with `own`, `tied` and `fixed`, then states the change in
    `forward`, which receives t, the site's tensors by name: the same code serves own and tied
    tensors, and one compiled graph serves all layers.
    """

    def __init__(self, sites: Sequence[Site]) -> None:
        super().__init__(sites)
        self.tensors = tuple(SimpleNamespace() for _ in self.sites)
        self.on: Callable[[str], bool] | None = None  # of `only`
        self.keys: dict[str, list[str]] = {}  # name -> each site's key in the module of that name

    def own(self, name: str, make: Callable[[Site], Tensor]) -> None:
        """Give every site its own trainable tensor `name`, float32."""
        self._declare(name, make, lambda site: site.name, nn.Parameter)

    def tied(self, name: str, make: Callable[[Site], Tensor]) -> None:
        """Give the sites of one kind and shape a common trainable tensor `name`, float32."""
        self._declare(name, make, lambda site: site.group, nn.Parameter)

    def fixed(self, name: str, make: Callable[[Site], Tensor], *, stored: bool = True) -> None:
        """Give every site its own constant `name`, float32 or whole numbers, stored or not."""
        self._declare(name, make, lambda site: site.name, partial(nn.Buffer, persistent=stored))

    def discard(self, *names: str) -> None:
        """Remove tensors of these names, if they are still there: for `compact`."""
        for name in set(names) & set(self.keys):
            delattr(self, name)
            del self.keys[name]
            for t in self.tensors:
                delattr(t, name)

    def _declare(self, name: str, make: Callable, key: Callable, wrap: Callable) -> None:
        holder = nn.Module()
        self.keys[name] = [key(site).replace(".", "/") for site in self.sites]  # no dots in names
        for site, k in zip(self.sites, self.keys[name], strict=True):
            if not hasattr(holder, k):
                tensor = make(site).detach()
                tensor = tensor.float() if tensor.is_floating_point() else tensor
                setattr(holder, k, wrap(tensor.to(site.module.weight.device)))
        setattr(self, name, holder)
        self._link(name)

    def _link(self, name: str) -> None:
        for t, k in zip(self.tensors, self.keys[name], strict=True):
            setattr(t, name, getattr(getattr(self, name), k))

    def _apply(self, fn: Callable, recurse: bool = True):
        """Link anew what a cast or a move (`.double()`, `.to()`) replaced by another tensor."""
        super()._apply(fn, recurse)
        for name in self.keys:
            self._link(name)
        return self

    def forward(self, t: SimpleNamespace, site: nn.Linear, x: Tensor, y: Tensor) -> Tensor:
        """Map input x [..., d_in] and frozen output y [..., d_out] to y' [..., d_out]."""
        raise NotImplementedError

    def place(self, backbone: nn.Module, site: Site) -> nn.Module:
        """Return the module whose input x and output y `forward` is given: the site, for most."""
        return site.module

    def hook(self, backbone: nn.Module) -> None:
        """Register a hook at the place of every site."""
        for place, t in self.acting(backbone):
            self.handles.append(place.register_forward_hook(partial(_rewrite, self, t)))

    def acting(self, backbone: nn.Module) -> list[tuple[nn.Module, SimpleNamespace]]:
        """Return the place and the tensors of every site, but inside `only` of those alone."""
        places = [self.place(backbone, site) for site in self.sites]  # may refuse: first of all
        found = zip(self.sites, places, self.tensors, strict=True)
        return [(place, t) for site, place, t in found if self.on is None or self.on(site.name)]

    @contextmanager
    def only(self, backbone: nn.Module, on: Callable[[str], bool]) -> Iterator[None]:
        """Register the hooks anew, at those sites alone."""
        self._hook_anew(backbone, on)
        try:
            yield
        finally:
            self._hook_anew(backbone, None)

    def _hook_anew(self, backbone: nn.Module, on: Callable[[str], bool] | None) -> None:
        self.unhook(backbone)
        self.on = on
        self.hook(backbone)


def _rewrite(method: SiteMethod, t: SimpleNamespace, site: nn.Module, args: tuple, y: Tensor):
    return method(t, site, args[0], y)


class WeightMethod(SiteMethod):
    """Maps each site's frozen W to W': a SiteMethod that a dense weight can express.

    A subclass states the map in `weight`, once; forward pass and merge both follow from it.
    """

    mergeable = True

    def weight(self, t: SimpleNamespace, W: Tensor) -> Tensor:
        """Map frozen W [d_out, d_in], float32, to W' of the same shape: the definition."""
        raise NotImplementedError

    def bias(self, t: SimpleNamespace, b: Tensor) -> Tensor:
        """Map the frozen bias b [d_out], float32, to b'; as it is, for most."""
        return b

    def forward(self, t: SimpleNamespace, site: nn.Linear, x: Tensor, y: Tensor) -> Tensor:
        """Apply W' and b' literally, which holds a dense W' until backward.

        Override it with a factored form of the same map. The laws hold the two equal.
        """
        with full_precision(x):
            W = self.weight(t, site.weight.float())
            b = None if site.bias is None else self.bias(t, site.bias.float())
        return linear(x, W, None if b is None else b.to(W.dtype))

    @torch.no_grad()
    def merge(self, backbone: nn.Module) -> None:
        """Write every W' and b', computed in float32 at least, and detach.

        A quantised backbone is dense afterwards; one in float64, with its method, stays so.
        """
        dequantize_(backbone)
        for site, t in zip(self.sites, self.tensors, strict=True):
            W, b = site.module.weight, site.module.bias
            W.copy_(self.weight(t, _float32_at_least(W)))
            if b is not None:
                b.copy_(self.bias(t, _float32_at_least(b)))
        self.detach(backbone)


class LowRank(WeightMethod):
    """W' = W + up down: a WeightMethod whose change is a product of two thin matrices.

    A subclass states only `factors`; the dense and the factored form follow from it.
    """

    def __init__(self, sites: Sequence[Site], *, dropout: float) -> None:
        super().__init__(sites)
        self.drop = dropout_of(dropout)

    def factors(self, t: SimpleNamespace) -> tuple[Tensor, Tensor]:
        """Return down [r, d_in] and up [d_out, r], float32, every scale included."""
        raise NotImplementedError

    def weight(self, t: SimpleNamespace, W: Tensor) -> Tensor:
        """W' = W + up down."""
        down, up = self.factors(t)
        return W + up @ down

    def forward(self, t: SimpleNamespace, site: nn.Linear, x: Tensor, y: Tensor) -> Tensor:
        """Y' = y + up (down x)."""
        with full_precision(x):
            down, up = self.factors(t)
        return add_thin_(y, self.drop(x), down, up)

    def peft_form(self, backbone: nn.Module) -> PeftForm:
        """LoRA, with each site's factors written out."""
        return lora_form(self.sites, [self.factors(t) for t in self.tensors])


def full_precision(x: Tensor) -> torch.autocast:
    """Factors are combined in float32 even where autocast makes the large products bf16."""
    return torch.autocast(x.device.type, enabled=False)


def _float32_at_least(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def dropout_of(p: float) -> nn.Dropout:
    """Dropout of probability p, for the input of an adapter's branch."""
    number = isinstance(p, int | float) and not isinstance(p, bool)
    require(number and 0 <= p < 1, "method.dropout", p, "a probability in [0, 1)")
    return nn.Dropout(p)


def kaiming(*shape: int) -> Tensor:
    """U(-1/√fan_in, 1/√fan_in), as in the LoRA authors' code: Kaiming uniform with a = √5."""
    return nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5))


def normal(*shape: int, std: float) -> Tensor:
    """N(0, std²)."""
    return torch.randn(shape) * std


def constant(*shape: int, value: float) -> Tensor:
    """Fill a tensor with one value."""
    return torch.full(shape, float(value))


def rms(W: Tensor) -> Tensor:
    """ν: the root of the mean square of all entries of W, float32 scalar."""
    return W.float().square().mean().sqrt()


def check_rank(sites: Sequence[Site], **ranks: int) -> None:
    """Require each rank to be a whole number from 1 to the smaller side of every site."""
    smallest = min(sites, key=lambda s: min(s.d_in, s.d_out))
    most = min(smallest.d_in, smallest.d_out)
    for name, rank in ranks.items():
        whole = isinstance(rank, int) and not isinstance(rank, bool)
        require(
            whole and 1 <= rank <= most,
            f"method.{name}",
            rank,
            f"a whole number from 1 to {most} (the smaller side of {smallest.name})",
        )


def check_count(most: int | None = None, **counts: int) -> None:
    """Require each to be a whole number of at least 1 (and at most `most`)."""
    for name, count in counts.items():
        whole = isinstance(count, int) and not isinstance(count, bool)
        allowed = "a whole number of at least 1" + (f" and at most {most}" if most else "")
        require(whole and 1 <= count <= (most or count), f"method.{name}", count, allowed)


def check_positive(**values: float) -> None:
    """Require each to be a finite number above 0."""
    for name, value in values.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        require(number and 0 < value < math.inf, f"method.{name}", value, "a finite number above 0")


def check_switch(**switches: bool) -> None:
    """Require each to be true or false."""
    for name, value in switches.items():
        require(isinstance(value, bool), f"method.{name}", value, "true or false")
