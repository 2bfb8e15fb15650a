"""Published checkpoints in and out: the Hugging Face layout of LLaDA and iLLaDA, byte for byte."""
