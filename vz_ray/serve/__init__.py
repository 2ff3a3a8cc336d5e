"""The served agent: an OpenAI-compatible endpoint, its files and its safety."""
