"""Make attack_result.pt, info.pickle and train_poison_index_list.pickle of the files in this folder.

BackdoorBench reads these pickles; backdoorbench_moe writes none. Copy the folder to BackdoorBench's record/ and run

    python make_attack_result.py

with torch, numpy and safetensors. Nothing else is needed, and no file is read but facts.json and weights.safetensors.
"""

import json
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

here = Path(__file__).resolve().parent
facts = json.loads((here / "facts.json").read_text())


def state(name, split):
    """The state of a stored data set, with paths relative to BackdoorBench's folder."""
    if split is None:
        return None
    folder = f"./record/{here.name}/{name}"
    stored = {
        index: {"path": f"{folder}/{true}/{index}.png", "other_info": [new, true]}
        for index, new, true in zip(split["indices"], split["labels"], split["true"], strict=True)
    }
    changed = np.zeros(split["images"])
    changed[split["indices"]] = 1
    places = np.array(split["indices"], np.int64) if split["only_changed"] else np.arange(split["images"])
    return {
        "bd_data_container": {"save_folder_path": folder, "data_dict": stored, "save_file_format": ".png"},
        "getitem_all": True,
        "getitem_all_switch": False,
        "original_index_array": places,
        "poison_indicator": changed,
        "save_folder_path": folder,
    }


weights = load_file(here / "weights.safetensors")
result = {
    "model_name": facts["model_name"],
    "num_classes": facts["num_classes"],
    "model": OrderedDict((name, weights[name]) for name in facts["weights"]),
    "data_path": f"./data/{facts['dataset']}",
    "img_size": tuple(facts["img_size"]),
    "clean_data": facts["dataset"],
    "bd_train": state("bd_train_dataset", facts["bd_train"]),
    "bd_test": state("bd_test_dataset", facts["bd_test"]),
}
torch.save(result, here / "attack_result.pt")
torch.save(facts["info"], here / "info.pickle")
if result["bd_train"] is not None:
    torch.save(result["bd_train"]["poison_indicator"], here / "train_poison_index_list.pickle")
print(here / "attack_result.pt")
