"""The judge rules on replies: comply, push_back, neither, or abstain. Read `rules`, then `signals`, then `combined`."""
