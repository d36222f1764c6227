"""A gym for generative recommenders: known tastes, known propensities, one dial for reward noise."""

__version__ = "0.1.0"
