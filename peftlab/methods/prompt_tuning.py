"""Prompt tuning."""

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from peftlab.errors import require
from peftlab.method import check_count, rms
from peftlab.peft_form import PeftForm, prompt_form
from peftlab.prompts import PromptMethod, drawn_tokens, repeated
from peftlab.sites import Site

INITS = ("vocabulary", "text", "random")


class PromptTuning(PromptMethod):
    """Prompt tuning: Lester, Al-Rfou and Constant 2021, arXiv:2104.08691, section 2.

        E' = [P; E]          E [tokens, d] embeddings of the tokens, P [length, d] per model

    The prompt is `length` embeddings of no word, before the first token, even before a BOS. It
    takes its share of the context: the tokens come `length` positions later.

    Init: P are embeddings as the model itself scales them. init = vocabulary: of different tokens
    drawn from the first `common`; text: of the tokens of `text`, repeated or cut to `length`;
    random: none, but N(0, ν²), ν the RMS of the first `common`. It is not the identity at step 0:
    the tokens attend to the prompt.
    Trainable:
        per model: length * n_hidden
    n_hidden is d, the width of an embedding.
    Differs from the paper: its random start is U(-0.5, 0.5), on the scale of T5's embeddings. Its
    commonest tokens are taken to be those with the lowest ids.
    Merge: no: it is input, and changes no weight.
    Family: additive.
    """

    def __init__(
        self, sites: Sequence[Site], *, length: int, init: str, common: int, text: str | None
    ) -> None:
        super().__init__(sites, length=length)
        check_count(length=length, common=common)
        require(init in INITS, "method.init", init, f"one of {', '.join(INITS)}")
        if init == "text":
            given = isinstance(text, str) and text != ""
            require(given, "method.text", text, "for init=text, a text")
        else:
            require(text is None, "method.text", text, f"null, for init={init}")
        self.init, self.common, self.text = init, common, text
        self.ids: Sequence[int] = ()  # of `text`
        self.seed = torch.initial_seed()  # that of the run; P is drawn by `hook`
        self.started = False
        weight = sites[0].module.weight
        self.P = nn.Parameter(torch.zeros(length, sites[0].d_out, device=weight.device))

    def read(self, encode: Callable[[str], Sequence[int]]) -> None:
        """Take the tokens of `text`."""
        if self.text is not None:
            self.ids = encode(self.text)
            require(len(self.ids) > 0, "method.text", repr(self.text), "a text that has tokens")

    def hook(self, backbone: nn.Module) -> None:
        """Give P its start, the first time: only here are embeddings at hand.

        Raises: InputError if the sites are not as wide as an embedding.
        """
        table = cast(nn.Embedding, cast(PreTrainedModel, backbone).get_input_embeddings())
        kinds = ", ".join(dict.fromkeys(site.kind for site in self.sites))
        allowed = f"a kind of layer whose output is as wide as an embedding, {table.embedding_dim}"
        require(self.P.shape[1] == table.embedding_dim, "method.sites", kinds, allowed)
        super().hook(backbone)
        if not self.started:
            with torch.no_grad():
                self.P.copy_(self._start(backbone, min(self.common, table.num_embeddings)))
            self.started = True

    def _start(self, backbone: nn.Module, common: int) -> Tensor:
        if self.init == "text":
            ids = torch.tensor(self.ids, dtype=torch.int64, device=self.P.device)
            return self.embed(repeated(ids, self.length))
        if self.init == "vocabulary":
            return self.embed(drawn_tokens(backbone, self.length, common, self.seed))
        nu = rms(self.embed(torch.arange(common, device=self.P.device)))
        generator = torch.Generator().manual_seed(self.seed)
        return nu * torch.randn(self.P.shape, generator=generator).to(nu.device)

    def extend(self, e: Tensor) -> Tensor:
        """E' = [P; E]."""
        return torch.cat([self.P.to(e.dtype).expand(len(e), -1, -1), e], dim=1)

    def peft_form(self, backbone: nn.Module) -> PeftForm:
        """PROMPT_TUNING."""
        return prompt_form(self.P, cast(PreTrainedModel, backbone).config.get_text_config())
