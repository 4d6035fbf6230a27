"""What an encoder is used for: embeddings of many images, kept in one Parquet file."""

from barlow.embeddings.encode import Embeddings, embed, read_embeddings

__all__ = ["Embeddings", "embed", "read_embeddings"]
