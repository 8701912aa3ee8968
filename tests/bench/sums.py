"""How many sums a policy still gets right: `python -P -m tests.bench.sums COUNT WEIGHTS ...`, ten seconds a policy.

The questions of `train.retention`, greedily by Hugging Face, of the embedded model and of each folder of weights
(`runs/coffee/round_02/train/weights`); more of them than a round has time for.
"""

import sys

import torch

from dream.engine import mean
from dream.models import resolve
from train.checkpoints import load_model, load_tokenizer
from train.data import chat_ids
from train.retention import questions, stated

SEED = 1
MODEL = "bundled:smollm2-135m-instruct"
BATCH = 100
MAX_TOKENS = 12


def right(weights: str, count: int) -> list[float]:
    """Question by question 1.0 for a right answer, else 0.0."""
    tokenizer = load_tokenizer(resolve(MODEL), trust_remote_code=False)
    tokenizer.padding_side = "left"
    model = load_model(weights, "auto", trust_remote_code=False).eval()
    asked = questions(count, SEED)
    found = []
    for start in range(0, count, BATCH):
        part = asked[start : start + BATCH]
        prompts = [chat_ids(tokenizer, [{"role": "user", "content": text}], True) for text, _ in part]
        batch = tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
        with torch.inference_mode():
            replies = model.generate(**batch, max_new_tokens=MAX_TOKENS, do_sample=False)
        texts = tokenizer.batch_decode(replies[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        found += [float(stated(text) == answer) for text, (_, answer) in zip(texts, part, strict=True)]
    return found


def main(arguments: list[str]) -> int:
    """Prints a line a policy; lost and won are beside the model as it came."""
    count, folders = int(arguments[0]), arguments[1:]
    before = right(resolve(MODEL), count)
    print(f"as it came: {mean(before):.3f}")
    for folder in folders:
        after = right(folder, count)
        lost, won = (sum(a > b for a, b in zip(*both, strict=True)) for both in ((before, after), (after, before)))
        print(f"{folder}: {mean(after):.3f}, lost {lost}, won {won}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
