"""Several methods on one backbone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from peftlab.method import Method, WeightMethod
from peftlab.sites import Site

if TYPE_CHECKING:
    from peftlab.data import Batch


class Stack(Method):
    """Several methods at once on one backbone, each with sites of its own.

    Two maps of one weight are refused: each is defined from the frozen W.
    """

    def __init__(self, sites: Sequence[Site], members: Sequence[Method]) -> None:
        super().__init__(sites)
        maps = [s.name for m in members if isinstance(m, WeightMethod) for s in m.sites]
        if len(set(maps)) < len(maps):
            raise ValueError("two members of a Stack map the same weight")
        self.members = nn.ModuleList(members)
        self.cached = all(member.cached for member in members)
        self.n_positions = sum(member.n_positions for member in members)

    def _each(self) -> Iterator[Method]:
        return (cast(Method, member) for member in self.members)

    def read(self, encode: Callable[[str], Sequence[int]]) -> None:
        """Let every member read."""
        for member in self._each():
            member.read(encode)

    def hook(self, backbone: nn.Module) -> None:
        """Let every member in."""
        for member in self._each():
            member.hook(backbone)

    def unhook(self, backbone: nn.Module) -> None:
        """Unhook every member, the last one first."""
        for member in reversed(list(self._each())):
            member.unhook(backbone)

    @contextmanager
    def only(self, backbone: nn.Module, on: Callable[[str], bool]) -> Iterator[None]:
        """Restrict every member."""
        with ExitStack() as members:
            for member in self._each():
                members.enter_context(member.only(backbone, on))
            yield

    def prepare(self, nats: Callable[[Batch], Tensor], batches: Sequence[Batch]) -> None:
        """Prepare every member."""
        for member in self._each():
            member.prepare(nats, batches)

    def penalty(self) -> Tensor | None:
        """Return the sum of the members' penalties."""
        penalties = [p for p in (member.penalty() for member in self._each()) if p is not None]
        return torch.stack(penalties).sum() if penalties else None

    def after_step(self, step: int, total: int) -> None:
        """Let every member act."""
        for member in self._each():
            member.after_step(step, total)

    def compact(self) -> None:
        """Compact every member."""
        for member in self._each():
            member.compact()

    def loaded(self) -> None:
        """Let every member make anew what it did not store."""
        for member in self._each():
            member.loaded()
