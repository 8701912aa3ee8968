"""dream/terminal.py: what is said of progress where there is no live bar."""

import pytest

from dream.terminal import Terminal


def test_training_tells_steps_on_pairs_from_those_of_a_repair(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both are counted from one; a repair has no margin."""
    monkeypatch.setattr(Terminal, "PLAIN_SECONDS", 0.0)
    with Terminal() as terminal:
        terminal.training({"step": 2, "steps": 8, "loss": 0.5, "margin": 0.1, "accuracy": 0.75})
        terminal.training({"step": 1, "steps": 4, "repair_kl": 0.0625})
    said = capsys.readouterr().err
    assert "step 2 of 8: loss 0.500, margin +0.100, accuracy 0.75" in said
    assert "repair 1 of 4: KL 0.062" in said
