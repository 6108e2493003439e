"""A pruned model is pushed to a (local) Hub with its card, and loaded back from there without hf_bimp."""

import json
import sys

import pytest
import torch
import yaml
from transformers import T5ForConditionalGeneration

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


LOAD_COMPRESSED = """
import sys
import hf_bimp
import torch
from transformers import AutoModelForSeq2SeqLM

model = AutoModelForSeq2SeqLM.from_pretrained("user/pruned-t5")
expected = torch.load(sys.argv[1] + "/expected.pt", weights_only=True)
assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
"""


@pytest.mark.parametrize("blocking", [True, False])
def test_compressed_model_is_pushed_and_the_folder_keeps_the_plain_one(tmp_path, blocking):
    out = str(tmp_path / "out")
    train = TRAIN_AND_PUSH.replace("push_to_hub(", f"push_to_hub(compressed=True, blocking={blocking}, ")
    train = (
        train.replace("trainer.push", "pushed = trainer.push")
        + ("" if blocking else "pushed.result()\n")
        + "assert trainer.args.output_dir == sys.argv[1]\n"
    )
    with hub_server() as hub:
        for program, home in ((train, "home"), (LOAD_COMPRESSED, "other-home")):
            output_of(sys.executable, "-c", program, out, environment=client_environment(hub, tmp_path / home))
        repo = hub.repos["user/pruned-t5"]
        card, config = repo["README.md"].decode(), json.loads(repo["config.json"])
        assert len(repo["model.safetensors"]) < (tmp_path / "out" / "model.safetensors").stat().st_size
    assert config["quantization_config"]["quant_method"] == "hf_bimp"
    assert "import hf_bimp\nfrom transformers" in card and "needs no hf_bimp" not in card
    plain = T5ForConditionalGeneration.from_pretrained(out)
    expected = torch.load(tmp_path / "out" / "expected.pt", weights_only=True)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in plain.state_dict().items())
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert "needs no hf_bimp" in (tmp_path / "out" / "README.md").read_text()
