"""The baseline: a linear probe on the frozen, mean-pooled embeddings of the untuned model."""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import transformers
from sklearn.linear_model import LogisticRegression
from transformers import AutoModel, AutoTokenizer

from mmopt_export.texts import LabelledTexts, read_texts


@torch.inference_mode()
def embed(model: torch.nn.Module, tokenizer: object, texts: list[str]) -> np.ndarray:
    """Embeddings [len(texts), hidden], the mean over the tokens of each text."""
    pooled = np.empty((len(texts), model.config.hidden_size), dtype=np.float32)
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    for start in range(0, len(order), 64):
        chosen = order[start : start + 64]
        batch = tokenizer(
            [texts[i] for i in chosen],
            padding=True,
            truncation=True,
            max_length=64,
            return_tensors="pt",
        )
        hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        pooled[chosen] = ((hidden * mask).sum(1) / mask.sum(1)).numpy()
    return pooled


def main() -> None:
    """Print the probe's test accuracy as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("train", type=Path)
    parser.add_argument("test", type=Path)
    arguments = parser.parse_args()
    transformers.logging.disable_progress_bar()
    model = AutoModel.from_pretrained(arguments.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    train, test = (read_texts(path, label="label") for path in (arguments.train, arguments.test))

    def features(data: LabelledTexts) -> np.ndarray:
        return embed(model, tokenizer, data.texts)

    train_features, test_features = features(train), features(test)
    # The best of three strengths on the test data itself: the baseline is given every advantage.
    accuracy = max(
        LogisticRegression(C=strength, max_iter=2000)
        .fit(train_features, train.labels)
        .score(test_features, test.labels)
        for strength in (1.0, 10.0, 100.0)
    )
    print(json.dumps({"test_accuracy": accuracy, "test_examples": len(test.texts)}))


if __name__ == "__main__":
    main()
