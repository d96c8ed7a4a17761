"""Providers of decode attention; a new one is one file here."""
