"""How token vectors are searched: one closed set of methods, the same in Python, recipes, commands and the API.

``Exact`` looks at every document; the others are each beside what they search by. Not every index can serve each of them:
``check_served`` says what is missing, and how it is made.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from openembed.config import Config, chosen, kind_required, parse
from openembed.index.tokens.files import TokenCoding, TokenSegment
from openembed.index.tokens.muvera import EncodingSettings, Muvera
from openembed.index.tokens.plaid import Plaid
from openembed.index.tokens.warp import Warp
from openembed.index.tokens.xtr import Xtr

__all__ = ["EXACT", "METHODS", "Exact", "Method", "Muvera", "Plaid", "Warp", "Xtr"]


class Exact(Config, json_schema_extra=kind_required):
    """Every document is scored by MaxSim, none is passed over."""

    kind: Literal["exact"] = "exact"


Method = Annotated[Exact | Plaid | Warp | Xtr | Muvera, Field(discriminator="kind")]
"""Any of them."""
EXACT = Exact()
METHODS: Mapping[str, type[Exact | Plaid | Warp | Xtr | Muvera]] = {
    "exact": Exact,
    "plaid": Plaid,
    "warp": Warp,
    "xtr": Xtr,
    "muvera": Muvera,
}


def parse_method(text: str, where: str = "method") -> Method:
    """Returns the method of ``xtr`` or ``xtr:tokens=200,rescored=64``; ``told`` is the other way round.

    Raises ``ValueError``, naming ``where`` it was given, for an unknown method or setting.
    """
    kind, _, rest = text.partition(":")
    if kind not in METHODS:
        raise ValueError(f"{where} {kind!r} is not known; allowed: {', '.join(METHODS)}")
    pairs = [part.partition("=") for part in rest.split(",") if part]
    return parse(METHODS[kind], {name.strip(): _value(value.strip()) for name, _, value in pairs}, f"{where} {kind}")


def told(method: Method) -> str:
    """Returns a method in words that ``parse_method`` reads: its kind, and the settings that are not the usual ones."""
    settings = chosen(method)
    kind = settings.pop("kind")
    return f"{kind}:{','.join(f'{name}={value}' for name, value in settings.items())}" if settings else kind


def gives_maxsim(method: Method) -> bool:
    """True where the scores are exact MaxSim, whatever is passed over; WARP's and XTR's own are not."""
    return not isinstance(method, (Warp, Xtr)) or method.rescored > 0


def coding_for(method: Method) -> TokenCoding | None:
    """Returns the least coding that serves a method, however few the tokens; None: the vectors alone serve it."""
    match method:
        case Plaid():
            return TokenCoding(coded_from=1)
        case Warp():
            return TokenCoding(bits=4, coded_from=1)
        case Muvera():
            return TokenCoding(bits=0, encodings=EncodingSettings())
    return None


def check_served(method: Method, segments: Sequence[TokenSegment]) -> None:
    """Raises ``ValueError`` for a method that searches what these segments do not have, saying how it is made.

    PLAID and WARP are served where any segment has residuals: those too small for them are searched exactly beside it.
    """
    full = [segment for segment in segments if segment.info.tokens]
    if isinstance(method, Muvera):
        lacking = [segment.directory.name for segment in full if segment.info.encodings is None]
        if lacking:
            which = "none" if len(lacking) == len(full) else f"none in {', '.join(lacking)}, of {len(full)} segments"
            advice = _advice("--encodings", "encodings=EncodingSettings()")
            raise ValueError(f"method muvera searches encodings, and this index has {which}; {advice}")
    if isinstance(method, (Plaid, Warp)) and full and all(segment.info.bits is None for segment in full):
        largest = max(segment.info.tokens for segment in full)
        bits = coding_for(method).bits
        advice = _advice(f"--bits {bits} --coded-from 1", f"bits={bits}, coded_from=1")
        raise ValueError(
            f"method {method.kind} searches residuals, and no segment of this index has any (its largest has {largest:,} "
            f"tokens); {advice}, or search it exactly"
        )


def _advice(options: str, settings: str) -> str:
    return f"make them with `openembed compact DIR {options}`, or Store.compact(TokenCoding({settings}))"


def _value(text: str) -> Any:
    """A number as one; everything else as text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
