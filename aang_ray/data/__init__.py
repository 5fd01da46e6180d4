"""End tasks and unlabelled text: found, checked, split, tokenised once, memory-mapped."""

from aang_ray.data.any_task import is_image_task, load_task, task_fingerprint
from aang_ray.data.describe import describe, render, render_images
from aang_ray.data.digits import ImageTask, LabelledImages
from aang_ray.data.load import data_fingerprint, load_end_task
from aang_ray.data.pretrained import Located, encoder_fingerprint, locate, tokenizer_fingerprint
from aang_ray.data.tasks import CARDS, Card, Corpus, EndTask, Labelled, Metric, Ragged, card_named, card_of
from aang_ray.data.tokens import TokenizerFacts, load_tokenizer, tokenizer_facts

__all__ = [
    "CARDS",
    "Card",
    "Corpus",
    "EndTask",
    "ImageTask",
    "Labelled",
    "LabelledImages",
    "Located",
    "Metric",
    "Ragged",
    "TokenizerFacts",
    "card_named",
    "card_of",
    "data_fingerprint",
    "describe",
    "encoder_fingerprint",
    "is_image_task",
    "load_end_task",
    "load_task",
    "load_tokenizer",
    "locate",
    "render",
    "render_images",
    "task_fingerprint",
    "tokenizer_facts",
    "tokenizer_fingerprint",
]
