"""BERT with random weights in the layout of the released one, to rehearse recipes with."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

VOCABULARY = 30522
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def write_random_bert(folder: Path, words: Iterable[str], layers: int = 12) -> None:
    """Write bert-base-uncased with `words` and single letters in a vocabulary padded to its published size."""
    import torch
    from transformers import BertConfig, BertForPreTraining

    torch.manual_seed(0)
    BertForPreTraining(BertConfig(vocab_size=VOCABULARY, num_hidden_layers=layers)).save_pretrained(folder)
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,'-"
    known = dict.fromkeys((*_SPECIAL, *letters, *(f"##{letter}" for letter in letters), *sorted(set(words))))
    pieces = [*known, *(f"[unused{number}]" for number in range(VOCABULARY - len(known)))]
    (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece in pieces), encoding="utf-8")
