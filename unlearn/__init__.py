"""Edits and unlearning."""
