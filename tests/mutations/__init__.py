"""Mutates every file that the project reads; each is read, or refused in one line."""
