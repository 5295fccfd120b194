"""mteb: any model that openembed opens, as mteb loads and runs models. Needs the extra ``openembed[eval]``.

    import mteb
    from openembed.integrations.mteb import model

    mteb.evaluate(model("openembed-nano"), mteb.get_tasks(tasks=["STSBenchmark"]))

Prompts and instructions are those of :class:`openembed.evaluation.mteb.MtebEncoder`.
"""

from __future__ import annotations

from typing import Any

from openembed.evaluation.mteb import MtebEncoder, MtebSearch, require_mteb


class _Opened:
    """The constructor that mteb's loaders call: ``model_name`` is a name for ``openembed.load``.

    ``revision`` names the results; without one it is the encoder's fingerprint. ``embed_dim`` keeps the first dimensions.
    ``encoder``: the model, where it is open already.
    """

    def __init__(
        self,
        model_name: str,
        revision: str | None = None,
        *,
        device: str | None = None,
        dtype: str | None = None,
        instruction: str | None = None,
        embed_dim: int | None = None,
        max_length: int | None = None,
        encoder: Any = None,
    ) -> None:
        import openembed

        encoder = openembed.load(model_name, device=device, dtype=dtype) if encoder is None else encoder
        options = {"max_length": max_length, "dimensions": embed_dim}
        super().__init__(encoder, model_name, revision=revision, instruction=instruction, options=options)
        found = {
            "n_parameters": sum(parameter.numel() for parameter in encoder.parameters()),
            "max_tokens": encoder.max_length,
            "similarity_fn_name": _similarity(encoder.kind),
            "model_type": [{"dense": "dense", "sparse": "sparse", "tokens": "late-interaction"}[encoder.kind]],
            "framework": ["PyTorch"],
            "embed_dim": embed_dim or encoder.width,
        }
        self._meta = self._meta.model_copy(update=found)

    @property
    def mteb_model_meta(self) -> Any:
        """Returns mteb's ``ModelMeta``."""
        return self._meta

    @mteb_model_meta.setter
    def mteb_model_meta(self, meta: Any) -> None:
        self._meta = meta  # mteb's own loader puts the one it was asked for here


class OpenEmbedModel(_Opened, MtebEncoder):
    """A dense model, by mteb's ``EncoderProtocol``, for every kind of task."""


class OpenEmbedSearch(_Opened, MtebSearch):
    """A model of any kind that searches exactly, by mteb's ``SearchProtocol``, for retrieval and reranking."""


def model(
    path: str, *, device: str | None = None, dtype: str | None = None, **options: Any
) -> OpenEmbedModel | OpenEmbedSearch:
    """Returns the model at a path or hub id for ``mteb.evaluate``: one that searches where it is not dense.

    ``options``: ``revision``, ``instruction``, ``embed_dim``, ``max_length``.
    """
    import openembed

    require_mteb()
    encoder = openembed.load(path, device=device, dtype=dtype)
    return (OpenEmbedModel if encoder.kind == "dense" else OpenEmbedSearch)(path, encoder=encoder, **options)


def model_meta(path: str, **options: Any) -> Any:
    """Returns a ``ModelMeta`` whose ``load_model()`` opens the model at a path or hub id, at the state it has now."""
    loaded = model(path, **options)

    def load(_name: str, revision: str | None = None, **given: Any) -> OpenEmbedModel | OpenEmbedSearch:
        return type(loaded)(path, revision, **given)

    return loaded.mteb_model_meta.model_copy(update={"loader": load, "loader_kwargs": options})


def _similarity(kind: str) -> Any:
    from mteb.models.model_meta import ScoringFunction

    found = {"dense": ScoringFunction.COSINE, "sparse": ScoringFunction.DOT_PRODUCT, "tokens": ScoringFunction.MAX_SIM}
    return found[kind]
