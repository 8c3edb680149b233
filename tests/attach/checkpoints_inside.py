"""A model that is no PreTrainedModel and computes its layers again in the backward pass, whatever the flags say; with a
tower that is frozen, a projector that is trained, and torch.save at the end."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from toy import Sentences
from transformers import HfArgumentParser, Trainer, TrainingArguments


@dataclass
class ModelArguments:
    width: int = field(default=32)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.q_proj, self.up_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        return x + self.up_proj(torch.tanh(self.q_proj(x)))


class Model(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.embed = nn.Embedding(64, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(2))
        self.vision_tower = nn.ModuleDict({"layers": nn.ModuleList([Block(width)])}).requires_grad_(False)
        self.connector = nn.Linear(width, width)
        self.lm_head = nn.Linear(width, 64, bias=False)

    def forward(self, input_ids, labels=None):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=True)
        x = x + self.connector(self.vision_tower["layers"][0](torch.ones_like(x)))
        logits = self.lm_head(x)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        return {"loss": loss, "logits": logits}


model_args, args = HfArgumentParser((ModelArguments, TrainingArguments)).parse_args_into_dataclasses()
torch.manual_seed(0)
model = Model(model_args.width)
trainer = Trainer(model=model, args=args, train_dataset=Sentences())
trainer.train()
if args.should_save:
    Path(args.output_dir).mkdir(exist_ok=True)
    torch.save(model.state_dict(), Path(args.output_dir) / "weights.pt")
