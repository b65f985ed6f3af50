"""Hugging Face's peft, whose methods stand beside ours as baselines; only this file imports it."""

from __future__ import annotations

import copy
import importlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from peftlab.errors import InputError, require
from peftlab.method import Method, NotPartial
from peftlab.nf4 import NF4Linear, dequantize_
from peftlab.peft_form import PeftForm
from peftlab.prompts import PromptMethod
from peftlab.sites import Site

if TYPE_CHECKING:
    from peftlab.data import Batch

PROMPTS = ("PROMPT_TUNING", "P_TUNING")  # embeddings before those of the tokens
CACHES = ("PREFIX_TUNING", "CARTRIDGE")  # keys and values before those of the tokens
REFUSED = {
    "ADALORA": "it must be called after each step; take method=adalora",
    "ADAMSS": "it must be called after each step",
    "ADAPTION_PROMPT": "it replaces whole attentions",
    "CPT": "it has a loss of its own",
    "MULTITASK_PROMPT_TUNING": "it needs the task of each row",
    "POLY": "it needs the task of each row",
    "SHADOW": "it has a loss of its own",
    "XLORA": "it mixes adapters that were trained before",
}
# What peft raises for arguments, or a model, that do not fit; it has no error of its own.
ERRORS = (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError, OSError)


class HfPeft(Method):
    """Hugging Face peft: Mangrulkar et al. 2022, release 0.21 of github.com/huggingface/peft.

        y' = layer(x)          layer: peft's, of type peft_type(**args), around W and b of each site

    Any type that needs no more than a forward pass, by peft's name and with peft's arguments
    (LORA, OFT, BOFT, IA3, VERA, HRA ...). It adapts the sites, or what args.target_modules names;
    null there leaves the choice to peft. A type that learns a prompt (PROMPT_TUNING, P_TUNING) or
    keys and values (PREFIX_TUNING, CARTRIDGE) acts on the whole model, as in peft. What is trained
    is float32 and the method's; all that peft keeps fixed is stored with the adapter.

    n_peft: what peft's own get_nb_trainable_parameters says.

    Init: the type's, mostly the identity. A type that learns a prompt, keys or values is not the
    identity at step 0, nor are C3A, FOURIERFT and UNILORA unless their arguments say so.
    Trainable:
        per model: n_peft
    Differs from the paper: as peft does. Refused are types that need a row's task, a loss of their
    own or a call after each step, arguments that train or change the model's own weights, and a
    quantised model. Types for which peft's merge is missing, or another function, do not merge.
    Merge: exact.
    Family: reparametrisation.
    """

    def __init__(
        self, sites: Sequence[Site], *, peft_type: str, args: Mapping[str, Any] | None
    ) -> None:
        super().__init__(sites)
        self.peft = _peft()
        self.peft_type = peft_type
        self.config = _config(self.peft, peft_type, args, [site.name for site in sites])
        self.identity = peft_type not in PROMPTS + CACHES
        self.seed = int(torch.randint(2**62, ()))  # of peft's draws, which need the backbone
        self.wrapped: list[tuple[str, nn.Module, Any]] = []  # a layer's name, itself, and peft's
        self.kept: list[tuple[dict, Any, str]] = []  # where peft keeps a constant, and our buffer
        self.register_state_dict_post_hook(_each_once)

    def hook(self, backbone: nn.Module) -> None:
        """Let peft build its layers around those of the backbone, and call them instead."""
        quantised = any(isinstance(module, NF4Linear) for module in backbone.modules())
        require(not quantised, "model.quantize", "nf4", "null for HfPeft, which wraps dense layers")
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            before = _fingerprints(backbone)
            with _put_back(backbone) as replaced:
                model = self._build(backbone)
                vars(self)["model"] = model  # no submodule: it holds the backbone
                trained = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
            changed = [n for n, mark in _fingerprints(backbone).items() if mark != before[n]]
            self._require(not changed, f"changes the model's own {changed[:1]}, which is frozen")
            if self.config.is_prompt_learning:
                self._begin_with(model, backbone)
            else:
                self._wrap(replaced)
        backbone.requires_grad_(False)
        own = {id(p): p for p in self.parameters()}
        others = [name for key, name in trained.items() if key not in own]
        self._require(not others, f"trains {others[:1]}, which is no part of a layer of its own")
        for p in own.values():
            p.data = p.data.float() if p.requires_grad else p.data
        self.train(backbone.training)

    def unhook(self, backbone: nn.Module) -> None:
        """Give the backbone's layers their own forward pass back."""
        for _, layer, _ in self.wrapped:
            del vars(layer)["forward"]
        if self.config.is_prompt_learning:
            self.prompt.unhook(backbone)

    @contextmanager
    def only(self, backbone: nn.Module, on: Callable[[str], bool]) -> Iterator[None]:
        """Give the other layers their own forward pass back."""
        if self.config.is_prompt_learning:
            raise NotPartial(f"{self.peft_type} acts on the model as a whole")
        off = [(layer, theirs) for name, layer, theirs in self.wrapped if not on(name)]
        for layer, _ in off:
            del vars(layer)["forward"]
        try:
            yield
        finally:
            for layer, theirs in off:
                vars(layer)["forward"] = theirs.forward

    def prepare(self, nats: Callable[[Batch], Tensor], batches: Sequence[Batch]) -> None:
        """Refuse rows that leave a prompt no room. Raises: InputError."""
        if self.config.is_prompt_learning:
            self.prompt.prepare(nats, batches)

    @torch.no_grad()
    def merge(self, backbone: nn.Module) -> None:
        """Let peft merge each of its layers, take the result over and detach."""
        if not self.mergeable:
            super().merge(backbone)
        dequantize_(backbone)
        for _, layer, theirs in self.wrapped:
            theirs.merge()
            layer.load_state_dict(theirs.get_base_layer().state_dict())
        self.detach(backbone)

    def peft_form(self, backbone: nn.Module) -> PeftForm:
        """Return what peft itself saves of its model."""
        with self._inside(backbone):
            tensors = self.peft.get_peft_model_state_dict(self.model, save_embedding_layers=False)
        return PeftForm(json.loads(json.dumps(self.config.to_dict(), default=sorted)), tensors)

    @contextmanager
    def _inside(self, backbone: nn.Module) -> Iterator[None]:
        """Let peft's layers take the place of the backbone's, as peft has it."""
        del backbone.peft
        for name, _, theirs in self.wrapped:
            theirs._modules["base_layer"] = vars(theirs).pop("base_layer")
            backbone.set_submodule(name, theirs)
        try:
            yield
        finally:
            for name, layer, theirs in self.wrapped:
                vars(theirs)["base_layer"] = theirs._modules.pop("base_layer")
                backbone.set_submodule(name, layer)
            backbone.peft = self

    def _apply(self, fn: Callable, recurse: bool = True):
        """Give peft the constants that a cast or a move replaced."""
        super()._apply(fn, recurse)
        for place, key, name in self.kept:
            place[key] = self.constants.get_buffer(name)
        return self

    def _build(self, backbone: nn.Module) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # of transformers, meant for peft
                return self.peft.get_peft_model(cast(Any, backbone), self.config)
        except ERRORS as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            self._require(False, f"refused by peft: {reason[0]}")

    def _require(self, ok: bool, reason: str) -> None:
        require(ok, "method.peft_type", self.peft_type, reason)

    def _begin_with(self, model: Any, backbone: nn.Module) -> None:
        """Put what the model's prompt encoder gives before the tokens."""
        kind = _Prompt if self.peft_type in PROMPTS else _Cache
        self.encoder = model.prompt_encoder
        self.prompt = kind(model.get_prompt, self.config.num_virtual_tokens)
        self.prompt.hook(backbone)
        self.n_positions = self.config.num_virtual_tokens

    def _wrap(self, replaced: list[tuple[str, nn.Module, Any]]) -> None:
        """Own peft's layers, without those of the backbone inside, and call them instead."""
        for name, layer, theirs in replaced:
            inside = theirs._modules.get("base_layer")
            self._require(inside is layer, f"replaces {name} as a whole, and not by a layer")
        merges: dict[type, bool] = {}
        self.layers, self.constants = nn.ModuleDict(), nn.Module()
        for name, layer, theirs in replaced:
            twin = copy.copy(layer)  # the same tensors, by the same dicts
            del theirs._modules["base_layer"]
            vars(theirs)["base_layer"] = twin  # no submodule: not its owner
            self.layers[name.replace(".", "/")] = theirs
            self._keep_constants(name.replace(".", "/"), theirs)
            if type(theirs) not in merges:
                merges[type(theirs)] = _merges(theirs)
            vars(layer)["forward"] = theirs.forward
            self.wrapped.append((name, layer, theirs))
        self.mergeable = all(merges.values())

    def _keep_constants(self, name: str, theirs: nn.Module) -> None:
        """Have every constant of a layer stored, be it a buffer or a tensor in a plain dict."""
        for part, module in theirs.named_modules():
            module._non_persistent_buffers_set.clear()
            for attribute, value in vars(module).items():
                for key in value if isinstance(value, dict) and attribute[0] != "_" else ():
                    if isinstance(value[key], Tensor):
                        where = "/".join((name, *part.split("."), attribute, str(key)))
                        self.constants.register_buffer(where, value[key])
                        self.kept.append((value, key, where))


class _Prompt(PromptMethod):
    """Puts the embeddings that peft gives before those of the tokens."""

    def __init__(self, give: Callable[[int], Any], length: int) -> None:
        super().__init__((), length=length)
        self.give = give  # for so many rows

    def extend(self, e: Tensor) -> Tensor:
        """Return peft's embeddings, then those of the tokens."""
        return torch.cat([self.give(len(e)).to(e.dtype), e], dim=1)


class _Cache(_Prompt):
    """Puts the keys and values that peft gives before those of the tokens, as a filled cache."""

    def _before(self, decoder: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        kwargs = {**dict(zip(self.names, args, strict=False)), **kwargs}
        ids, cache = kwargs.get("input_ids"), kwargs.get("past_key_values")
        positions, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
        self.given = 0  # of the positions that the model gives back
        if cache is None or cache.get_seq_length() == 0:
            tokens = kwargs["inputs_embeds"] if ids is None else ids
            kwargs["past_key_values"] = self.give(len(tokens))
        if positions is not None:
            kwargs["position_ids"] = positions + self.length
        if mask is not None:
            kwargs["attention_mask"] = torch.cat([mask.new_ones(len(mask), self.length), mask], 1)
        return (), kwargs


def _peft() -> ModuleType:
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        how = "install it with: pip install 'peftlab[peft]'"
        raise InputError(f"method=hf_peft: needs Hugging Face's peft; {how}") from error


def _config(peft: Any, peft_type: str, args: Mapping[str, Any] | None, names: list[str]) -> Any:
    """Return peft's configuration; unless `args` says otherwise, its targets are `names`.

    Raises: InputError for an unknown or refused type, and for what peft says against `args`.
    """
    types = importlib.import_module("peft.mapping").PEFT_TYPE_TO_CONFIG_MAPPING
    known = sorted(name.value for name in types if name.value not in REFUSED)
    why = REFUSED.get(peft_type, "unknown to peft")
    require(peft_type in known, "method.peft_type", peft_type, f"{why}; one of {', '.join(known)}")
    mapping = args is None or isinstance(args, Mapping)
    require(mapping, "method.args", args, "null, or a mapping of arguments of peft's configuration")
    keywords = {"task_type": "CAUSAL_LM", **(args or {})}
    if hasattr(types[peft_type], "target_modules"):
        keywords = {"target_modules": names, **keywords}
    try:
        return types[peft_type](**keywords)
    except ERRORS as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"method.args={args}: refused by peft's {peft_type} ({reason})") from error


@contextmanager
def _put_back(backbone: nn.Module) -> Iterator[list[tuple[str, nn.Module, Any]]]:
    """Undo inside what takes the place of a module; tell name, module and what took its place."""
    tree = [(name, module, dict(module._modules)) for name, module in backbone.named_modules()]
    attributes = set(vars(backbone))
    replaced: list[tuple[str, nn.Module, Any]] = []
    try:
        yield replaced
    finally:
        for name, parent, children in tree:
            for key, child in children.items():
                now = parent._modules[key]
                if child is not None and now is not child:
                    replaced.append((f"{name}.{key}".removeprefix("."), child, now))
                    parent._modules[key] = child
        for attribute in set(vars(backbone)) - attributes:
            delattr(backbone, attribute)


def _fingerprints(net: nn.Module) -> dict[str, tuple[int, float]]:
    """Tell place and norm of every tensor: neither stays the same where it was written to."""
    return {
        name: (p.untyped_storage()._cdata, p.float().norm().item())
        for name, p in net.named_parameters()
    }


@torch.no_grad()
def _merges(theirs: Any) -> bool:
    """Whether peft's own merge keeps the function of such a layer, away from its start."""
    trial = copy.deepcopy(theirs).float().eval()
    base = vars(trial)["base_layer"].float()
    for p in trial.parameters():
        p.add_(0.1 * torch.randn_like(p) * p.requires_grad)
    W = base.weight
    x = torch.arange(len(W), device=W.device)[:8]
    x = x if isinstance(base, nn.Embedding) else torch.randn(8, W.shape[-1], device=W.device)
    adapted = trial(x)
    try:
        trial.merge()
    except (NotImplementedError, ValueError):  # it has none, or none for such a layer
        return False
    error = (trial.get_base_layer()(x) - adapted).abs().max()
    return bool(error <= 1e-4 * adapted.abs().max())


def _each_once(method: nn.Module, tensors: dict[str, Tensor], prefix: str, _: object) -> None:
    """Of a tensor that layers share, only the first name is left."""
    seen: set[int] = set()
    for name in [name for name in tensors if name.startswith(prefix)]:
        place = tensors[name].data_ptr()
        if place in seen:
            del tensors[name]
        seen.add(place)
