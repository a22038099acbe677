"""Lightning modules for supervised fine-tuning and multimodal pre-training; `fit` runs a stage."""
