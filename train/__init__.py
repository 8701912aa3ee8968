"""Turns preference pairs into weights, measures what that did, and decides whether the result becomes the policy."""
