"""Indexes: documents and their representations on disk, and exact top-k search over them."""
