"""Derivations that a machine checks; nothing in the library imports them."""
