"""Tokenizers, prompts, and control tokens in foreign text."""
