"""The judge rules on replies: comply, push_back, neither, or abstain. `rules` first, then `signals`, then `combined`."""
