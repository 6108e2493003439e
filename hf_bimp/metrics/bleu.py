"""BLEU by sacrebleu."""

import datasets
import evaluate
import sacrebleu


class Bleu(evaluate.Metric):
    """Corpus BLEU by sacrebleu (Post, 2018), in percent.

    `compute(predictions=[...], references=[...])`, a string each, gives `{"bleu": ..., "signature": ...}`;
    the signature tells other people how to compute the same number.
    """

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="Corpus BLEU by sacrebleu, one reference a sentence.",
            citation="Post, M. A Call for Clarity in Reporting BLEU Scores. WMT 2018.",
            inputs_description="predictions and references: a list of strings each, detokenized.",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float | str]:
        metric = sacrebleu.BLEU()
        score = metric.corpus_score(predictions, [references]).score
        return {"bleu": score, "signature": str(metric.get_signature())}
