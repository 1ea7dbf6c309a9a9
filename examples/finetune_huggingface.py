"""Fine-tune with transformers: python examples/finetune_huggingface.py exported FOLDER

`exported` is what `dino export --to huggingface --out exported` wrote; FOLDER has a folder of images for each class.
"""

import sys

from torchvision.datasets import ImageFolder
from transformers import AutoImageProcessor, AutoModelForImageClassification, Trainer, TrainingArguments

exported, folder, epochs = sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 10
processor = AutoImageProcessor.from_pretrained(exported)
images = ImageFolder(folder, lambda image: processor(image, return_tensors="pt")["pixel_values"][0])
names = dict(enumerate(images.classes))
model = AutoModelForImageClassification.from_pretrained(exported, num_labels=len(names), id2label=names)


class Examples:
    """What Trainer reads: a dictionary for each image."""

    def __len__(self):
        return len(images)

    def __getitem__(self, index):
        pixels, label = images[index]
        return {"pixel_values": pixels, "labels": label}


settings = TrainingArguments(
    "finetuned",
    num_train_epochs=epochs,
    per_device_train_batch_size=32,
    learning_rate=5e-5,
    warmup_steps=0.1,
    weight_decay=0.05,
    logging_strategy="epoch",
    save_strategy="epoch",
    report_to="none",
)
Trainer(model, settings, train_dataset=Examples()).train()
model.save_pretrained("finetuned")
processor.save_pretrained("finetuned")
