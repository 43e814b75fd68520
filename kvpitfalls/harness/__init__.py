"""Compressed caches inside other people's harnesses: lm-eval, garak, transformers pipelines, kvpress."""
