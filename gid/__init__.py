"""Collaborative embeddings and the tree of GIDs."""
