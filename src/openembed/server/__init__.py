"""The HTTP server: embeddings, reranking and search over one encoder queue. ``openembed serve`` runs it."""
