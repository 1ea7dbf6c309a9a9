"""Fine-tune with timm: python examples/finetune_timm.py exported FOLDER

`exported` is what `dino export --to timm --out exported` wrote; FOLDER has a folder of images for each class.
"""

import sys

import timm
import torch
from timm.data import create_transform, resolve_model_data_config
from timm.optim import create_optimizer_v2
from torchvision.datasets import ImageFolder

exported, folder, epochs = sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 10
device = "cuda" if torch.cuda.is_available() else "cpu"
images = ImageFolder(folder)
model = timm.create_model(f"local-dir:{exported}", pretrained=True, num_classes=len(images.classes)).to(device).train()
expects = resolve_model_data_config(model)  # size, mean and deviation of the weights
images.transform = create_transform(**expects, is_training=True, auto_augment="rand-m5-mstd0.5", re_prob=0.1)
loader = torch.utils.data.DataLoader(images, batch_size=min(64, len(images)), shuffle=True, drop_last=True)
optimizer = create_optimizer_v2(model, "adamw", lr=5e-4, weight_decay=0.05, layer_decay=0.75)
for epoch in range(epochs):
    for batch, labels in loader:
        loss = torch.nn.functional.cross_entropy(model(batch.to(device)), labels.to(device), label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch + 1}: loss {loss.item():.3f}")
torch.save(model.state_dict(), "finetuned.pt")
