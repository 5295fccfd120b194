"""The multi-vector index: documents of many vectors each, compared by MaxSim.

``files`` writes and maps a segment's token vectors; ``search`` answers queries over segments, ``rerank`` scores given documents
exactly, and ``methods`` names the ways to search. The parts: ``exact`` (every document, proven), ``codec`` and ``clusters`` (a
centroid and 2 or 4 bits a component),
``plaid``, ``warp`` and ``xtr`` (approximate ways over them), ``muvera`` (one long vector a document), ``pooling`` (fewer
vectors a document), ``stanford`` (directories of other tools).
"""
