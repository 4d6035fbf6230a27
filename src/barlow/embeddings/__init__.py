"""Embeddings: the encoder's representations of many images, in memory or in a Parquet file."""

from barlow.embeddings.encode import Embeddings, embed, read_embeddings

__all__ = ["Embeddings", "embed", "read_embeddings"]
