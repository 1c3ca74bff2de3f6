"""Experiments on real data: one folder each, with `common` shared between them."""
