"""Pretrained networks that turn packed token ids into hidden states."""
