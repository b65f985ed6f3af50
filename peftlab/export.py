"""`peftlab export RUN --to FORM -o DIR`: what a run has trained, for others to load.

merged   a Hugging Face checkpoint with W' in place of W, loaded again and compared before it counts
adapter  our adapter.safetensors, with what `peftlab.recorded.restore` needs to put it on its base
peft     an adapter of Hugging Face's peft, by the form that the method gives of itself
"""

from __future__ import annotations

import itertools
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peftlab.backbone import DTYPES, Backbone
from peftlab.cards import card
from peftlab.checkpoint import read_tensors
from peftlab.config import method_name
from peftlab.errors import InputError, require
from peftlab.files import place, save_tensors, write_atomic
from peftlab.merging import RELATIVE
from peftlab.method import NotMergeable, attached
from peftlab.nf4 import dequantize_
from peftlab.peft_form import NoPeftForm, PeftForm, at
from peftlab.recorded import ADAPTER, EXPORTED, Record, carried, read_exported, read_record, restore

PROBE = """\
The committee met on Tuesday to discuss 14 proposals, of which only three were adopted. "We expected
more," said its chair. def area(r): return 3.14159 * r ** 2  # in cm²; Äpfel und Birnen."""
PROBE_TOKENS = 64
BIASES = ("attention_bias", "mlp_bias")  # of a model's config: whether its layers have biases


def export(run: Path, form: str, folder: Path, *, dtype: str, base: Path | None) -> int:
    """Write the run of `run`, or the adapter exported from one, to `folder`; return the exit code.

    dtype: fp32 or bf16, of merged weights. base: a folder with the backbone, if it is not where
    the run took it from.
    Raises: InputError if the method has no such form, with the reason; nothing is written then.
    """
    require(form in FORMS, "--to", form, f"one of {', '.join(FORMS)}")
    fits = dtype == "fp32" or form == "merged"
    require(fits, "--dtype", dtype, "only of --to merged: an adapter is in float32")
    exported = (run / EXPORTED).is_file()
    record = read_exported(run) if exported else read_record(run)
    with _filling(folder) as empty:
        about, told = FORMS[form](record, empty, dtype=dtype, base=base)
        facts = {"form": form, **carried(record), **about}
        write_atomic(empty / EXPORTED, json.dumps(facts, indent=1) + "\n")
    print(f"{folder}: {told}")
    return 0


@contextmanager
def _filling(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to fill, which takes the place of `folder` when the block ends."""
    folder = folder.absolute()
    free = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    require(free, "-o", folder, "a folder that is empty, or not there yet")
    temporary = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        yield temporary
        place(temporary, folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise InputError(f"-o={folder}: cannot be written ({reason})") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


@torch.no_grad()
def _merged(record: Record, folder: Path, *, dtype: str, base: Path | None) -> tuple[dict, str]:
    backbone = _in_float32(record, base)
    net, tokenizer = backbone.net, backbone.tokenizer()
    ids = tokenizer(PROBE, add_special_tokens=False).input_ids[:PROBE_TOKENS]
    probe = torch.tensor([ids], device=net.device)
    adapted = _logits(net, probe)
    try:
        attached(net).merge(net)
    except NotMergeable as error:
        merge = card(method_name(record.config["method"])).merge
        reason = merge.removeprefix("no: ") if merge.startswith("no: ") else str(error)
        raise InputError(f"--to=merged: {reason}") from error
    save_merged(net, folder, dtype=DTYPES[dtype])
    tokenizer.save_pretrained(folder)
    del net, backbone  # room for the copy that is read back
    loaded = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True
    )
    found, lost = cast(tuple[PreTrainedModel, dict[str, Any]], loaded)
    unfit = [name for names in lost.values() for name in names]
    require(not unfit, "--to", "merged", f"transformers does not take {unfit[:1]} back")
    difference = (_logits(nn.Module.to(found, probe.device), probe) - adapted).abs().max().item()
    recorded = record.result["merge"]
    largest = adapted.abs().max().item()
    tolerance = recorded["tolerance"] if recorded else RELATIVE * max(1.0, largest)
    within = difference <= tolerance
    why = f"logits differ by {difference:.2g}, more than {tolerance:.2g}"
    require(within or dtype != "fp32", "--to", "merged", why)
    told = f"logits on {len(ids)} tokens differ by {difference:.2g} from those of the adapted model"
    about = {"max_abs_logit_diff": difference, "tolerance": tolerance, "dtype": dtype}
    return about, f"{told} (tolerance in fp32: {tolerance:.2g})"


def _adapter(record: Record, folder: Path, *, dtype: str, base: Path | None) -> tuple[dict, str]:
    tensors, about = read_tensors(record.folder / ADAPTER)
    found = about.get("run_id")
    require(found == record.run_id, "RUN", record.folder, f"its adapter is that of run {found}")
    save_tensors(folder / ADAPTER, tensors, about)
    sha256 = record.result["model"]["sha256"]
    return {}, f"{len(tensors)} tensors, for the base with sha256 {sha256[:12]}"


@torch.no_grad()
def _peft(record: Record, folder: Path, *, dtype: str, base: Path | None) -> tuple[dict, str]:
    quantize = record.config["model"]["quantize"]
    why = (
        f"trained on a base in {quantize}, of which an adapter of peft says nothing: on the dense "
        "base it is another function; --to=merged holds that base, too"
    )
    require(quantize is None, "--to", "peft", why)
    net = _in_float32(record, base).net
    try:
        form = attached(net).peft_form(net)
    except NoPeftForm as error:
        raise InputError(f"--to=peft: {error}") from error
    write_peft(form, net.config, folder, model=record.config["model"])
    return {}, f"{form.config['peft_type']}, {len(form.tensors)} tensors"


FORMS: dict[str, Callable[..., tuple[dict, str]]] = {
    "merged": _merged,
    "adapter": _adapter,
    "peft": _peft,
}


def save_merged(net: PreTrainedModel, folder: Path, *, dtype: torch.dtype) -> None:
    """Write a backbone, no longer adapted, in the layout that its class in transformers has.

    Raises: InputError if that class has no place for one of its tensors.
    """
    _make_room(net)
    _linear_to_conv1d(net)
    nn.Module.to(net, dtype)
    net.save_pretrained(folder)


def write_peft(
    form: PeftForm, config: PretrainedConfig, folder: Path, *, model: Mapping[str, Any]
) -> None:
    """Write the two files that peft reads; config: the backbone's, model: the config group.

    Raises: InputError if the form's type does not know GPT-2's Conv1D, and the backbone has it.
    """
    transposed = [name for name in conv1d_names(config) if _adapts(form, name)]
    known = not transposed or "fan_in_fan_out" in form.config
    why = f"its {form.config['peft_type']} does not know layers of the class Conv1D"
    require(known, "--to", "peft", why)
    on_hub = model["source"] == "hub" and not Path(model["path"]).is_dir()
    settings = {
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        **form.config,
        "base_model_name_or_path": model["path"] if on_hub else None,
        "revision": model["revision"] if on_hub else None,
    }
    if transposed:
        settings["fan_in_fan_out"] = True
    write_atomic(folder / "adapter_config.json", json.dumps(settings, indent=1) + "\n")
    tensors = {name: _own(tensor) for name, tensor in form.tensors.items()}
    save_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})


def conv1d_names(config: PretrainedConfig) -> list[str]:
    """Return the layers that transformers builds as Conv1D, and our backbone has as Linear."""
    return [name for name, m in _skeleton(config).named_modules() if isinstance(m, Conv1D)]


def _adapts(form: PeftForm, name: str) -> bool:
    return any(tensor.startswith(at(name, "")) for tensor in form.tensors)


def _own(tensor: Tensor) -> Tensor:
    """Return a copy in memory of its own: safetensors refuses a tensor under two names."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _in_float32(record: Record, base: Path | None) -> Backbone:
    """Restore the run, every weight dense and in float32: rounding does not hide a difference."""
    backbone = restore(record, base=base)
    dequantize_(backbone.net)
    backbone.net.float()
    return backbone


def _logits(net: nn.Module, ids: Tensor) -> Tensor:
    return net.eval()(input_ids=ids, use_cache=False).logits.float()


def _skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """Build what transformers would, without memory."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _linear_to_conv1d(net: PreTrainedModel) -> None:
    """Undo `peftlab.backbone.conv1d_to_linear`."""
    for name in conv1d_names(net.config):
        linear = net.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        with torch.device("meta"):
            layer = Conv1D(linear.out_features, linear.in_features)
        layer.weight = nn.Parameter(linear.weight.detach().T.contiguous())
        layer.bias = nn.Parameter(linear.bias.detach())
        net.set_submodule(name, layer)


def _make_room(net: PreTrainedModel) -> None:
    """Let the config tell of biases that the method gave to layers which have none by their class.

    A switch there is for many layers: those without a bias then get one of zeros.
    Raises: InputError if no switches make room for all of them.
    """
    own, strange = set(net.state_dict()), set[str]()
    switches = [name for name in BIASES if getattr(net.config, name, None) is False]
    for values in itertools.product((False, True), repeat=len(switches)):
        for name, value in zip(switches, values, strict=True):
            setattr(net.config, name, value)
        wanted = set(_skeleton(net.config).state_dict())
        strange = own - wanted
        if not strange:
            for name in wanted - own:
                layer = net.get_submodule(name.removesuffix(".bias"))
                assert isinstance(layer, nn.Linear)
                layer.bias = nn.Parameter(layer.weight.new_zeros(layer.out_features))
            return
    require(False, "--to", "merged", f"{type(net).__name__} has no place for {min(strange)}")
