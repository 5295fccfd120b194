"""Requests and answers, in the shapes that clients of OpenAI, Cohere, Jina and text-embeddings-inference send and read.

Requests are strict: a number is no string, and a key that is not known is refused by name. Answers are for the API's
description.
"""
