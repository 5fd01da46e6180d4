"""Neural-LM text: passages that a causal language model writes, once, kept in the cache.

A data primitive of the AANG paper's Figure 1. `data.neural_lm` names any Hugging Face causal language model (a Hub
name or a folder), or `trained`: a small one that is trained on the task's own unlabelled and train texts. How likely
held-out passages of that text are to it is recorded beside the passages: a model that has not learned the domain shows.
Of the trained model, half of the held-out passages choose the epoch, and the other half is what is recorded: of fewer
than 60 passages one each, and `held_out` in the report says so.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from pyarrow import parquet
from torch import Tensor
from torch.nn import functional as F

from aang_ray.config import DataConfig
from aang_ray.data.cache import cache_folder, content_key, made_once
from aang_ray.data.pretrained import Located, encoder_fingerprint, first_line, locate_model
from aang_ray.errors import UserError

TRAINED = "trained"
RECIPE, TRAINED_RECIPE = 1, 2
"""Versions of how passages are made, by a model as it is and by the trained one: a change makes new ones."""
SEED = 0
HELD_OUT, MOST_HELD_OUT, FEWEST = 0.05, 500, 20
"""Share of the domain's passages that is held out, its limit, and the least text to learn from."""
LENGTH = 128
"""Longest generated passage, in tokens of the causal model."""
_TEXT, _REPORT = "passages.parquet", "report.json"


@dataclass(frozen=True)
class NeuralText:
    """What a causal language model wrote."""

    passages: list[str]
    model: str
    perplexity: float
    """Of a token of held-out domain passages."""
    held_out: int
    """How many passages that was measured on; those that chose the trained model's epoch are not among them."""

    def report(self) -> dict[str, object]:
        """All but the passages, as JSON values."""
        return {name: value for name, value in vars(self).items() if name != "passages"}


def neural_fingerprint(data: DataConfig) -> list[object]:
    """What decides the generated text besides the domain's: the model, how many passages, and the recipe.

    Raises:
        UserError: for a model that is not there.
    """
    recipe = TRAINED_RECIPE if data.neural_lm == TRAINED else RECIPE
    return [_model_fingerprint(data), data.neural_lm_passages, recipe]


def neural_text(data: DataConfig, domain: Sequence[str]) -> NeuralText:
    """The passages for this domain text, from the cache or generated now.

    Raises:
        UserError: for a model that cannot be loaded, or too little text to learn from.
    """
    if len(domain) < FEWEST:
        raise UserError(f"data.neural_lm: {len(domain)} passages of domain text are too few, {FEWEST} are needed")
    text = cache_folder() / "neural_lm" / content_key({"made": neural_fingerprint(data), "domain": list(domain)})
    folder = made_once(text, lambda draft: _make(draft, data, domain))
    report = json.loads((folder / _REPORT).read_text(encoding="utf-8"))
    return NeuralText(parquet.read_table(folder / _TEXT).column("text").to_pylist(), **report)


def _make(folder: Path, data: DataConfig, domain: Sequence[str]) -> None:
    from rich.console import Console
    from rich.progress import Progress

    held_out, rest = _held_out(domain, least=2 if data.neural_lm == TRAINED else 1)
    measured = held_out
    console = Console(stderr=True)
    with Progress(*Progress.get_default_columns(), console=console, transient=True) as progress:
        if data.neural_lm == TRAINED:
            training = progress.add_task("training a causal language model (once)")
            # What chose the epoch is likelier under it than other text is.
            choosing, measured = held_out[: len(held_out) // 2], held_out[len(held_out) // 2 :]
            causal = train_small(
                rest, choosing, SEED, lambda done, total: progress.update(training, completed=done, total=total)
            )
        else:
            causal = load_causal(locate_model(str(data.neural_lm), "data.neural_lm", "model"))
        passages = generate(causal, data.neural_lm_passages, rest, LENGTH, SEED)
        shown = progress.track(passages, data.neural_lm_passages, description="writing neural-LM text (once)")
        found = [passage.strip() for passage in shown]
        report = NeuralText([], str(data.neural_lm), perplexity(causal, measured), len(measured))
    parquet.write_table(
        pa.table({"text": pa.array([passage for passage in found if passage], pa.string())}), folder / _TEXT
    )
    (folder / _REPORT).write_text(json.dumps(report.report()), encoding="utf-8")


def _held_out(domain: Sequence[str], least: int) -> tuple[list[str], list[str]]:
    """The passages that nothing is learned from, `least` or more of them, and all others."""
    order = np.random.default_rng(SEED).permutation(len(domain))
    size = max(least, min(int(HELD_OUT * len(domain)), MOST_HELD_OUT))
    return [domain[i] for i in order[:size]], [domain[i] for i in order[size:]]


def _model_fingerprint(data: DataConfig) -> str:
    if data.neural_lm == TRAINED:
        return TRAINED
    return encoder_fingerprint(locate_model(str(data.neural_lm), "data.neural_lm", "model"))


# --- data.causal: Causal language models as a source of text: one from the Hub or a folder, or a small one trained here.


VOCABULARY, LENGTH, WIDTH, LAYERS, HEADS = 4000, 128, 128, 3, 4
"""The small model: a byte-level BPE vocabulary and a GPT-2 of 1.1 million parameters."""
BATCH, RATE, MOST_STEPS, MOST_EPOCHS = 32, 3e-3, 1000, 20
"""It is trained by AdamW with a linear decay, and kept as it was when held-out text was likeliest."""
TOP_P, PROMPT_TOKENS, AT_ONCE = 0.95, 4, 64
OnStep = Callable[[int, int], None]
_START, _END = "<s>", "</s>"


@dataclass(frozen=True)
class CausalModel:
    """A causal language model with its tokenizer."""

    model: Any
    tokenizer: Any
    start: int | None
    """Token that every passage of its training began with; None: it is given the first tokens of real passages."""
    end: int | None

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.model.parameters()).device
        return device

    def ids(self, passage: str, length: int) -> list[int]:
        """At most `length` tokens of a passage, with the start and end tokens that training used."""
        tokens: list[int] = self.tokenizer(passage, add_special_tokens=False)["input_ids"]
        opened = tokens if self.start is None else [self.start, *tokens]
        return (opened if self.end is None else [*opened, self.end])[:length]


def load_causal(located: Located) -> CausalModel:
    """A pretrained causal language model.

    Raises:
        UserError: where there is none.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(located.source, revision=located.revision or "main")
        model, info = AutoModelForCausalLM.from_pretrained(
            located.source, revision=located.revision or "main", use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(
            f"data.neural_lm: no causal language model could be loaded from {located.source}: {first_line(error)}"
        ) from error
    if info["missing_keys"] or _sees_ahead(model.eval()):
        raise UserError(f"data.neural_lm: {located.source} holds no causal language model, but one of another kind")
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and positions < LENGTH + PROMPT_TOKENS:
        raise UserError(
            f"data.neural_lm: {located.source} takes {positions} positions, {LENGTH + PROMPT_TOKENS} are needed"
        )
    return CausalModel(model.to(_device()), tokenizer, None, tokenizer.eos_token_id)


@torch.no_grad()
def _sees_ahead(model: Any) -> bool:
    """Whether a token changes the prediction before it: an encoder, which Transformers loads as well."""
    one_NLV, other_NLV = (model(input_ids=torch.tensor([[0, token]])).logits for token in (0, 1))
    return not torch.allclose(one_NLV[:, 0], other_NLV[:, 0], rtol=1e-3, atol=1e-4)


def train_small(passages: Sequence[str], held_out: Sequence[str], seed: int, on_step: OnStep) -> CausalModel:
    """A small GPT-2 on these passages alone, byte-level BPE included; says after each step (done, at most).

    `held_out` chooses the epoch, so that its own perplexity afterwards is that of no unseen text.
    """
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        passages, vocab_size=VOCABULARY, min_frequency=2, special_tokens=[_START, _END], show_progress=False
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token=_START, eos_token=_END)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=LENGTH,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        small = CausalModel(
            GPT2LMHeadModel(config).to(_device()), tokenizer, tokenizer.bos_token_id, tokenizer.eos_token_id
        )
        _train(small, passages, held_out, seed, on_step)
    return small


def perplexity(causal: CausalModel, passages: Sequence[str], length: int = LENGTH) -> float:
    """exp of the mean negative log-likelihood of a token, given those before it in its passage.

    Infinite where no passage has a token that another one precedes.
    """
    total, count = 0.0, 0
    causal.model.eval()
    with torch.no_grad():
        for ids_NL, labels_NL in _batches(causal, [causal.ids(p, length) for p in passages], AT_ONCE):
            loss_N = _token_losses(causal, ids_NL, labels_NL)
            total, count = total + float(loss_N.sum()), count + len(loss_N)
    return math.exp(total / count) if count else math.inf


def generate(causal: CausalModel, count: int, domain: Sequence[str], length: int, seed: int) -> Iterator[str]:
    """Passages by nucleus sampling, p = 0.95; a model that knows no start gets the first tokens of domain passages."""
    order = np.random.default_rng(seed)
    causal.model.eval()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for start in range(0, count, AT_ONCE):
            size = min(AT_ONCE, count - start)
            prompts_NL = _prompts(causal, domain, size, order)
            found_NL = causal.model.generate(
                prompts_NL,
                attention_mask=torch.ones_like(prompts_NL),
                do_sample=True,
                top_p=TOP_P,
                top_k=0,
                max_new_tokens=length,
                pad_token_id=causal.end if causal.end is not None else 0,
            )
            yield from causal.tokenizer.batch_decode(found_NL, skip_special_tokens=True)


def _train(causal: CausalModel, passages: Sequence[str], held_out: Sequence[str], seed: int, on_step: OnStep) -> None:
    """Until the steps are over or held-out text grows less likely; the best epoch's parameters stay."""
    sequences = [causal.ids(passage, LENGTH) for passage in passages]
    an_epoch = -(-len(sequences) // BATCH)
    epochs = max(1, min(MOST_EPOCHS, MOST_STEPS // an_epoch))
    optimizer = torch.optim.AdamW(causal.model.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / (epochs * an_epoch)))
    order = np.random.default_rng(seed)
    best, kept = math.inf, copy.deepcopy(causal.model.state_dict())
    for _ in range(epochs):
        causal.model.train()
        shuffled = [sequences[i] for i in order.permutation(len(sequences))]
        for ids_NL, labels_NL in _batches(causal, shuffled, BATCH):
            torch.autograd.backward(_token_losses(causal, ids_NL, labels_NL).mean())
            torch.nn.utils.clip_grad_norm_(causal.model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            on_step(schedule.last_epoch, epochs * an_epoch)
        now = perplexity(causal, held_out)
        if now >= best:
            break
        best, kept = now, copy.deepcopy(causal.model.state_dict())
    causal.model.load_state_dict(kept)


def _token_losses(causal: CausalModel, ids_NL: Tensor, labels_NL: Tensor) -> Tensor:
    """Negative log-likelihood of every token that is no padding and has one before it, [N]."""
    logits_NLV = causal.model(input_ids=ids_NL, attention_mask=(labels_NL >= 0).long()).logits
    found = F.cross_entropy(
        logits_NLV[:, :-1].flatten(0, 1).float(), labels_NL[:, 1:].flatten(), ignore_index=-1, reduction="none"
    )
    return found[labels_NL[:, 1:].flatten() >= 0]


def _batches(causal: CausalModel, sequences: Sequence[list[int]], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Padded ids and labels (-1 where there is padding) of the sequences that have two tokens or more."""
    long_enough = [ids for ids in sequences if len(ids) > 1]
    for start in range(0, len(long_enough), size):
        rows = long_enough[start : start + size]
        width = max(map(len, rows))
        labels_NL = torch.tensor([row + [-1] * (width - len(row)) for row in rows], device=causal.device)
        yield labels_NL.clamp_min(0), labels_NL


def _prompts(causal: CausalModel, domain: Sequence[str], size: int, order: np.random.Generator) -> Tensor:
    """What each of `size` passages begins with, [N, L]: the start token, or first tokens of domain passages."""
    if causal.start is not None:
        return torch.full((size, 1), causal.start, device=causal.device)
    chosen = order.integers(len(domain), size=size)
    rows = [[token for token in causal.ids(domain[i], PROMPT_TOKENS) if token != causal.end] for i in chosen]
    width = max(1, min(map(len, rows)))
    return torch.tensor([(row or [causal.end or 0])[:width] for row in rows], device=causal.device)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
