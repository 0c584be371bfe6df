"""The ColaRec model and its training under DeepSpeed."""
