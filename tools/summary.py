"""What a quick start has reached: a table, and the same as JSON.

    python -m tools.summary --dir=out/quickstart

Reads the logs and checkpoints in `dir`, asks the base, the finetuned and the
preference-tuned model every held-out question, and writes dir/summary.json:
losses in nats per token, shares between 0 and 1, seconds by stage.
"""

import sys
from collections import Counter
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))  # for `python tools/summary.py`

from configurator import configure

import torch

from data import read_json, write_json
from finetune import answer
from run import autocast_for, load_model
from tokenizer import tokenizer_of_checkpoint
from tools.plot import read_log

dir = "out/quickstart"  # the folder that runs/quickstart.sh filled


def main():
    folder = Path(dir)
    questions = read_json(folder / "world/questions.json")
    result = {}
    result["val_loss_before"], result["val_loss_after"] = first_and_last(folder / "base", "val_loss")
    result["hellaswag_before"], result["hellaswag_after"] = first_and_last(folder / "base", "hellaswag_acc")
    _, result["hellaswag_finetuned"] = first_and_last(folder / "chat", "hellaswag_acc")
    for name, run in (("base", "base"), ("finetuned", "chat"), ("dpo", "dpo")):
        result[f"heldout_{name}"] = held_out_accuracy(folder / run / "best.pt", questions)
    result["preference_before"], result["preference_after"] = first_and_last(folder / "dpo", "val_preference_accuracy")
    result["seconds"] = Counter()
    for line in (folder / "seconds.txt").read_text().splitlines():
        stage, seconds = line.split()
        result["seconds"][stage] += int(seconds)  # a stage may have run twice
    write_json(folder / "summary.json", result)

    print(f"{'':46} before   after")
    asked = f"{len(questions)} held-out questions answered right"
    for what, before, after, kind, stage in (
        ("validation loss (nats per token)", "val_loss_before", "val_loss_after", ".3f", "pretraining"),
        ("HellaSwag format, right of four (chance 25%)", "hellaswag_before", "hellaswag_after", ".1%", "pretraining"),
        (asked, "heldout_base", "heldout_finetuned", ".1%", "finetuning"),
        ("HellaSwag format", "hellaswag_after", "hellaswag_finetuned", ".1%", "finetuning"),
        ("preferences of held-out pairs (chance 50%)", "preference_before", "preference_after", ".1%", "DPO"),
        (asked, "heldout_finetuned", "heldout_dpo", ".1%", "DPO"),
    ):
        print(f"{what:44} {result[before]:8{kind}} {result[after]:7{kind}}   by {stage}")
    seconds = ", ".join(f"{stage} {n}" for stage, n in result["seconds"].items())
    print(f"seconds: {seconds}; in all {result['seconds'].total()}")


def first_and_last(run, name):
    """The first and the last value of a column of a run's log."""
    values = [row[name] for row in read_log(run)[1] if name in row]
    return values[0], values[-1]


def held_out_accuracy(checkpoint, questions):
    """Share of questions whose most likely answer is the right one, apart from case and outer blanks."""
    model, stored = load_model(checkpoint)
    asked = [question["question"] for question in questions]
    autocast = autocast_for(torch.device("cpu"), "float32")
    given = answer(model, tokenizer_of_checkpoint(stored), asked, 64, autocast)
    right = [a.strip().lower() == q["answer"].strip().lower() for a, q in zip(given, questions, strict=True)]
    return sum(right) / len(right)


if __name__ == "__main__":
    configure(globals())
    main()
