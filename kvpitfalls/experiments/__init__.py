"""Experiments on real models."""
