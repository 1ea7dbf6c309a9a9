"""Fine-tune in plain PyTorch: python examples/finetune_torch.py runs/mine FOLDER

The weights are a run, a file or a released name; FOLDER has a folder of images for each class.
"""

import sys

import torch
from torch import nn
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import dino

weights, folder, epochs = sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 10
device = "cuda" if torch.cuda.is_available() else "cpu"
backbone = dino.load_backbone(weights)
expects = backbone.preprocess  # size, mean and deviation of the weights
pixels = [v2.ToImage(), v2.RandomResizedCrop(expects.image_size, scale=(0.5, 1.0)), v2.RandomHorizontalFlip()]
numbers = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(expects.mean, expects.std)]
images = ImageFolder(folder, v2.Compose([*pixels, *numbers]))
loader = torch.utils.data.DataLoader(images, batch_size=min(64, len(images)), shuffle=True, drop_last=True)
head = nn.Linear(backbone.embed_dim, len(images.classes))
model = nn.Sequential(backbone, head).to(device).train()
groups = [{"params": backbone.parameters(), "lr": 3e-5}, {"params": head.parameters(), "lr": 1e-3}]
optimizer = torch.optim.AdamW(groups, weight_decay=0.05)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [3e-5, 1e-3], total_steps=epochs * len(loader))
for epoch in range(epochs):
    for batch, labels in loader:
        loss = nn.functional.cross_entropy(model(batch.to(device)), labels.to(device), label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    print(f"epoch {epoch + 1}: loss {loss.item():.3f}")
torch.save(model.state_dict(), "finetuned.pt")
