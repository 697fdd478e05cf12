"""What greedy drafting at the first exit must give, worked out on the eager model without a cache or a segment."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

EXIT = 3


@dataclass(frozen=True)
class Expected:
    """What greedy drafting gives."""

    tokens: list[int]
    rounds: int
    drafted: int
    accepted: int


class Eager:
    """The eager model's choices, worked out without a cache; asked for twice, computed once.

    Args:
        checkpoint: folder of the model.
        bundle: whose draft vocabulary the exit drafts from.
    """

    def __init__(self, checkpoint: Path, bundle: Path) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self._vocabulary = np.fromfile(bundle / "draft-vocabulary.i32", dtype="<i4").astype(np.int64)
        self._chosen: dict[tuple[int, ...], tuple[int, int]] = {}

    def best(self, tokens: list[int]) -> tuple[int, int]:
        """The last layer's next token and the exit's."""
        key = tuple(tokens)
        if key not in self._chosen:
            with torch.no_grad():
                out = self._model(torch.tensor([tokens]), output_hidden_states=True, logits_to_keep=1)
                logits = self._model.lm_head(self._model.model.norm(out.hidden_states[EXIT][0, -1]))
            draft = self._vocabulary[int(logits[torch.from_numpy(self._vocabulary)].argmax())]
            self._chosen[key] = int(out.logits[0, -1].argmax()), int(draft)
        return self._chosen[key]

    def greedy(self, prompt: list[int], max_new_tokens: int, draft_length: int) -> Expected:
        """Rounds of `draft_length` drafts, of which a prefix is accepted, and a token of the last layer's."""
        end = self._model.config.eos_token_id
        tokens = [self.best(prompt)[0]]
        rounds = drafted = accepted = 0
        while len(tokens) < max_new_tokens and tokens[-1] != end:
            drafts: list[int] = []
            for _ in range(min(draft_length, max_new_tokens - len(tokens) - 1)):
                drafts.append(self.best(prompt + tokens + drafts)[1])
            rounds, drafted = rounds + 1, drafted + len(drafts)
            for draft in [*drafts, None]:
                tokens.append(self.best(prompt + tokens)[0])
                accepted += tokens[-1] == draft
                if tokens[-1] != draft or tokens[-1] == end:
                    break
        return Expected(tokens, rounds, drafted, accepted)
