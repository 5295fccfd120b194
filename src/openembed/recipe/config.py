"""Recipes: an ordered set of typed stages, and what they should show.

The stage configs are the Python API too; TOML files are read by :func:`load_recipe`. A stage refers to an earlier one by
name: a train stage as a model, the output of a mine or filter stage as the source ``<stage>/<source>``, an index stage as
an index.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from openembed.config import Config, Name, parse
from openembed.data.evaluation_texts import EvaluationSet
from openembed.data.filter import FilterConfig
from openembed.data.mine import MineConfig
from openembed.data.select import PolicyConfig
from openembed.data.sources import SourceConfig
from openembed.encoder import EncoderConfig
from openembed.heads.token_pooling import TokenPoolConfig
from openembed.index.tokens.files import TokenCoding
from openembed.index.tokens.methods import Method, told
from openembed.objectives.distillation import DistillationConfig
from openembed.objectives.regularizers import FlopsConfig, Regularized
from openembed.recipe.files import RecipeFile, override, read_recipe, to_toml
from openembed.recipe.source_tables import MINED, expanded_stage, named_sources
from openembed.recipe.sweep_config import SweepConfig
from openembed.seeds import derive
from openembed.steps import RerankConfig, StepConfig
from openembed.train.loop import ObjectiveConfig, TrainConfig

UNTRAINED, BM25 = "untrained", "bm25"
"""Names of models that are no stage: the recipe's encoder before training, and lexical search."""
RANDOM = "random"
"""The teacher of a mine stage that draws negatives at random."""


class TaskConfig(Config):
    """One evaluation: a folder in a layout that ``openembed evaluate`` reads, and the instruction of its queries."""

    name: str
    path: str
    note: str = ""
    instruction: str | None = None
    document_instruction: str | None = None


class MineStage(PolicyConfig):
    """Finds hard negatives for the rows of ``sources``, each in its own documents (a BEIR folder's whole corpus).

    ``teacher``: a model as in :class:`EvaluateStage`, or ``random``; ``reranker``: folder or hub id of a cross-encoder that
    scores the teacher's ranking anew. Instructions are the sources' own unless given here; ``template`` and
    ``document_template`` are the teacher's where it is not of our kind, such as ``"query: "`` and ``"passage: "``. The rest is
    as in :class:`openembed.data.mine.MineConfig`.
    """

    do: Literal["mine"]
    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    teacher: str = BM25
    reranker: str | None = None
    instruction: str | None = None
    document_instruction: str | None = None
    template: str | None = None
    document_template: str | None = None
    max_length: int | None = Field(None, ge=1)
    language: str = "en"
    near: float = Field(0.95, gt=0, le=1)
    keep_pool: bool = False

    def config(self, source: SourceConfig, seed: int) -> MineConfig:
        """Returns what to mine for one source."""
        own = {name: getattr(self, name) for name in MineConfig.model_fields if name in type(self).model_fields}
        own["teacher"] = self.teacher if self.teacher in (BM25, RANDOM) else "encoder"
        for name in ("instruction", "document_instruction"):
            own[name] = getattr(source, name) if own[name] is None else own[name]
        return MineConfig(**own, seed=seed)


Dtype = Literal["float32", "bfloat16", "float16", "int8"]  # int8: on CPUs alone


class _ReadsTexts(Config):
    """A stage that reads plain texts: those of ``texts`` (a JSON-lines file with ``text``), or of the rows of ``sources``."""

    texts: str | None = None
    sources: tuple[SourceConfig, ...] = ()

    @model_validator(mode="after")
    def _one_origin(self) -> _ReadsTexts:
        if (self.texts is None) == (not self.sources):
            raise ValueError("give either texts or sources")
        return self


class EncodeStage(_ReadsTexts):
    """Encodes texts with ``model``, for distillation to learn from.

    ``side``: the texts of ``sources`` that are encoded, and as what: every ``query`` or ``document`` of a row; None: all of
    them, as documents. ``instruction``: put before each, where the model has none of its own. ``dtype``: what the model runs
    in; half precision on a GPU and ``int8`` on a CPU are faster and close enough to teach.
    """

    do: Literal["encode"]
    model: str
    side: Literal["query", "document"] | None = None
    instruction: str | None = None
    dtype: Dtype | None = None


class IdfStage(_ReadsTexts):
    """Counts in how many documents each token occurs; gives ``start`` the table that weights queries without a model.

    See :func:`openembed.heads.idf_lookup.build_idf`. The table is ``idf.npy`` in the stage's folder too, for penalties that ask
    for it. ``start``: as in :class:`TrainStage`; its head of queries must be a table.
    """

    do: Literal["idf"]
    start: str = UNTRAINED


class PoolStage(Config):
    """Gives ``start`` (as in :class:`TrainStage`) another ``pool``: fewer vectors a text, to train or to use it so."""

    do: Literal["pool"]
    start: str
    pool: TokenPoolConfig


class InitialiseStage(Config):
    """Makes the recipe's encoder with token embeddings from a teacher: a bag of words before any training.

    ``vectors``: an earlier encode stage; its model is the teacher, its texts say which tokens are frequent. See
    :mod:`openembed.train.vocabulary`.
    """

    do: Literal["initialise"]
    vectors: str
    smoothing: float = Field(default=5e-4, gt=0)


class FilterStage(FilterConfig):
    """Removes from ``sources`` and ``texts`` what overlaps with the evaluation sets ``against``, and duplicates.

    ``texts``: name → JSON-lines file with a ``text`` a row (or an earlier filter stage's, ``stage:<stage>/<name>.jsonl``).
    A set in ``against`` may be given by its path alone. What was removed and why: ``removed.jsonl`` and ``report.json`` in
    the stage's folder, and the run's report.
    """

    do: Literal["filter"]
    sources: tuple[SourceConfig, ...] = ()
    texts: dict[Name, str] = Field(default_factory=dict)
    against: tuple[EvaluationSet, ...] = ()

    @property
    def settings(self) -> FilterConfig:
        """The part that says what is removed."""
        return FilterConfig(**{name: getattr(self, name) for name in FilterConfig.model_fields})

    @model_validator(mode="after")
    def _something_to_do(self) -> FilterStage:
        names = [source.name for source in self.sources] + list(self.texts)
        if not names:
            raise ValueError("nothing to clean: give sources, texts or both")
        if len(set(names)) < len(names):
            raise ValueError(f"two of the sources and texts have one name ({', '.join(names)}); rename one")
        if not self.against and self.duplicates == "none":
            raise ValueError("nothing to remove: give against, or duplicates = 'exact' or 'near'")
        return self


class TrainStage(TrainConfig):
    """Trains the model ``start``: ``untrained`` (the recipe's encoder), an earlier train stage, a folder or a hub id.

    ``calibrate``: the offset of its head over the vocabulary is first set so that this share of the weights of some of its
    documents is above 0. Every ``evaluate_every`` steps, and at the end, it is scored on the tasks ``watch``. A stage without
    ``seed`` in TOML gets one derived from the recipe's seed and the stage's name.
    """

    do: Literal["train"]
    start: str = UNTRAINED
    calibrate: float | None = Field(None, gt=0, lt=1, exclude_if=lambda given: given is None)  # trained before it was there
    watch: tuple[TaskConfig, ...] = ()

    @property
    def training(self) -> TrainConfig:
        """The part that decides the weights."""
        return TrainConfig(**{name: getattr(self, name) for name in TrainConfig.model_fields})


class EvaluateStage(Config):
    """Scores ``models`` on ``tasks``: ``untrained``, ``bm25``, a train stage, a folder or a hub id.

    ``dtype``: what they run in. ``max_length``: tokens of a text that they read at most. ``methods``: by which models
    that give token vectors are scored in retrieval too, beside exact MaxSim; each is a system of its own.
    """

    do: Literal["evaluate"]
    models: tuple[str, ...] = Field(min_length=1)
    tasks: tuple[TaskConfig, ...] = Field(min_length=1)
    dtype: Dtype | None = None
    max_length: int | None = Field(None, ge=1, exclude_if=lambda given: given is None)  # scored before it was there
    methods: tuple[Method, ...] = Field((), exclude_if=lambda given: not given)

    @property
    def systems(self) -> list[str]:
        """The names of what may be scored: every model, alone and by each method (those of token vectors are)."""
        return [name for model in self.models for name in (model, *(system_name(model, method) for method in self.methods))]


def system_name(model: str, method: Method) -> str:
    """Returns what a model searched by a method is called, in results, reports and as a folder."""
    return f"{model} by {told(method).replace(':', ' ')}"


class IndexStage(Config):
    """Indexes the documents of ``corpus`` (a file or BEIR folder) with ``model``; ``bm25`` indexes words alone.

    ``coding``: of token vectors, for methods that do not score every document.
    """

    do: Literal["index"]
    corpus: str
    model: str = BM25
    language: str = "en"
    coding: TokenCoding = Field(TokenCoding(), exclude_if=lambda coding: coding == TokenCoding())


class SearchStage(Config):
    """Answers ``queries`` from the ``index`` stage's documents, ranked by ``steps``, keeping ``k`` documents each."""

    do: Literal["search"]
    index: str
    queries: tuple[str, ...] = Field(min_length=1)
    steps: tuple[StepConfig, ...] = Field(min_length=1)
    k: int = Field(3, ge=1)


Preparing = FilterStage | MineStage | EncodeStage | IdfStage | PoolStage | InitialiseStage
Using = TrainStage | EvaluateStage | IndexStage | SearchStage
StageConfig = Annotated[Preparing | Using, Field(discriminator="do")]


class Expect(Config):
    """A number the recipe should show, from the ``paper`` or ``measured`` by us (then with date, commit and hardware)."""

    metric: str
    value: float
    status: Literal["paper", "measured"]
    source: str
    date: str | None = None
    commit: str | None = None
    hardware: str | None = None

    @model_validator(mode="after")
    def _measured_says_where(self) -> Expect:
        if self.status == "measured" and not (self.date and self.commit and self.hardware):
            raise ValueError("a measured value needs date, commit and hardware")
        return self


class Recipe(Config):
    """Stages in order, by name. ``encoder`` is what train stages that start from ``untrained`` build, with ``seed``.

    ``sweep``: variants of the recipe to be compared (:mod:`openembed.recipe.sweep`); running the recipe itself ignores it.
    ``smoke``: it is run as a toy (:mod:`openembed.recipe.smoke`), and its scores mean nothing.
    """

    name: str
    title: str = ""
    description: str = ""
    seed: int = 0
    encoder: EncoderConfig | None = None
    stage: dict[Name, StageConfig] = Field(min_length=1)
    expect: tuple[Expect, ...] = ()
    sweep: SweepConfig | None = None
    smoke: bool = Field(False, exclude_if=lambda smoke: not smoke)

    def to_toml(self) -> str:
        """Returns the resolved recipe, every default written out; reading it back gives an equal recipe."""
        return to_toml(self.model_dump(mode="json"))


def load_recipe(name_or_path: str | Path, settings: Iterable[str] = (), *, smoke: bool = False) -> Recipe:
    """Returns the recipe of a packaged name or TOML file with ``settings`` (``path.to.key=value``) applied.

    ``smoke`` shrinks it to run on a CPU, offline, in seconds (see :mod:`openembed.recipe.smoke`). Raises ``ValueError``
    with lines of the form ``file: path.to.key: reason (got value)``.
    """
    file = read_recipe(name_or_path)
    table = override(file.table, settings)
    recipe = parse_recipe(RecipeFile(file.name, file.path, file.packaged, table))
    if smoke or recipe.smoke:
        from openembed.recipe.smoke import shrink

        return shrink(recipe)
    return recipe


def parse_recipe(file: RecipeFile) -> Recipe:
    """Returns the recipe of a read file. Source names in stages are replaced by the tables ``[source.NAME]``.

    A name without a table is that of a data set of the library, taken as NV-Embed's version ``library`` has it.
    """
    where = str(file.path)
    table = dict(file.table)
    sources = named_sources(table.pop("source", {}), table.pop("library", None), where)
    stages = table.get("stage", {})
    if isinstance(stages, Mapping):
        expanded = {name: expanded_stage(name, stage, sources, where) for name, stage in stages.items()}
        table["stage"] = {name: _seeded(name, stage, table.get("seed", 0)) for name, stage in expanded.items()}
    recipe = parse(Recipe, {"name": file.name, **table}, where)
    problems = check_references(recipe)
    if problems:
        raise ValueError("\n".join(f"{where}: {problem}" for problem in problems))
    return recipe


def _seeded(name: str, stage: Any, seed: Any) -> Any:
    if not isinstance(stage, Mapping) or stage.get("do") != "train" or not isinstance(seed, int):
        return stage
    return {"seed": derive(seed, name) % 2**31, **stage}


def model_references(stage: StageConfig) -> dict[str, str]:
    """Returns the models a stage needs: key → reference."""
    match stage:
        case MineStage():
            return {"teacher": stage.teacher}
        case TrainStage() | IdfStage() | PoolStage():
            return {"start": stage.start}
        case EncodeStage():
            return {"model": stage.model}
        case InitialiseStage():
            return {"encoder": UNTRAINED}
        case EvaluateStage():
            return {f"models.{index}": model for index, model in enumerate(stage.models)}
        case IndexStage():
            return {"model": stage.model}
        case SearchStage():
            steps = enumerate(stage.steps)
            return {f"steps.{n}.model": s.model for n, s in steps if isinstance(s, RerankConfig) and s.model is not None}
        case FilterStage():
            return {}


def tables(stage: StageConfig) -> tuple[str, ...]:
    """Returns the stages, or folders and files outside the run, that a stage learns from: vectors, and tables of idf."""
    return (*_vectors(stage), *(idf_tables(stage.objective) if isinstance(stage, TrainStage) else ()))


def _vectors(stage: StageConfig) -> tuple[str, ...]:
    if isinstance(stage, InitialiseStage):
        return (stage.vectors,)
    if isinstance(stage, TrainStage) and isinstance(stage.objective, DistillationConfig):
        return stage.objective.folders
    return ()


def idf_tables(objective: ObjectiveConfig) -> tuple[str, ...]:
    """Returns the tables of idf that an objective's penalties read."""
    penalties = objective.regularizers if isinstance(objective, Regularized) else ()
    return tuple(penalty.idf for penalty in penalties if isinstance(penalty, FlopsConfig) and penalty.idf is not None)


def relocated(objective: ObjectiveConfig, locate: Callable[[str], str]) -> ObjectiveConfig:
    """Returns the objective with every folder and table it reads where ``locate`` says."""
    if isinstance(objective, DistillationConfig):
        objective = objective.at([locate(folder) for folder in objective.folders])
    if not idf_tables(objective):
        return objective
    penalties = [
        penalty.model_copy(update={"idf": locate(penalty.idf)}) if getattr(penalty, "idf", None) else penalty
        for penalty in objective.regularizers
    ]
    return objective.model_copy(update={"regularizers": tuple(penalties)})


def stage_sources(stage: StageConfig) -> tuple[SourceConfig, ...]:
    """Returns the sources a stage reads."""
    match stage:
        case MineStage() | FilterStage() | EncodeStage() | IdfStage():
            return stage.sources
        case TrainStage():
            return stage.data.sources
        case _:
            return ()


def data_paths(stage: StageConfig) -> list[str]:
    """Returns the paths of the training data a stage reads: its sources' and its plain texts'."""
    texts = list(stage.texts.values()) if isinstance(stage, FilterStage) else []
    texts += [stage.texts] if isinstance(stage, _ReadsTexts) and stage.texts is not None else []
    return [source.path for source in stage_sources(stage) if source.path] + texts


def needed_stages(recipe: Recipe, name: str) -> list[str]:
    """Returns the earlier stages whose output stage ``name`` reads, in order."""
    stage = recipe.stage[name]
    wanted = set(model_references(stage).values())
    wanted |= {path.removeprefix(MINED).split("/")[0] for path in data_paths(stage) if path.startswith(MINED)}
    if isinstance(stage, SearchStage):
        wanted.add(stage.index)
    wanted.update(tables(stage))
    return [other for other in recipe.stage if other in wanted]


def stage_paths(stage: StageConfig, *, watched: bool = True) -> list[str]:
    """Returns the files and folders outside the run that a stage reads, as the recipe names them.

    ``watched``: with those that only score the model during training.
    """
    paths = [path for path in data_paths(stage) if not path.startswith(MINED)]
    if isinstance(stage, FilterStage):
        paths += [known.path for known in stage.against]
    if isinstance(stage, EvaluateStage):
        paths += [task.path for task in stage.tasks]
    if isinstance(stage, TrainStage) and watched:
        paths += [task.path for task in stage.watch]
    if isinstance(stage, IndexStage):
        paths.append(stage.corpus)
    return paths


def check_references(recipe: Recipe) -> list[str]:
    """Returns a line ``path.to.key: reason (got value)`` for each reference to a stage that is not there.

    A stage may refer only to stages before it. A model that is no stage at all is taken for a folder or hub id.
    """
    problems = []
    for number, (name, stage) in enumerate(recipe.stage.items()):
        earlier = dict(list(recipe.stage.items())[:number])
        if name in (UNTRAINED, BM25):
            problems.append(f"stage.{name}: this name stands for a model; choose another (got {name!r})")
        for key, model in model_references(stage).items():
            problems += _wrong_model(recipe, earlier, f"stage.{name}.{key}", model)
        for path in data_paths(stage):
            problems += _wrong_source(earlier, f"stage.{name}", path)
        if isinstance(stage, TrainStage) and stage.start == BM25:
            problems.append(f"stage.{name}.start: BM25 has nothing to train (got 'bm25')")
        if isinstance(stage, TrainStage) and stage.calibrate is not None and _without_offset(recipe, stage):
            problems.append(f"stage.{name}.calibrate: sets the offset of a splade head; give encoder.head.offset = 0.0")
        problems += _wrong_tables(recipe, earlier, name, stage)
        if isinstance(stage, SearchStage) and not isinstance(earlier.get(stage.index), IndexStage):
            problems.append(f"stage.{name}.index: no earlier index stage of this name (got {stage.index!r})")
    return problems


def _without_offset(recipe: Recipe, stage: TrainStage) -> bool:
    encoder = recipe.encoder if stage.start == UNTRAINED else None
    return encoder is not None and getattr(encoder.head, "offset", None) is None


def _wrong_tables(recipe: Recipe, earlier: Mapping[str, StageConfig], name: str, stage: StageConfig) -> list[str]:
    """What a stage learns from and is not there; a train stage may name a folder or file outside the run too."""
    wanted: list[tuple[str, str, type]] = [("vectors", table, EncodeStage) for table in _vectors(stage)]
    if isinstance(stage, TrainStage):
        wanted += [("idf", table, IdfStage) for table in idf_tables(stage.objective)]
    return [
        f"stage.{name}: {key}: no earlier {'encode' if key == 'vectors' else key} stage of this name (got {table!r})"
        for key, table, kind in wanted
        if (table in recipe.stage or isinstance(stage, InitialiseStage)) and not isinstance(earlier.get(table), kind)
    ]


def _wrong_model(recipe: Recipe, earlier: Mapping[str, StageConfig], where: str, model: str) -> list[str]:
    if model == UNTRAINED and recipe.encoder is None:
        return [f"{where}: needs an [encoder] table (got 'untrained')"]
    if model in recipe.stage and not isinstance(earlier.get(model), (TrainStage, InitialiseStage, IdfStage, PoolStage)):
        return [f"{where}: no earlier train stage of this name (got {model!r})"]
    return []


def _wrong_source(earlier: Mapping[str, StageConfig], where: str, path: str) -> list[str]:
    if not path.startswith(MINED):
        return []
    stage, _, name = path.removeprefix(MINED).removesuffix(".jsonl").partition("/")
    writer = earlier.get(stage)
    if isinstance(writer, MineStage | FilterStage):
        texts = writer.texts if isinstance(writer, FilterStage) else ()
        if name in {source.name for source in writer.sources} | set(texts):
            return []
    return [f"{where}: no earlier mine or filter stage {stage!r} with source {name!r} (got '{stage}/{name}')"]
