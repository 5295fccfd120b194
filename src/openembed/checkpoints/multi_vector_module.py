"""A self-contained sentence-transformers module for token vectors of an openembed checkpoint; it needs openembed nowhere.

It leaves out the vectors of a prompt's tokens and keeps fewer vectors a text, as ``config.json`` beside it says: means of
clusters, the last vectors, or every k-th. Shapes: ``L`` tokens of a text, ``K`` clusters, ``D`` width.
"""

from __future__ import annotations

import os
import shutil

import torch
from sentence_transformers.multi_vector_encoder.modules.token_pooling import BaseTokenPooling


class OpenEmbedTokens(BaseTokenPooling):
    """What an openembed head does after the last layer, on queries and documents."""

    def __init__(self, pool=None, leave_out_prompt=False):
        super().__init__(tasks=["query", "document"])
        self.pool_settings, self.leave_out_prompt = pool, leave_out_prompt

    def get_config_dict(self):
        """Returns what is written to ``config.json``."""
        return {"pool": self.pool_settings, "leave_out_prompt": self.leave_out_prompt}

    def save(self, output_path, *args, **kwargs):
        """Writes ``config.json``, and this file beside ``modules.json``; also over itself."""
        super().save(output_path, *args, **kwargs)
        target = os.path.join(os.path.dirname(os.path.abspath(output_path)), "openembed_tokens.py")
        if os.path.realpath(__file__) != os.path.realpath(target):
            shutil.copyfile(__file__, target)

    def forward(self, features, task=None):
        """Returns the features with fewer vectors a text."""
        if self.leave_out_prompt and features.get("prompt_length"):
            mask = features["attention_mask"].bool().clone()
            mask[:, : features["prompt_length"]] = False
            features["attention_mask"] = mask
        self._query = task == "query"
        return features if self.pool_settings is None else super().forward(features, task=task)

    def pool_one(self, embedding, **kwargs):
        """Returns the vectors kept of one text."""
        settings, length = self.pool_settings, len(embedding)
        amount = settings["queries" if self._query else "documents"]
        if settings["kind"] == "spacing":
            return embedding[::amount]
        count = amount if isinstance(amount, int) else max(int(amount * length), 1)
        if amount == 0 or count >= length:
            return embedding
        if settings["kind"] == "tail":
            return embedding[length - count :]
        means = cluster_means(embedding, count, settings["iterations"])
        return torch.nn.functional.normalize(means, dim=-1) if settings["renormalize"] else means


def cluster_means(values_LD, count, iterations):
    """Returns the means of k-means clusters ``(K, D)``: evenly spaced beginnings, empty clusters begun anew at far tokens."""
    length = len(values_LD)
    first_K = (2 * torch.arange(count, device=values_LD.device) + 1) * length // (2 * count)
    centres_KD = values_LD[first_K].detach()
    for _ in range(iterations):
        near_LK = values_LD.detach() @ centres_KD.T - centres_KD.square().sum(-1) / 2
        best_L, nearest_L = near_LK.max(-1)
        assigned_LK = torch.nn.functional.one_hot(nearest_L, count).to(values_LD.dtype)
        empty_K = assigned_LK.sum(0) == 0
        lost_L = values_LD.detach().square().sum(-1) / 2 - best_L
        farthest = lost_L.topk(count).indices[: int(empty_K.sum())]
        assigned_LK[farthest, empty_K.nonzero()[:, 0]] = 1
        centres_KD = assigned_LK.T @ values_LD.detach() / assigned_LK.sum(0)[:, None]
    return assigned_LK.T @ values_LD / assigned_LK.sum(0)[:, None]
