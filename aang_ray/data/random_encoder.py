"""Encoders without pretraining: `random:LAYERSxHIDDEN`, a BERT with random weights and a tokenizer of its own.

The tokenizer (WordPiece, as in BERT) has the words, endings and characters of the texts that the run may know: train
and the given unlabelled text, without dev and test. Tokenizer and configuration lie in a folder of the cache; the
weights are drawn when a run is built, so that they depend on its seed.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from aang_ray.config import DataConfig, EncoderConfig
from aang_ray.data.cache import cache_folder, content_key, made_once
from aang_ray.data.load import data_fingerprint, known_texts
from aang_ray.data.pretrained import RANDOM, Located, locate
from aang_ray.errors import UserError

RECIPE = 1
"""Version of how tokenizers are made. Raise it when a change makes others."""
VOCABULARY, CHARACTERS = 8000, 1000
"""Largest number of tokens, and of different characters among them."""
LONGEST_ENDING = 4
"""Longest ending of a word, in characters, that is a token of its own."""
MAX_TOKENS = 256
"""Longest text in tokens."""
HEAD_WIDTH = 64
"""Components of an attention head; narrower encoders have one head for each 16."""
_SPECIAL = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
_SHAPE = re.compile(r"(\d+)x(\d+)")
_TEXT_FIELDS = ("text", "text_b", "label", "train_size", "split_seed", "dev_fraction", "test_fraction")


def locate_encoder(data: DataConfig, encoder: EncoderConfig) -> Located:
    """Find the encoder of a run; make the tokenizer of one with random weights.

    Args:
        data: The end task, on whose texts such a tokenizer is trained.
        encoder: Names the encoder.

    Raises:
        UserError: As `locate`, and for a shape that is not possible.
    """
    if not encoder.name.startswith(RANDOM):
        return locate(encoder)
    if encoder.revision is not None:
        raise UserError(f"encoder.revision: only encoders on the Hub have revisions, {encoder.name} has none")
    layers, hidden = shape_of(encoder.name)
    choices = {name: getattr(data, name) for name in _TEXT_FIELDS}
    key = {"recipe": RECIPE, "shape": [layers, hidden], "data": data_fingerprint(data), "choices": choices}
    make = partial(_make, data=data, layers=layers, hidden=hidden)
    folder = made_once(cache_folder() / "random-encoders" / content_key(key), make)
    return Located(str(folder), None, local=True, random=True)


def shape_of(name: str) -> tuple[int, int]:
    """Return layers and hidden size of `random:LAYERSxHIDDEN`.

    Raises:
        UserError: For another form, or a hidden size that heads of equal width do not fill.
    """
    found = _SHAPE.fullmatch(name.removeprefix(RANDOM))
    layers, hidden = (int(found[1]), int(found[2])) if found else (0, 0)
    if layers < 1 or hidden < 16 or hidden % _head_width(hidden):
        raise UserError(
            f"encoder.name: {name} is not {RANDOM}LAYERSxHIDDEN, such as {RANDOM}4x256; HIDDEN is a multiple of 16 "
            f"below {2 * HEAD_WIDTH}, and of {HEAD_WIDTH} from there on"
        )
    return layers, hidden


def _head_width(hidden: int) -> int:
    return HEAD_WIDTH if hidden >= 2 * HEAD_WIDTH else 16


def frequent_pieces(words: Mapping[str, int]) -> list[str]:
    """Return a WordPiece vocabulary: special tokens, characters, then words and their endings by frequency.

    The trainers of the library tokenizers merge pairs of characters, and break ties by the order of a hash table: two
    processes get two vocabularies, which a run's name must not depend on.

    Args:
        words: How often each word occurs. Words and endings that occur once have no token of their own.
    """
    counts, endings = Counter[str](), Counter[str]()
    for word, count in words.items():
        for letter in word:
            counts[letter] += count
        for length in range(2, min(LONGEST_ENDING, len(word) - 1) + 1):
            endings[f"##{word[-length:]}"] += count
    letters = _most_frequent(counts, CHARACTERS)
    always = dict.fromkeys([*_SPECIAL.values(), *letters, *(f"##{letter}" for letter in letters)])
    pieces = {piece: count for piece, count in {**words, **endings}.items() if count > 1 and piece not in always}
    return [*always, *_most_frequent(pieces, max(0, VOCABULARY - len(always)))]


def _most_frequent(counts: Mapping[str, int], number: int) -> list[str]:
    """Return the most frequent keys; equally frequent ones in alphabetical order."""
    return sorted(counts, key=lambda key: (-counts[key], key))[:number]


def _make(folder: Path, data: DataConfig, layers: int, hidden: int) -> None:
    """Write tokenizer and configuration."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors  # late: not always used
    from transformers import PreTrainedTokenizerFast

    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    texts = (normalizer.normalize_str(text) for text in known_texts(data))
    words = Counter(word for text in texts for word, _ in splitter.pre_tokenize_str(text))
    vocabulary = {token: index for index, token in enumerate(frequent_pieces(words))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=_SPECIAL["unk"]))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    tokenizer.add_special_tokens(list(_SPECIAL.values()))
    sep, cls = ((_SPECIAL[name], vocabulary[_SPECIAL[name]]) for name in ("sep", "cls"))
    tokenizer.post_processor = processors.BertProcessing(sep, cls)
    named = {f"{name}_token": token for name, token in _SPECIAL.items()}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=MAX_TOKENS, **named).save_pretrained(folder)
    # By hand: what transformers writes contains its version, and the content of this file enters the run's name.
    config = {
        "model_type": "bert",
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // _head_width(hidden),
        "intermediate_size": 4 * hidden,
        "max_position_embeddings": MAX_TOKENS,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
