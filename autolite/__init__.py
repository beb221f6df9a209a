"""AutoLite: compress Hugging Face transformers for a device by searching."""
