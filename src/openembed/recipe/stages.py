"""What each kind of stage does in its folder.

``mine`` writes ``<source>.jsonl``, ``<source>/`` (audit and kept rankings) and ``report.json``, ``filter`` rows, report and
``removed.jsonl``, ``encode`` vectors and the keys of their texts, ``idf`` ``idf.npy`` and ``model/``, ``pool`` and
``initialise`` ``model/``, ``train`` ``metrics.jsonl``, ``checkpoint/`` and ``model/``,
``evaluate`` writes ``<system>/<task>/result.json``, ``index`` writes ``store/`` and ``search`` writes ``searches.json``.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openembed.config import Config
from openembed.data.sources import SourceConfig
from openembed.encoded import require_kind
from openembed.files import atomic_write, read_json, write_json
from openembed.packaged import packaged
from openembed.recipe.config import (
    BM25,
    MINED,
    RANDOM,
    UNTRAINED,
    EncodeStage,
    EvaluateStage,
    FilterStage,
    IdfStage,
    IndexStage,
    InitialiseStage,
    MineStage,
    PoolStage,
    Recipe,
    SearchStage,
    TaskConfig,
    TrainStage,
    relocated,
    system_name,
)
from openembed.train.distributed import ALONE, World

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from openembed.encoder import Encoder
    from openembed.evaluation.tasks import Task
    from openembed.records import Example
    from openembed.rerankers import Reranker
    from openembed.train.loop import TrainConfig

MODEL, METRICS, STORE, SEARCHES, MINED_REPORT = "model", "metrics.jsonl", "store", "searches.json", "report.json"
CHECKPOINTS = "checkpoint"
TEXTS, IDF = "texts.jsonl", "idf.npy"


@dataclass(frozen=True)
class Workplace:
    """Where a recipe runs: its output folder, the folder that its relative paths count from, and the device.

    ``world``: the processes that train together; ``tell`` is given notes for the user, on rank 0.
    """

    recipe: Recipe
    out: Path
    base: Path
    device: str | None = None
    world: World = ALONE
    tell: Callable[[str], None] | None = None

    def locate(self, path: str) -> Path:
        """Returns the place of a path of the recipe: in the package, in a stage's output, or under ``base``."""
        found = packaged(path)
        if found is not None:
            return found
        if path.startswith(MINED):
            return self.out / path.removeprefix(MINED)
        return self.base / path

    def located(self, source: SourceConfig) -> SourceConfig:
        """Returns ``source`` with an absolute path."""
        if source.path is None:
            return source
        return source.model_copy(update={"path": str(self.locate(source.path).absolute())})

    def training(self, stage: TrainStage) -> TrainConfig:
        """Returns the training of a stage, with the places of teachers' vectors and tables: a stage's, or under ``base``."""
        return stage.training.model_copy(update={"objective": relocated(stage.objective, self._table)})

    def _table(self, reference: str) -> str:
        stage = self.recipe.stage.get(reference)
        if stage is None:
            return str(self.locate(reference).absolute())
        folder = self.out / reference
        return str((folder / IDF if isinstance(stage, IdfStage) else folder).absolute())

    def model_folder(self, reference: str) -> str:
        """Returns the folder of a train stage's model, or a folder under ``base``, or the reference itself (a hub id).

        The package's own model goes by its name, whatever lies under ``base``.
        """
        if reference in self.recipe.stage:
            return str(self.out / reference / MODEL)
        if packaged(reference) is not None:
            return reference
        return str(self.base / reference) if (self.base / reference).is_dir() else reference

    def model(self, reference: str, dtype: torch.dtype | None = None, quantization: str | None = None) -> Encoder:
        """Returns the encoder of a model reference, to train when ``dtype`` is given: that of the backbone alone.

        A head that is to be trained stays in float32. None: everything in what is best for the device. ``quantization``:
        how a stored model is held, where not as it is.
        """
        import torch

        from openembed.checkpoints import build, load, usable_device

        head_dtype = None if dtype is None else torch.float32
        if reference != UNTRAINED:
            folder = self.model_folder(reference)
            return load(folder, device=self.device, dtype=dtype, head_dtype=head_dtype, quantization=quantization)
        device = usable_device(self.device or _best_device())
        dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
        config = self.recipe.encoder
        assert config is not None, "references are checked before a recipe runs"
        if config.backbone.path is not None:
            found = self.model_folder(config.backbone.path)
            config = config.model_copy(update={"backbone": config.backbone.model_copy(update={"path": found})})
        return build(config, seed=self.recipe.seed, dtype=dtype).to(device)

    def used(self, reference: str, dtype: str | None) -> Encoder:
        """Returns the encoder of a model reference to encode with, computed in ``dtype``."""
        from openembed.checkpoints import DTYPES, in_int8, load

        if dtype != "int8":
            return self.model(reference, dtype=None if dtype is None else DTYPES[dtype])
        if reference == UNTRAINED:  # int8 is of CPUs: on one it is built, where no other device is asked for
            place = self if self.device is not None else replace(self, device="cpu")
            return in_int8(place.model(UNTRAINED))
        return load(self.model_folder(reference), device=self.device, dtype="int8")

    def reranker(self, reference: str) -> Reranker:
        """Returns the cross-encoder of a folder under ``base`` or a hub id."""
        from openembed.rerankers.cross_encoder import load_cross_encoder

        return load_cross_encoder(self.model_folder(reference), device=self.device or _best_device())


def run_stage(place: Workplace, name: str) -> None:
    """Runs stage ``name`` into its folder; the stages it reads must be finished."""
    stage, folder = place.recipe.stage[name], place.out / name
    RUN[type(stage)](place, stage, folder)


def _mine(place: Workplace, stage: MineStage, folder: Path) -> None:
    """Each source in its own folder, which keeps the audit and, with ``keep_pool``, the rankings."""
    from openembed.data.mine import MINED as ROWS
    from openembed.data.mine import mine_folder
    from openembed.data.sources import load_corpus, load_source, never_negative

    reports = read_json(folder / MINED_REPORT) if (folder / MINED_REPORT).is_file() else {}
    missing = [source for source in stage.sources if source.name not in reports]
    if not missing:
        return
    encoder = None if stage.teacher in (BM25, RANDOM) else place.model(stage.teacher)
    reranker = None if stage.reranker is None else place.reranker(stage.reranker)
    for source in missing:
        located, config = place.located(source), stage.config(source, place.recipe.seed)
        examples = load_source(located, seed=place.recipe.seed)
        done = mine_folder(
            examples,
            load_corpus(located),
            folder / source.name,
            config,
            encoder,
            reranker=reranker,
            exclude=never_negative(located),
        )
        if (done.folder / ROWS).exists():
            os.replace(done.folder / ROWS, folder / f"{source.name}.jsonl")
        reports[source.name] = {name: value for name, value in done.audit.items() if name not in ("samples", "histograms")}
        write_json(folder / MINED_REPORT, reports)


def _encode(place: Workplace, stage: EncodeStage, folder: Path) -> None:
    from openembed.bulk import BulkConfig, encode_file
    from openembed.data.teacher import write_keys

    texts = _plain_texts(place, stage, folder, stage.side)
    encoder = place.used(stage.model, stage.dtype)
    require_kind(encoder, ["dense", "sparse"], f"the encode stage of {stage.model}", "objectives learn from no other")
    config = BulkConfig(kind=stage.side or "document", instruction=stage.instruction)
    encode_file(encoder, texts, folder, config, show_progress=True)
    write_keys(folder, _texts(texts))


def _plain_texts(place: Workplace, stage: EncodeStage | IdfStage, folder: Path, side: str | None) -> Path:
    """The file of a stage's texts: the one it names, or one written from its sources, every distinct text once."""
    from openembed.data.sources import load_sources

    if stage.texts is not None:
        return place.locate(stage.texts)
    found: dict[str, None] = {}
    for examples in load_sources(map(place.located, stage.sources), seed=place.recipe.seed).values():
        for example in examples:
            if side != "document":
                found[example.query.text] = None
            if side != "query":
                found.update(dict.fromkeys(document.full_text for document in (*example.positives, *example.negatives)))
    with atomic_write(folder / TEXTS) as file:
        file.writelines(json.dumps({"id": str(n), "text": text}, ensure_ascii=False) + "\n" for n, text in enumerate(found))
    return folder / TEXTS


def _texts(path: Path) -> Iterator[str]:
    from openembed.documents import read_documents

    return (document.full_text for document in read_documents(path))


def _pool(place: Workplace, stage: PoolStage, folder: Path) -> None:
    place.model(stage.start).with_pool(stage.pool).save(folder / MODEL)


def _idf(place: Workplace, stage: IdfStage, folder: Path) -> None:
    import numpy as np
    import torch

    from openembed.heads.idf_lookup import build_idf

    encoder = place.model(stage.start, dtype=torch.float32)
    if encoder.query_head is None:
        raise ValueError(f"{stage.start}: its queries are no lookup; give the encoder query_head = {{ kind = 'idf_lookup' }}")
    texts = _texts(_plain_texts(place, stage, folder, "document"))
    values_V = build_idf(encoder.tokenizer, texts, encoder.query_head.fold_V)
    with atomic_write(folder / IDF, "wb") as file:
        np.save(file, values_V)
    encoder.query_head.set_table(values_V)
    encoder.save(folder / MODEL)


def _initialise(place: Workplace, stage: InitialiseStage, folder: Path) -> None:
    import torch

    from openembed.data.teacher import TeacherVectors
    from openembed.train.vocabulary import initialise

    source = place.recipe.stage[stage.vectors]
    assert isinstance(source, EncodeStage), "references are checked before a recipe runs"
    encoder = place.model(UNTRAINED, dtype=torch.float32)
    vectors = TeacherVectors(place.out / stage.vectors)
    texts = _plain_texts(place, source, place.out / stage.vectors, source.side)
    initialise(encoder, vectors, place.model(source.model), _texts(texts), stage.smoothing)
    encoder.save(folder / MODEL)


def _filter(place: Workplace, stage: FilterStage, folder: Path) -> None:
    from openembed.data.clean import clean
    from openembed.data.evaluation_texts import read_evaluation_texts
    from openembed.data.sources import load_source

    sources = {source.name: load_source(place.located(source), seed=place.recipe.seed) for source in stage.sources}
    texts = {name: place.locate(path) for name, path in stage.texts.items()}
    against = read_evaluation_texts(stage.against, place.locate)
    clean(sources, texts, against, stage.settings, folder)


def _train(place: Workplace, stage: TrainStage, folder: Path) -> None:
    from openembed.data.sources import load_sources
    from openembed.evaluation.systems import EncoderSystem
    from openembed.train.loop import train
    from openembed.train.vocabulary import calibrate

    world = place.world

    def load() -> tuple[dict[str, list[Example]], list[Task], Encoder]:
        rows = load_sources(map(place.located, stage.data.sources), seed=stage.seed)
        four_bits = place.recipe.encoder.backbone.quantization if place.recipe.encoder else None  # in later stages too
        encoder = place.model(stage.start, dtype=backbone_dtype(stage), quantization=four_bits)
        if stage.calibrate is not None:
            calibrate(encoder, rows, stage.calibrate, stage.compute.max_length)
        return rows, [_task(place, task) for task in stage.watch], encoder

    examples, watched, encoder = world.agree(load, leader_first=True)  # what must be downloaded is, once

    def evaluate(encoder: Encoder, _step: int) -> dict[str, float]:
        system = EncoderSystem(encoder, "training")
        return {task.name: system.evaluate(task).value for task in watched}

    kinds = EncoderSystem(encoder, "training").kinds
    unfit = [task.name for task in watched if task.kind not in kinds]
    if unfit:
        raise ValueError(f"watch: {', '.join(unfit)}: this model cannot be scored on it; it does {', '.join(kinds)}")
    scored = evaluate if watched else None
    train(place.training(stage), encoder, folder, examples=examples, evaluate=scored, world=world, tell=place.tell)


def backbone_dtype(stage: TrainStage) -> torch.dtype:
    """Returns the precision in which a train stage loads the backbone: whatever is trained must be float32.

    Under LoRA with bf16 products the backbone is frozen and stays in 16 bits (a 7B model: 14 GB and not 28); the trainer
    keeps adapters and head in float32.
    """
    import torch

    frozen = stage.lora is not None and stage.compute.precision == "bf16"
    return torch.bfloat16 if frozen else torch.float32


def _evaluate(place: Workplace, stage: EvaluateStage, folder: Path) -> None:
    from openembed.evaluation.runner import run_tasks
    from openembed.evaluation.systems import Bm25System, EncoderSystem

    tasks = [_task(place, task) for task in stage.tasks]
    for model in stage.models:
        if model == BM25:
            ranked = [task for task in tasks if task.kind in ("retrieval", "reranking")]
            run_tasks(Bm25System(), ranked, folder / BM25)
        else:
            encoder = place.used(model, stage.dtype)
            options = {} if stage.max_length is None else {"max_length": stage.max_length}
            system = EncoderSystem(encoder, model, options=options, progress=True)
            run_tasks(system, [task for task in tasks if task.kind in system.kinds], folder / folder_name(model))
            for method in stage.methods if encoder.kind == "tokens" else ():
                by_method = replace(system, name=system_name(model, method), method=method)
                run_tasks(by_method, [task for task in tasks if task.kind == "retrieval"], folder / folder_name(by_method.name))


def _task(place: Workplace, task: TaskConfig) -> Task:
    from openembed.evaluation.tasks import read_task

    folder = place.locate(task.path)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder (task {task.name})")
    overrides = task.model_dump(include={"name", "instruction", "document_instruction"}, exclude_none=True)
    found = read_task(folder, task.name, overrides)
    if found is None:
        raise ValueError(f"{folder}: in no known evaluation layout (task {task.name})")
    return found


def _index(place: Workplace, stage: IndexStage, folder: Path) -> None:
    from openembed.documents import read_documents
    from openembed.index.fields import FIELDS
    from openembed.index.store import Store, describe_model

    directory, documents = folder / STORE, read_documents(place.locate(stage.corpus))
    shutil.rmtree(directory, ignore_errors=True)  # what an interrupted run left
    if stage.model == BM25:
        Store.create(directory, documents, language=stage.language)
        return
    encoder = place.model(stage.model)
    require_kind(encoder, tuple(FIELDS), "an index", f"evaluate {stage.model} instead")
    info = describe_model(place.model_folder(stage.model), encoder, coding=stage.coding)
    Store.create(directory, language=stage.language, model=info).add(documents, encoder)


def _search(place: Workplace, stage: SearchStage, folder: Path) -> None:
    from openembed.index.store import Store
    from openembed.records import Query
    from openembed.steps import RerankConfig, Search

    store = Store(place.out / stage.index / STORE)
    index = place.recipe.stage[stage.index]
    assert isinstance(index, IndexStage), "references are checked before a recipe runs"
    encoder = None if index.model == BM25 else place.model(index.model)
    search = Search(tuple(Query(str(number), text) for number, text in enumerate(stage.queries)))
    for step in stage.steps:
        if isinstance(step, RerankConfig) and step.model is not None:
            search = step.model_copy(update={"model": None}).build(store, place.model(step.model))(search)
        else:
            search = step.build(store, encoder)(search)
    answers = []
    for query in search.queries:
        hits = []
        for identifier, score in list(search.run[query.id].items())[: stage.k]:
            document = store.document(identifier)
            hits.append({"id": identifier, "score": score, "title": document.title, "text": document.text})
        answers.append({"query": query.text, "system": index.model, "hits": hits})
    write_json(folder / SEARCHES, answers)


RUN: dict[type[Config], Callable[[Workplace, Any, Path], None]] = {
    MineStage: _mine,
    EncodeStage: _encode,
    IdfStage: _idf,
    PoolStage: _pool,
    InitialiseStage: _initialise,
    FilterStage: _filter,
    TrainStage: _train,
    EvaluateStage: _evaluate,
    IndexStage: _index,
    SearchStage: _search,
}
"""How each kind of stage is run."""


def folder_name(model: str) -> str:
    """Returns a model reference, or the name of a system, as the name of one folder."""
    return model.strip("/").replace("/", "__")


def _best_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
