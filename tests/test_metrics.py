"""BLEU through `evaluate` equals sacrebleu's own, offline."""

import evaluate
import sacrebleu

from hf_bimp.metrics import Bleu

PREDICTIONS = ["Das ist ein kleines Haus.", "Der Hund schläft im Garten.", "Sie liest ein Buch."]
REFERENCES = ["Das ist ein Haus.", "Der Hund schläft heute im Garten.", "Sie liest ein Buch."]


def test_bleu_equals_sacrebleu_and_records_its_signature():
    metric = Bleu(keep_in_memory=True)
    result = metric.compute(predictions=PREDICTIONS, references=REFERENCES)
    assert isinstance(metric, evaluate.Metric)
    assert result["bleu"] == sacrebleu.corpus_bleu(PREDICTIONS, [REFERENCES]).score
    assert 0 < result["bleu"] < 100
    assert result["signature"].startswith("nrefs:1|") and f"version:{sacrebleu.__version__}" in result["signature"]


def test_bleu_over_batches_equals_bleu_at_once():
    metric = Bleu(keep_in_memory=True)
    for prediction, reference in zip(PREDICTIONS, REFERENCES, strict=True):
        metric.add(prediction=prediction, reference=reference)
    assert metric.compute()["bleu"] == sacrebleu.corpus_bleu(PREDICTIONS, [REFERENCES]).score
