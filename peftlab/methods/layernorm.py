"""LayerNorm tuning."""

from torch import nn

from peftlab.peft_form import PeftForm, at
from peftlab.selected import SelectMethod


class LayerNorm(SelectMethod):
    """LayerNorm tuning: Zhao et al. 2023, arXiv:2312.11420.

        y' = g' ⊙ x̂ + β'          gain g' [d], shift β' [d] where there is one; x̂ [d] normalised

    Trained are all normalisation layers, n_norms numbers: (2 L + 1) d in Llama, two per block and
    the final one; twice as many in GPT-2, whose norms have shifts; four per block in Gemma 2, 3.

    Init: the backbone's own gains and shifts, so W' = W at step 0.
    Trainable:
        per model: n_norms
    Differs from the paper: it tunes the norms of a multimodal model, together with other parts
    of it; here they are trained alone, the final norm and norms of q and k among them.
    Merge: in place.
    Family: selective.
    """

    def hook(self, backbone: nn.Module) -> None:
        """Unfreeze the normalisation layers."""
        self.norms = norms(backbone)
        super().hook(backbone)

    def selects(self, name: str, p: nn.Parameter) -> bool:
        """Whether it belongs to a normalisation layer."""
        return name.rpartition(".")[0] in self.norms

    def peft_form(self, backbone: nn.Module) -> PeftForm:
        """LN_TUNING."""
        tensors = {
            at(name, f"ln_tuning_layers.{key}"): tensor
            for name in self.norms
            for key, tensor in backbone.get_submodule(name).state_dict().items()
        }
        return PeftForm({"peft_type": "LN_TUNING", "target_modules": self.norms}, tensors)


def norms(backbone: nn.Module) -> list[str]:
    """Names of the normalisation layers, by their class: LayerNorm, LlamaRMSNorm and the like."""
    kinds = ("LayerNorm", "RMSNorm")
    return [n for n, module in backbone.named_modules() if type(module).__name__.endswith(kinds)]
