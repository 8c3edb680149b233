"""What the trainers of this folder share: a few sentences to learn."""

import torch


class Sentences(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        ids = torch.arange(index, index + 12) % 50
        return {"input_ids": ids, "labels": ids}
