"""Fine-tune with timm: python examples/finetune_timm.py exported FOLDER

`exported` is what `dino export --to timm --out exported` wrote; FOLDER has a folder of images for each class.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from timm.data import create_transform
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2
from torchvision.datasets import ImageFolder

exported, folder, epochs = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 10
device = "cuda" if torch.cuda.is_available() else "cpu"
arguments = json.loads((exported / "arguments.json").read_text())
transform = create_transform(arguments["img_size"], is_training=True, auto_augment="rand-m5-mstd0.5", re_prob=0.1)
images = ImageFolder(folder, transform)  # normalised by ImageNet's mean and deviation, which create_transform takes
loader = torch.utils.data.DataLoader(images, batch_size=min(64, len(images)), shuffle=True, drop_last=True)
model = VisionTransformer(**arguments)
model.load_state_dict(load_file(exported / "model.safetensors"))
model.reset_classifier(len(images.classes))
model.to(device).train()
optimizer = create_optimizer_v2(model, "adamw", lr=5e-4, weight_decay=0.05, layer_decay=0.75)
for epoch in range(epochs):
    for batch, labels in loader:
        loss = torch.nn.functional.cross_entropy(model(batch.to(device)), labels.to(device), label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch + 1}: loss {loss.item():.3f}")
torch.save(model.state_dict(), "finetuned.pt")
