"""The dream loop: paired scenarios, judged replies, conservative preference training.

`dream` generates, judges, stores and talks to the user; its sibling `train` turns pairs into weights and decides on
them. docs/ARCHITECTURE.md has the picture.
"""

__version__ = "0.1.0"
