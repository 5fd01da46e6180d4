"""Pairs of texts: BERT-like encoders are told which of the two texts a token belongs to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertModel, BertTokenizerFast, RobertaConfig, RobertaModel

from aang_ray.config.run import RunConfig
from aang_ray.model.encoder import Encoder
from aang_ray.objectives.packing import Segment
from tests.train.running import stepper, tiny_config


@pytest.fixture
def pairs(tiny: dict[str, Any], tmp_path: Path) -> str:
    """The tiny task with a second text."""
    task = tmp_path / "pairs"
    task.mkdir()
    for split in ("train", "dev", "test"):
        rows = [json.loads(row) for row in (Path(tiny["data"]["task"]) / f"{split}.jsonl").read_text().splitlines()]
        lines = [json.dumps({**row, "other": f"a scene with {row['label']} music"}) for row in rows]
        (task / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return f"data.task={task}"


@pytest.fixture
def roberta(tmp_path: Path, tiny: dict[str, Any]) -> str:
    """An encoder with one token type."""
    folder = tmp_path / "roberta"
    BertTokenizerFast.from_pretrained(tiny["encoder"]["name"]).save_pretrained(folder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    config = RobertaConfig(vocab_size=40, type_vocab_size=1, max_position_embeddings=66, **sizes)
    RobertaModel(config, add_pooling_layer=False).save_pretrained(folder)
    return f"encoder.name={folder}"


def test_the_vector_of_a_pair_is_that_of_the_checkpoints_own_model(tiny: dict[str, Any], pairs: str) -> None:
    made = stepper(tiny_config(tiny, "method=finetune", pairs, "data.text_b=other", "encoder.dropout=0"))
    (piece,) = made.setup.domain.end_task_pieces("dev", np.arange(3), 8)
    made.setup.encoder.eval()
    features_EH, _ = made.setup.domain.features(piece)
    rows = [json.loads(row) for row in (Path(pairs.partition("=")[2]) / "dev.jsonl").read_text().splitlines()]
    tokenizer = BertTokenizerFast.from_pretrained(tiny["encoder"]["name"])
    model = BertModel.from_pretrained(tiny["encoder"]["name"], add_pooling_layer=False).eval()
    for row, feature_H in zip(rows[:3], features_EH, strict=True):
        encoded = tokenizer(row["text"], row["other"], return_tensors="pt")
        hidden_LH = model(**encoded).last_hidden_state[0].detach()
        torch.testing.assert_close(feature_H, hidden_LH.mean(dim=0), rtol=1e-4, atol=1e-5)
        encoded["token_type_ids"].zero_()
        without_LH = model(**encoded).last_hidden_state[0].detach()
        assert float((without_LH - hidden_LH).norm() / hidden_LH.norm()) > 1e-3, "the types matter"


def test_types_follow_their_tokens_through_the_transforms(tiny: dict[str, Any], pairs: str, tmp_path: Path) -> None:
    """Deletion closes the text up, queries take the type of their target, samples keep that of their place."""
    (tmp_path / "space.yaml").write_text(
        "blocks:\n"
        "  - {data: [end-task], transform: [no-op], representation: [random-factorized], output: [denoise]}\n"
        "  - {data: [end-task], transform: [deletion, mask, replace], representation: [bidirectional],"
        " output: [denoise, real-synthetic]}\n"
    )
    more = (f"space={tmp_path}/space.yaml", "n=all", "method=static", "data.text_b=other")
    made = stepper(tiny_config(tiny, pairs, *more))
    batch = made.prepare(0).batch
    assert len(batch.segments) == 2 + 5
    for segment in batch.segments[1:]:
        _check_types(segment)
    piece = made.setup.domain.pieces(batch, 1000, False)[0]
    assert piece.replacements is not None
    assert piece.replacements.inputs.types_RL is not None
    given, ids = piece.inputs.types_RL, piece.inputs.ids_RL
    assert given is not None
    assert int(given.sum()) == sum(int(s.types_T.sum()) for s in batch.segments if s.types_T is not None)
    assert not given[ids == 0].any()


def _check_types(segment: Segment) -> None:
    """Check that types are 0 up to the first separator (id 3) of each text, and 1 after it."""
    assert segment.types_T is not None
    ends = np.cumsum(segment.lengths_E)
    for start, end in zip(ends - segment.lengths_E, ends, strict=True):
        positions, types = segment.positions_T[start:end], segment.types_T[start:end]
        first = positions[segment.ids_T[start:end] == 3][0]
        assert (types == (positions > first)).all()


def test_only_runs_whose_results_change_get_another_name(tiny: dict[str, Any], pairs: str, roberta: str) -> None:
    def named(*settings: str) -> RunConfig:
        return tiny_config(tiny, "method=finetune", pairs, *settings)

    assert named().fingerprints.token_types == ""
    assert named("data.text_b=other").fingerprints.token_types == "tokenizer"
    assert named("data.text_b=other", roberta).fingerprints.token_types == ""
    pair = named("data.text_b=other")
    before = pair.model_copy(update={"fingerprints": pair.fingerprints.model_copy(update={"token_types": ""})})
    assert before.cell != pair.cell
    assert "token_types" not in before.identity()["fingerprints"]


def test_an_encoder_with_one_type_gets_no_other(tiny: dict[str, Any], pairs: str, roberta: str) -> None:
    made = stepper(tiny_config(tiny, "method=finetune", pairs, "data.text_b=other", roberta))
    made.step(made.prepare(0))
    encoder = made.setup.encoder
    assert isinstance(encoder, Encoder)
    assert encoder.model_type == "roberta"
