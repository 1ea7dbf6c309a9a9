"""Weights told apart by what they hold."""

import hashlib

from dino.models.backbone import Backbone


def weights_digest(backbone: Backbone) -> str:
    """A digest of all of a backbone's tensors and of its architecture."""
    digest = hashlib.sha256(repr(backbone.spec).encode())
    for name, tensor in sorted(backbone.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
