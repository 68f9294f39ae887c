"""λScale reproduced: one control plane that drives a simulated or a live cluster of serverless LLM nodes."""

__version__ = "0.1.0"
