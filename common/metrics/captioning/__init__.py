"""Scores of generated captions and answers: BLEU, ROUGE-L, CIDEr and METEOR, with the same values as coco-caption.

`score_captions` takes raw text. The modules `scores` and `meteor` hold pure functions of a tokenized `CaptionSet`.
"""

from common.metrics.captioning.caption_set import CaptionSet
from common.metrics.captioning.meteor import JavaUnavailable
from common.metrics.captioning.scoring import METRICS, CaptionScores, Protocol, score_captions
from common.metrics.captioning.tokenizer import ptb_tokens, tokenize

__all__ = [
    "METRICS",
    "CaptionScores",
    "CaptionSet",
    "JavaUnavailable",
    "Protocol",
    "ptb_tokens",
    "score_captions",
    "tokenize",
]
