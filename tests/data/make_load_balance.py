"""Record transformers' load-balancing loss for one layer: python tests/data/make_load_balance.py

Needs torch and transformers (recorded with torch 2.13.0 and transformers 5.23.0).
"""

import json
import pathlib

import numpy as np
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

TOKENS, EXPERTS, PER_TOKEN, SEQUENCES = 21, 5, 2, 3

random = np.random.default_rng(0)
logits = random.normal(size=(TOKENS, EXPERTS)).astype(np.float32).round(3)
mask = np.ones((SEQUENCES, TOKENS // SEQUENCES), np.int64)
mask[0, 5:] = mask[2, 3:] = 0
record = {"per_token": PER_TOKEN, "logits_TE": logits.tolist(), "mask_BL": mask.tolist()}
for name, attention_mask in (("all", None), ("masked", torch.tensor(mask))):
    leaf = torch.tensor(logits, requires_grad=True)
    loss = load_balancing_loss_func((leaf,), EXPERTS, PER_TOKEN, attention_mask)
    loss.backward()
    record[name] = {"loss": loss.item(), "gradient_TE": leaf.grad.numpy().round(9).tolist()}
path = pathlib.Path(__file__).with_name("load_balance.json")
path.write_text(json.dumps(record) + "\n")
print({name: record[name]["loss"] for name in ("all", "masked")})
