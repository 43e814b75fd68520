"""Prompts with named instructions, and the chats that they are made from."""
