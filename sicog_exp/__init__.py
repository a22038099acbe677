"""Run, measure and compare self-improving multimodal LLM experiments (SIcog, arXiv 2503.12303)."""

__version__ = "0.1.0"
