"""A pruned model is pushed to a (local) Hub with its card, and loaded back from there without hf_bimp."""

import sys

import yaml

from hub_server import client_environment, hub_server
from processes import output_of

TRAIN_AND_PUSH = """
import sys
import torch
from transformers import T5Config, T5ForConditionalGeneration
from hf_bimp import BIMPSeq2SeqArguments, BIMPSeq2SeqTrainer

torch.manual_seed(0)
size = dict(vocab_size=32, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=4, decoder_start_token_id=0)
items = [{"input_ids": torch.randint(3, 32, (6,)), "labels": torch.randint(3, 32, (5,))} for _ in range(16)]
args = BIMPSeq2SeqArguments(
    output_dir=sys.argv[1], max_steps=8, target_sparsity=0.75, num_cycles=2, learning_rate=1e-3, use_cpu=True,
    per_device_train_batch_size=4, report_to="none", save_strategy="no", hub_model_id="user/pruned-t5",
    disable_tqdm=True,
)
trainer = BIMPSeq2SeqTrainer(
    model=T5ForConditionalGeneration(T5Config(**size)), args=args, train_dataset=items, eval_dataset=items,
    compute_metrics=lambda p: {"half": 0.5},
)
trainer.train()
trainer.push_to_hub(tasks="translation", dataset="wmt/wmt16", dataset_tags="wmt/wmt16", finetuned_from="some/base")
torch.save(trainer.model.state_dict(), sys.argv[1] + "/expected.pt")
"""

LOAD = """
import sys
import torch
from transformers import AutoModelForSeq2SeqLM

model = AutoModelForSeq2SeqLM.from_pretrained("user/pruned-t5")
expected = torch.load(sys.argv[1] + "/expected.pt", weights_only=True)
assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
weights = [w for name, w in model.named_parameters() if ".block." in name and w.ndim == 2 and "bias" not in name]
zeros = sum(int((w == 0).sum()) for w in weights)
assert zeros == round(0.75 * sum(w.numel() for w in weights)), zeros
assert "hf_bimp" not in sys.modules
"""


def test_pushed_model_loads_back_without_hf_bimp(tmp_path):
    out = str(tmp_path / "out")
    with hub_server() as hub:
        for program, home in ((TRAIN_AND_PUSH, "home"), (LOAD, "other-home")):
            output_of(sys.executable, "-c", program, out, environment=client_environment(hub, tmp_path / home))
        card = hub.repos["user/pruned-t5"]["README.md"].decode()
        assert "bimp_results.json" in hub.repos["user/pruned-t5"]
    metadata = yaml.safe_load(card.split("---")[1])
    assert {"hf_bimp", "pruned"} <= set(metadata["tags"])
    assert metadata["base_model"] == "some/base"
    assert metadata["datasets"] == ["wmt/wmt16"]
    assert metadata["model-index"][0]["results"][0]["metrics"][0]["type"] == "half"
    assert "**75.00% of the prunable weights**" in card
    assert 'from_pretrained("user/pruned-t5")' in card
