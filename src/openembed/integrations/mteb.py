"""mteb: any model that openembed opens, as mteb loads and runs models. Needs the extra ``openembed[eval]``.

    import mteb
    from openembed.integrations.mteb import model

    mteb.evaluate(model("openembed-nano"), mteb.get_tasks(tasks=["STSBenchmark"]))

Prompts and instructions are those of :class:`openembed.evaluation.mteb.MtebEncoder`.
"""

from __future__ import annotations

from typing import Any

from openembed.evaluation.mteb import MtebEncoder, require_mteb


class OpenEmbedModel(MtebEncoder):
    """What mteb's ``EncoderProtocol`` says, its constructor too: ``model_name`` is a name for ``openembed.load``.

    ``revision`` names the results; without one it is the encoder's fingerprint. ``embed_dim`` keeps the first dimensions.
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
    ) -> None:
        import openembed

        encoder = openembed.load(model_name, device=device, dtype=dtype)
        options = {"max_length": max_length, "dimensions": embed_dim}
        super().__init__(encoder, model_name, revision=revision, instruction=instruction, options=options)
        found = {
            "n_parameters": sum(parameter.numel() for parameter in encoder.parameters()),
            "max_tokens": encoder.max_length,
            "similarity_fn_name": _cosine(),
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


def model(path: str, **options: Any) -> OpenEmbedModel:
    """Returns the model at a path or hub id for ``mteb.evaluate``; ``options`` are those of :class:`OpenEmbedModel`."""
    require_mteb()
    return OpenEmbedModel(path, **options)


def model_meta(path: str, **options: Any) -> Any:
    """Returns a ``ModelMeta`` whose ``load_model()`` opens the model at a path or hub id, at the state it has now."""
    loaded = model(path, **options)

    def load(_name: str, revision: str | None = None, **given: Any) -> OpenEmbedModel:
        return OpenEmbedModel(path, revision, **given)

    return loaded.mteb_model_meta.model_copy(update={"loader": load, "loader_kwargs": options})


def _cosine() -> Any:
    from mteb.models.model_meta import ScoringFunction

    return ScoringFunction.COSINE
