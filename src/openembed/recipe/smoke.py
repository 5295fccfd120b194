"""The smoke version of a recipe: the same stages, sources and objectives on a toy model and toy data.

It runs on a CPU, offline, in seconds, and shows that a recipe's parts fit together; its scores mean nothing.
"""

from __future__ import annotations

from pathlib import Path

from openembed.backbones.text import BackboneConfig
from openembed.data.evaluation_texts import EvaluationSet
from openembed.data.sources import SourceConfig
from openembed.encoder import EncoderConfig
from openembed.heads import LatentAttentionConfig, SpladeConfig
from openembed.packaged import NANO
from openembed.recipe.config import (
    BM25,
    RANDOM,
    UNTRAINED,
    EncodeStage,
    EvaluateStage,
    FilterStage,
    IdfStage,
    IndexStage,
    MineStage,
    PoolStage,
    Recipe,
    StageConfig,
    TrainStage,
)
from openembed.recipe.config import MINED as STAGE
from openembed.train.cached import PLACEMENT, ComputeConfig

TOY = "package:demo/toy"
FILES = {
    "pairs": f"{TOY}/pairs.jsonl.gz",
    "label_text": f"{TOY}/classes.jsonl.gz",
    "class_examples": f"{TOY}/classes.jsonl.gz",
    "scored_pairs": f"{TOY}/scored.jsonl.gz",
    "texts": f"{TOY}/classes.jsonl.gz",
}
ARCHITECTURE = {
    "model_type": "mistral",
    "vocab_size": 8192,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
WARNING = "A toy model, five steps, toy data under the recipe's names: it shows that the parts fit; its scores mean nothing."
OFFSET = -0.4
"""Of a head over the vocabulary, instead of one for the real model's logits, far below which all the toy's are: those of a
text's own tokens are near 0.6 before training, those of others have a standard deviation of 0.11."""
SUFFIX = " (smoke run)"
STEPS, ROWS, NEGATIVES, MAX_LENGTH, TASKS = 5, 8, 2, 64, 2


def shrink(recipe: Recipe) -> Recipe:
    """Returns ``recipe`` with a toy encoder, a few rows of packaged data a source, and five steps a train stage.

    Shrunk again, it is the same.
    """
    encoder = None if recipe.encoder is None else _encoder(recipe.encoder)
    stages = {name: _stage(stage, recipe) for name, stage in recipe.stage.items()}
    title = recipe.title if recipe.title.endswith(SUFFIX) else f"{recipe.title or recipe.name}{SUFFIX}"
    changes = {"title": title, "description": WARNING, "expect": (), "smoke": True}
    return recipe.model_copy(update={"encoder": encoder, "stage": stages, **changes})


def _encoder(config: EncoderConfig) -> EncoderConfig:
    head = config.head
    if isinstance(head, LatentAttentionConfig):
        head = head.model_copy(update={"latents": 8, "heads": 2, "head_width": 16, "expansion": 1})
    if isinstance(head, SpladeConfig) and head.offset is not None:
        head = head.model_copy(update={"offset": OFFSET})
    backbone = BackboneConfig(architecture=ARCHITECTURE, attention=config.backbone.attention)
    tokenizer = config.tokenizer.model_copy(update={"eos_token": "</s>"})
    width = {"width": ARCHITECTURE["hidden_size"]}
    projections = tuple(projection.model_copy(update=width) for projection in config.projections)
    changes = {"backbone": backbone, "head": head, "projections": projections, "tokenizer": tokenizer, "max_length": MAX_LENGTH}
    return config.model_copy(update={**changes, "tokenizer_path": "package:demo/tokenizer"})


def _stage(stage: StageConfig, recipe: Recipe) -> StageConfig:
    match stage:
        case MineStage():
            return stage.model_copy(
                update={
                    "sources": tuple(map(_source, stage.sources)),
                    "teacher": _model(stage.teacher, recipe),
                    "reranker": None,
                    "keep": NEGATIVES,
                }
            )
        case FilterStage():
            return _filter(stage)
        case EncodeStage():
            return stage.model_copy(update={**_texts(stage), "model": _model(stage.model, recipe)})
        case IdfStage():
            return stage.model_copy(update={**_texts(stage), "start": _model(stage.start, recipe)})
        case PoolStage():
            return stage.model_copy(update={"start": _model(stage.start, recipe)})
        case TrainStage():
            return _train(stage, recipe)
        case EvaluateStage():
            toy = {"path": f"{TOY}/retrieval", "note": "toy data"}
            tasks = tuple(task.model_copy(update=toy) for task in stage.tasks[:TASKS])
            models = tuple(dict.fromkeys(_model(model, recipe) for model in stage.models))
            return stage.model_copy(update={"models": models, "tasks": tasks})
        case IndexStage():
            return stage.model_copy(update={"corpus": f"{TOY}/retrieval", "model": _model(stage.model, recipe)})
        case _:
            return stage


def _texts(stage: EncodeStage | IdfStage) -> dict[str, object]:
    """The toy texts, or toy rows, that a stage reads instead of its own."""
    if stage.texts is None:
        return {"sources": tuple(map(_source, stage.sources))}
    return {"texts": stage.texts if stage.texts.startswith(STAGE) else FILES["texts"]}


def _filter(stage: FilterStage) -> FilterStage:
    """The toy evaluation set's questions are training rows too, so that something is found."""
    texts = {name: path if path.startswith(STAGE) else FILES["label_text"] for name, path in stage.texts.items()}
    known = (EvaluationSet(name="toy", path=f"{TOY}/retrieval", documents="none"),) if stage.against else ()
    changes = {"sources": tuple(map(_source, stage.sources)), "texts": texts, "against": known}
    if known:
        changes["duplicates"] = "none"  # all toy sources are one file: only the first would keep its rows
    return stage.model_copy(update=changes)


def _train(stage: TrainStage, recipe: Recipe) -> TrainStage:
    data = stage.data.model_copy(update={"sources": tuple(map(_source, stage.data.sources))})
    batch = stage.batch.model_copy(update={"size": ROWS, "negatives": min(stage.batch.negatives, NEGATIVES), "accumulation": 1})
    optimizer = stage.optimizer.model_copy(update={"warmup": 1})
    changes = {
        "steps": STEPS,
        "epochs": None,
        "batch": batch,
        "optimizer": optimizer,
        "data": data,
        "compute": ComputeConfig(max_length=MAX_LENGTH, **stage.compute.model_dump(include=PLACEMENT)),
    }
    return stage.model_copy(update={**changes, "start": _model(stage.start, recipe)})


def _source(source: SourceConfig) -> SourceConfig:
    """The source with toy rows of its construction; a mined source keeps pointing at the mine stage's output."""
    if (source.path or "").startswith(STAGE):
        return source
    shape = {"columns": {}, "label_texts": {}, "separator": None, "split": "train", "count": None}
    return source.model_copy(update={"path": FILES[source.construction], "hub": None, **shape})


def _model(reference: str, recipe: Recipe) -> str:
    """A stage, BM25, the package's model or a folder as it is; what would have to be downloaded becomes the untrained toy."""
    known = reference in (UNTRAINED, BM25, RANDOM, NANO, *recipe.stage) or Path(reference).is_dir()
    return reference if known else UNTRAINED
