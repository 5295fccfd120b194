"""What a server allows and where it listens."""

from __future__ import annotations

from pydantic import Field, model_validator

from openembed.config import Config

MIB = 1 << 20


class Limits(Config):
    """What one request and all requests together may take; beyond it they are refused, never slowed down for others.

    ``body_bytes``: of one request; ``buffered_bytes``: of all bodies held at once. ``requests``: under way at once. ``texts``,
    ``request_tokens``: of one request; ``answer_values``: numbers of its token vectors, which are 12 bytes each in JSON.
    ``queue_tokens``: waiting to be encoded, per model. ``rerank_documents``: of one request. ``rerank_waiting``: rerank
    requests under way. ``hits``: of one search, ``query_characters`` of what it asks, ``retrieved_tokens`` of each of a query's
    tokens by XTR. ``read_s``: seconds until a request's
    body must be there; ``request_s``: seconds until its answer must be.
    """

    body_bytes: int = Field(16 * MIB, ge=1024)
    buffered_bytes: int = Field(256 * MIB, ge=1024)
    requests: int = Field(1024, ge=1)
    texts: int = Field(2048, ge=1)
    request_tokens: int = Field(262_144, ge=1)
    answer_values: int = Field(33_554_432, ge=1)
    queue_tokens: int = Field(1_048_576, ge=1)
    rerank_documents: int = Field(1000, ge=1)
    rerank_waiting: int = Field(64, ge=1)
    hits: int = Field(1000, ge=1)
    query_characters: int = Field(32_768, ge=1)
    retrieved_tokens: int = Field(2000, ge=1)
    read_s: float = Field(30.0, gt=0)
    request_s: float = Field(60.0, gt=0)

    @model_validator(mode="after")
    def _one_fits(self) -> Limits:
        if self.request_tokens > self.queue_tokens:
            raise ValueError(f"request_tokens {self.request_tokens} is more than queue_tokens {self.queue_tokens}")
        if self.body_bytes > self.buffered_bytes:
            raise ValueError(f"body_bytes {self.body_bytes} is more than buffered_bytes {self.buffered_bytes}")
        return self


class Settings(Config):
    """How a server runs. ``api_keys``: none means that everybody is let in. ``origins``: web pages of other sites that may
    call it (CORS); none by default. ``hosts``: names it answers to; empty means any. ``writable``: documents may be added
    and deleted. ``drain_s``: seconds a stopping server gives accepted requests; ``drain_delay_s``: seconds it stays
    reachable and says so, for a load balancer to notice.
    """

    limits: Limits = Limits()
    api_keys: tuple[str, ...] = Field((), repr=False)
    origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    writable: bool = False
    page: bool = True
    drain_s: float = Field(60.0, ge=0)
    drain_delay_s: float = Field(0.0, ge=0)
