"""End tasks and unlabelled text: found, checked, split, tokenised once, memory-mapped.

Importing this package loads no heavy library: torch, transformers, datasets and pandas are imported when first used.
"""

from aang_ray.data.describe import describe
from aang_ray.data.digits import ImageTask
from aang_ray.data.load import data_fingerprint, load_end_task
from aang_ray.data.modalities import load_task, print_task, task_fingerprint
from aang_ray.data.pretrained import encoder_fingerprint, locate, tokenizer_fingerprint
from aang_ray.data.tasks import EndTask, card_of
from aang_ray.data.tokens import load_tokenizer, tokenizer_facts

__all__ = [
    "EndTask",
    "ImageTask",
    "card_of",
    "data_fingerprint",
    "describe",
    "encoder_fingerprint",
    "load_end_task",
    "load_task",
    "load_tokenizer",
    "locate",
    "print_task",
    "task_fingerprint",
    "tokenizer_facts",
    "tokenizer_fingerprint",
]
