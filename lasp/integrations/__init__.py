"""Adapters to other frameworks. Each is a module of its own, imported by those who have that framework."""
