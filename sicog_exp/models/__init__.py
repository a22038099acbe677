"""Build or load a multimodal LLM; decide which parts train."""
