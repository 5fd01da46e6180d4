"""Neural-LM text: passages that a causal language model writes once; they are kept in the cache.

This is a data primitive of Figure 1 of the AANG paper (Dery et al. 2023). `data.neural_lm` names a Hugging Face causal
language model (a Hub name or a folder), or `trained`: a small one that is trained on the task's own train texts and
in-domain text. The model's perplexity on held-out passages of that text is recorded with the passages, so that a model
that has not learned the domain is noticed. This module imports torch: others import it only when they use it.
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
from torch.nn.utils.rnn import pad_sequence

from aang_ray.config import DataConfig
from aang_ray.data.cache import cache_folder, content_key, made_once
from aang_ray.data.pretrained import Located, encoder_fingerprint, from_pretrained, locate_model
from aang_ray.errors import UserError

TRAINED = "trained"
RECIPE, TRAINED_RECIPE = 1, 2
"""Versions of how a given model and the trained one make passages. Raise them when a change makes other passages."""
SEED = 0
HELD_OUT, MOST_HELD_OUT, FEWEST = 0.05, 500, 20
"""Share of the domain's passages that is held out, its limit, and the least number of passages to learn from."""
LENGTH = 128
"""Longest generated passage, and longest passage that is learned from, in tokens of the causal model."""
VOCABULARY, WIDTH, LAYERS, HEADS = 4000, 128, 3, 4
"""The trained model: a byte-level BPE vocabulary and a GPT-2 of 1.1 million parameters."""
BATCH, RATE, MOST_STEPS, MOST_EPOCHS = 32, 3e-3, 1000, 20
"""Its training: AdamW with linear decay; the epoch with the lowest held-out perplexity is kept."""
TOP_P, PROMPT_TOKENS, AT_ONCE = 0.95, 4, 64
"""Nucleus sampling, length of a prompt, and how many passages are generated at once."""
OnStep = Callable[[int, int], None]
_TEXT, _REPORT = "passages.parquet", "report.json"
_START, _END = "<s>", "</s>"


@dataclass(frozen=True)
class NeuralText:
    """What a causal language model wrote."""

    passages: list[str]
    model: str
    perplexity: float
    """Of a token of held-out domain passages."""
    held_out: int
    """Number of passages that the perplexity was measured on. Those that chose the epoch are not among them."""

    def report(self) -> dict[str, object]:
        """Return everything except the passages, as JSON values."""
        return {name: value for name, value in vars(self).items() if name != "passages"}


@dataclass(frozen=True)
class CausalModel:
    """A causal language model with its tokenizer."""

    model: Any
    tokenizer: Any
    start: int | None
    """Token that opened every passage in training. If it is None, generation is prompted with real passages."""
    end: int | None

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.model.parameters()).device
        return device

    def ids(self, passage: str, length: int) -> list[int]:
        """Return at most `length` tokens of a passage, with the start and end tokens that training used."""
        tokens: list[int] = self.tokenizer(passage, add_special_tokens=False)["input_ids"]
        opened = tokens if self.start is None else [self.start, *tokens]
        return (opened if self.end is None else [*opened, self.end])[:length]


def neural_fingerprint(data: DataConfig) -> list[object]:
    """Return what decides the generated text besides the domain text.

    Raises:
        UserError: if the model does not exist.
    """
    if data.neural_lm == TRAINED:
        return [TRAINED, data.neural_lm_passages, TRAINED_RECIPE]
    return [encoder_fingerprint(_locate(data)), data.neural_lm_passages, RECIPE]


def neural_text(data: DataConfig, domain: Sequence[str]) -> NeuralText:
    """Return generated passages, from the cache or generated now.

    Passages of the task's domain serve to learn from or to prompt with, and to measure the perplexity on.

    Raises:
        UserError: if the model cannot be loaded, or there is too little domain text.
    """
    if len(domain) < FEWEST:
        raise UserError(f"data.neural_lm: {len(domain)} passages of domain text are too few, {FEWEST} are needed")
    target = cache_folder() / "neural_lm" / content_key({"made": neural_fingerprint(data), "domain": list(domain)})
    folder = made_once(target, lambda draft: _make(draft, data, domain))
    report = json.loads((folder / _REPORT).read_text(encoding="utf-8"))
    return NeuralText(parquet.read_table(folder / _TEXT).column("text").to_pylist(), **report)


def _make(folder: Path, data: DataConfig, domain: Sequence[str]) -> None:
    from rich.console import Console
    from rich.progress import Progress

    order = np.random.default_rng(SEED).permutation(len(domain))
    size = max(2 if data.neural_lm == TRAINED else 1, min(int(HELD_OUT * len(domain)), MOST_HELD_OUT))
    measured, rest = [domain[i] for i in order[:size]], [domain[i] for i in order[size:]]
    console = Console(stderr=True)
    with Progress(*Progress.get_default_columns(), console=console, transient=True) as progress:
        if data.neural_lm == TRAINED:
            training = progress.add_task("training a causal language model (once)")
            # The passages that choose the epoch are likelier under the chosen model than other text is.
            choosing, measured = measured[: size // 2], measured[size // 2 :]
            causal = train_small(
                rest, choosing, SEED, lambda done, total: progress.update(training, completed=done, total=total)
            )
        else:
            causal = load_causal(_locate(data))
        passages = generate(causal, data.neural_lm_passages, rest, LENGTH, SEED)
        shown = progress.track(passages, data.neural_lm_passages, description="writing neural-LM text (once)")
        found = [passage for passage in map(str.strip, shown) if passage]
        report = NeuralText([], str(data.neural_lm), perplexity(causal, measured), len(measured)).report()
    parquet.write_table(pa.table({"text": pa.array(found, pa.string())}), folder / _TEXT)
    (folder / _REPORT).write_text(json.dumps(report), encoding="utf-8")


def _locate(data: DataConfig) -> Located:
    return locate_model(str(data.neural_lm), "data.neural_lm", "model")


def load_causal(located: Located) -> CausalModel:
    """Load a pretrained causal language model.

    Raises:
        UserError: if it cannot be loaded, is a model of another kind, or takes too few positions.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = (located, "data.neural_lm", "causal language model")
    tokenizer = from_pretrained(AutoTokenizer, *place)
    model, info = from_pretrained(AutoModelForCausalLM, *place, use_safetensors=True, output_loading_info=True)
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
    """Return whether a token changes the prediction before it: Transformers loads encoders, too."""
    one_NLV, other_NLV = (model(input_ids=torch.tensor([[0, token]])).logits for token in (0, 1))
    return not torch.allclose(one_NLV[:, 0], other_NLV[:, 0], rtol=1e-3, atol=1e-4)


def train_small(passages: Sequence[str], held_out: Sequence[str], seed: int, on_step: OnStep) -> CausalModel:
    """Train a small GPT-2 and its byte-level BPE tokenizer from scratch; held-out text chooses the epoch.

    `on_step` is called after each step with the steps done and the most there will be.
    """
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        passages, vocab_size=VOCABULARY, min_frequency=2, special_tokens=[_START, _END], show_progress=False
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token=_START, eos_token=_END)
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=LENGTH,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        bos_token_id=start,
        eos_token_id=end,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        causal = CausalModel(GPT2LMHeadModel(config).to(_device()), tokenizer, start, end)
        _train(causal, passages, held_out, seed, on_step)
    return causal


def _train(causal: CausalModel, passages: Sequence[str], held_out: Sequence[str], seed: int, on_step: OnStep) -> None:
    """Train until held-out text grows less likely, then restore the best epoch's parameters."""
    sequences = [causal.ids(passage, LENGTH) for passage in passages]
    epoch_steps = -(-len(sequences) // BATCH)
    epochs = max(1, min(MOST_EPOCHS, MOST_STEPS // epoch_steps))
    optimizer = torch.optim.AdamW(causal.model.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / (epochs * epoch_steps)))
    order = np.random.default_rng(seed)
    best, best_parameters = math.inf, copy.deepcopy(causal.model.state_dict())
    for _ in range(epochs):
        causal.model.train()
        shuffled = [sequences[i] for i in order.permutation(len(sequences))]
        for ids_NL, labels_NL in _batches(causal, shuffled, BATCH):
            torch.autograd.backward(_token_losses(causal, ids_NL, labels_NL).mean())
            torch.nn.utils.clip_grad_norm_(causal.model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            on_step(schedule.last_epoch, epochs * epoch_steps)
        now = perplexity(causal, held_out)
        if now >= best:
            break
        best, best_parameters = now, copy.deepcopy(causal.model.state_dict())
    causal.model.load_state_dict(best_parameters)


def perplexity(causal: CausalModel, passages: Sequence[str]) -> float:
    """Return exp of a token's mean negative log-likelihood in its passage; infinite if no passage has two tokens."""
    total, count = 0.0, 0
    causal.model.eval()
    with torch.no_grad():
        for ids_NL, labels_NL in _batches(causal, [causal.ids(p, LENGTH) for p in passages], AT_ONCE):
            loss_N = _token_losses(causal, ids_NL, labels_NL)
            total, count = total + float(loss_N.sum()), count + len(loss_N)
    return math.exp(total / count) if count else math.inf


def _token_losses(causal: CausalModel, ids_NL: Tensor, labels_NL: Tensor) -> Tensor:
    """Return the negative log-likelihood of every token that is no padding and not the first of its passage, [T]."""
    logits_NLV = causal.model(input_ids=ids_NL, attention_mask=(labels_NL >= 0).long()).logits
    losses = F.cross_entropy(
        logits_NLV[:, :-1].flatten(0, 1).float(), labels_NL[:, 1:].flatten(), ignore_index=-1, reduction="none"
    )
    return losses[labels_NL[:, 1:].flatten() >= 0]


def _batches(causal: CausalModel, sequences: Sequence[list[int]], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield padded ids and labels (-1 at padding), [N, L] each, of the sequences that have two tokens or more."""
    long_enough = [ids for ids in sequences if len(ids) > 1]
    for start in range(0, len(long_enough), size):
        rows = [torch.tensor(ids) for ids in long_enough[start : start + size]]
        labels_NL = pad_sequence(rows, batch_first=True, padding_value=-1).to(causal.device)
        yield labels_NL.clamp_min(0), labels_NL


def generate(causal: CausalModel, count: int, domain: Sequence[str], length: int, seed: int) -> Iterator[str]:
    """Generate passages of at most `length` new tokens by nucleus sampling with p = 0.95 (Holtzman et al. 2020).

    The first tokens of domain passages are the prompts of a model without a start token.
    """
    order = np.random.default_rng(seed)
    causal.model.eval()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for start in range(0, count, AT_ONCE):
            prompts_NL = _prompts(causal, domain, min(AT_ONCE, count - start), order)
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


def _prompts(causal: CausalModel, domain: Sequence[str], size: int, order: np.random.Generator) -> Tensor:
    """Return the beginnings of `size` passages, [N, L]: the start token, or the first tokens of domain passages."""
    if causal.start is not None:
        return torch.full((size, 1), causal.start, device=causal.device)
    chosen = order.integers(len(domain), size=size)
    rows = [[token for token in causal.ids(domain[i], PROMPT_TOKENS) if token != causal.end] for i in chosen]
    width = max(1, min(map(len, rows)))
    return torch.tensor([(row or [causal.end or 0])[:width] for row in rows], device=causal.device)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
