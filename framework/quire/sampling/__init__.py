"""Sampling: processors edit logits, one sampler chooses, the pipeline puts them together."""
