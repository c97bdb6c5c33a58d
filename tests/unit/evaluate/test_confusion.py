"""What is taken for what, counted by hand."""

import torch

from pipeline.evaluate.zero_shot import confusion


def test_rows_with_a_label_are_counted_by_class_and_answer() -> None:
    image = torch.tensor([[1.0, 0], [0, 1.0], [1.0, 0], [1.0, 0], [0, 1.0]])
    found = confusion(image, ["b", "a", "", "b", "b"], ["b", "a"], torch.eye(2))
    assert found.classes == ["b", "a"]
    assert found.counts == [(0, 0, 2), (0, 1, 1), (1, 1, 1)]
