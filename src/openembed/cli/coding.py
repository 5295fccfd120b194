"""Options of commands about token vectors: what an index has for approximate search, and how they are searched."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from openembed.index.tokens.files import TokenCoding

Bits = Annotated[
    int | None,
    typer.Option(help="Of token vectors: bits a component in which large segments are coded, for --method (2 or 4; 0: none)."),
]
CodedFrom = Annotated[int | None, typer.Option(help="Tokens from which on a segment is coded (2,000,000 unless given).")]
Vectors = Annotated[
    bool | None, typer.Option("--vectors/--no-vectors", help="Keep the token vectors of coded segments, or their codes alone.")
]
Encodings = Annotated[
    bool | None, typer.Option("--encodings/--no-encodings", help="Also one long vector a document, for --method muvera.")
]
SearchMethod = Annotated[
    str,
    typer.Option(
        "--method",
        help="How to search token vectors: exact, plaid, warp, xtr, muvera; with settings as in xtr:tokens=200,rescored=64.",
    ),
]


def coding_of(
    bits: int | None,
    coded_from: int | None,
    vectors: bool | None,
    encodings: bool | None,
    present: TokenCoding | None = None,
) -> TokenCoding | None:
    """Returns the coding that the options ask for, the rest as it is at ``present``; None where none was given."""
    from openembed.config import parse
    from openembed.index.tokens.files import TokenCoding
    from openembed.index.tokens.muvera import EncodingSettings

    present = present or TokenCoding()
    asked = {"bits": bits, "coded_from": coded_from, "keep_vectors": vectors}
    changes = {name: value for name, value in asked.items() if value is not None}
    if encodings is not None:
        changes["encodings"] = (present.encodings or EncodingSettings()) if encodings else None
    return parse(TokenCoding, dict(present) | changes, "options") if changes else None
