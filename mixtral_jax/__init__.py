"""Mixtral of Experts (arXiv 2401.04088) in JAX and Flax, with expert parallelism."""
