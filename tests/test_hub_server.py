"""The local Hub of ``hub_server`` against the real client: a model goes up and comes back bit for bit."""

import sys
from pathlib import Path

from hub_server import HubServer, client_environment, hub_server
from processes import run

UPLOAD = """
import os
import sys
from huggingface_hub import create_repo, upload_folder
from transformers import T5Config, T5ForConditionalGeneration

repo = create_repo("tiny-t5", exist_ok=True)
assert create_repo("tiny-t5", exist_ok=True).repo_id == repo.repo_id == "user/tiny-t5"
config = T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
T5ForConditionalGeneration(config).save_pretrained(sys.argv[1])
open(f"{sys.argv[1]}/README.md", "w").write("---\\ntags:\\n- pruned\\n---\\n# Tiny\\n")
first = upload_folder(repo_id=repo.repo_id, folder_path=sys.argv[1], commit_message="Add the model")
again = upload_folder(repo_id=repo.repo_id, folder_path=sys.argv[1])
assert again.oid == first.oid, "an unchanged folder made a new commit"
os.remove(f"{sys.argv[1]}/generation_config.json")
upload_folder(repo_id=repo.repo_id, folder_path=sys.argv[1], delete_patterns="*.json", commit_message="Delete one")
"""

DOWNLOAD = """
import sys
import torch
from huggingface_hub import hf_hub_download, model_info, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM

loaded = AutoModelForSeq2SeqLM.from_pretrained("user/tiny-t5").state_dict()
saved = load_file(f"{sys.argv[1]}/model.safetensors")
assert saved and all(torch.equal(loaded[name], weight) for name, weight in saved.items())
assert sorted(model_info("user/tiny-t5").tags) == ["pruned"]
assert load_file(f"{snapshot_download('user/tiny-t5')}/model.safetensors").keys() == saved.keys()
for repo, error in (("user/tiny-t5", EntryNotFoundError), ("user/absent", RepositoryNotFoundError)):
    try:
        hf_hub_download(repo, "absent.txt")
    except error:
        continue
    raise AssertionError(f"{repo}: no {error.__name__}")
"""


def run_client(server: HubServer, home: Path, program: str, folder: Path) -> None:
    environment = client_environment(server, home) | {"CUDA_VISIBLE_DEVICES": ""}
    done = run(sys.executable, "-c", program, folder, environment=environment)
    assert done.returncode == 0, done.stderr + "\n".join(server.requests)


def test_a_model_comes_back_bit_for_bit(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with hub_server() as hub:
        run_client(hub, tmp_path / "uploader", UPLOAD, folder)
        run_client(hub, tmp_path / "downloader", DOWNLOAD, folder)

    head = hub.head("user/tiny-t5")
    assert head.parent is not None
    assert [head.title, head.parent.title] == ["Delete one", "Add the model"]
    assert head.parent.files.keys() - head.files.keys() == {"generation_config.json"}
    assert hub.repos["user/tiny-t5"].keys() == {file.name for file in folder.iterdir()} | {".gitattributes"}
    assert hub.repos["user/tiny-t5"]["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert [path for path, blob in head.files.items() if blob.lfs] == ["model.safetensors"]
