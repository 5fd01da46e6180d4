"""End tasks and unlabelled text: found, checked, split, tokenised once, memory-mapped.

Importing this package loads no heavy library: torch, transformers, datasets and pandas are imported when first used.
"""

from aang_ray.data.describe import describe
from aang_ray.data.digits import ImageTask, LabelledImages
from aang_ray.data.load import data_fingerprint, load_end_task
from aang_ray.data.modalities import is_image_task, load_task, print_task, task_fingerprint
from aang_ray.data.pretrained import Located, encoder_fingerprint, locate, tokenizer_fingerprint
from aang_ray.data.tasks import CARDS, Card, Corpus, EndTask, Labelled, Metric, Ragged, card_named, card_of, metric_of
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
    "metric_of",
    "print_task",
    "task_fingerprint",
    "tokenizer_facts",
    "tokenizer_fingerprint",
]
