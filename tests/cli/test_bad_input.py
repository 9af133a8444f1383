"""What a user may get wrong: one line that names it, exit code 2, nothing written."""

from __future__ import annotations

import pytest
from commands import SETTINGS, invoke

BAD = [
    ({"--metric": "wander"}, "unknown metric 'wander'; did you mean 'wanda'?"),
    ({"--sparsity": "1.0"}, "sparsity 1.0 is outside [0, 1)"),
    ({"--sparsity": "-0.5"}, "sparsity -0.5 is outside [0, 1)"),
    ({"--sparsity": None, "--pattern": "5:4"}, "N must lie between 1 and M"),
    ({"--sparsity": None, "--pattern": "3:7"}, "layer 'model.layers.0.self_attn.q_proj' has 128"),
    ({"--calibration": "missing.txt"}, "there is no file or folder 'missing.txt'"),
    ({"--calibration": None}, "metric 'wanda' needs calibration data"),
    ({"--option": "alpha=1"}, "unknown option of wanda 'alpha'"),
    ({"--option": "scope=everywhere"}, "option scope='everywhere' of wanda"),
    ({"--option": "scope"}, "is not of the form name=value"),
    ({"--option": "scope=model"}, "add --propagate dense"),
    ({"--option": "scope=row", "--sparsity": None, "--pattern": "2:4"}, "does not go with pattern 2:4"),
    ({"--exclude": "*.typo"}, "exclude='*.typo' matches no layer; layers have names such as 'model.layers.0."),
    ({"--exclude": "*"}, "leaves no layer to prune"),
    ({"--seqlen": "4096"}, "longer than the model's context of 256"),
    ({"--samples": "0"}, "Invalid value for '--samples'"),
    ({"--metric": None}, "Missing option '--metric'"),
    ({"--sparsity": ""}, "Invalid value for --sparsity: '' is not a number"),
    ({"--sparsity": "0.3,half"}, "Invalid value for --sparsity: 'half' is not a number"),
    ({"--sparsity": "0.3,0.5"}, "add --propagate dense"),
    ({"--sparsity": "0.3,0.30", "--propagate": "dense"}, "pattern 0.3 is asked for twice"),
    ({"--propagate": "sideways"}, "Invalid value for '--propagate'"),
    ({"--colour": "red"}, "No such option: --colour"),
    ({"--metric": "sparsegpt", "--option": "damping=inf"}, "option damping='inf' of sparsegpt"),
    ({"--metric": "magnitude", "--calibration": "missing.txt"}, "there is no file or folder 'missing.txt'"),
    ({"--device": "tpu"}, "device 'tpu' is not one of"),
    ({"--device": "cuda:99"}, "there is no device 'cuda:99'"),
    ({"--dtype": "int8"}, "unknown dtype 'int8'"),
    ({"--source-option": "shuffle=1"}, "unknown option of python-docs 'shuffle'"),
    ({"--samples": "100000"}, "100000 were asked for"),
    ({"-p": "nowhere.py"}, "plugin file 'nowhere.py' does not exist"),
]


@pytest.mark.parametrize(("changes", "said"), BAD, ids=[said[:30] for _, said in BAD])
def test_bad_input_is_one_clear_line_and_code_2(checkpoint, tmp_path, changes, said):
    settings = {str(SETTINGS[i]): SETTINGS[i + 1] for i in range(0, len(SETTINGS), 2)} | changes
    arguments = [part for name, value in settings.items() if value is not None for part in (name, value)]
    done = invoke("prune", checkpoint, *arguments, "--output", tmp_path / "out")
    assert done.exit_code == 2, done.output
    assert said in done.output
    assert len(done.output.strip().splitlines()) == 1, done.output
    assert list(tmp_path.iterdir()) == []


def test_folders_that_are_no_model_are_named(checkpoint, tmp_path):
    (tmp_path / "empty").mkdir()
    bart = tmp_path / "bart"
    bart.mkdir()
    (bart / "config.json").write_text('{"model_type": "bart", "d_model": 32, "decoder_layers": 2}')
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text("{}")
    for folder, said in [
        (tmp_path / "nowhere", "does not exist"),
        (tmp_path / "empty", "bert, gpt, llama, vit: the folder has no config.json"),
        (bart, "llama: block model.decoder.layers.0 (BartDecoderLayer) has linear layers k_proj"),
        (other, "llama"),
    ]:
        done = invoke("prune", folder, *SETTINGS, "--output", tmp_path / "out")
        assert done.exit_code == 2
        assert said in done.output
        assert len(done.output.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("metric", ["magnitude", "wanda", "gblm"])
def test_damaged_weights_name_the_layer(checkpoint, tmp_path, metric):
    import shutil

    from safetensors.torch import load_file, save_file

    damaged = tmp_path / "damaged"
    shutil.copytree(checkpoint, damaged)
    tensors = load_file(damaged / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    done = invoke("prune", damaged, *SETTINGS, "--metric", metric, "--output", tmp_path / "out")
    assert done.exit_code == 2
    assert "layer 'model.layers.2.mlp.up_proj' has non-finite weights" in done.output
    tensors["model.layers.2.mlp.up_proj.weight"][3, 4] = 0
    tensors["model.layers.1.input_layernorm.weight"][:] = 3e38  # finite, and too large for what comes of it
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    calibrated = "sparsegpt" if metric == "magnitude" else metric
    done = invoke("prune", damaged, *SETTINGS, "--metric", calibrated, "--output", tmp_path / "out")
    assert done.exit_code == 2
    assert "non-finite activations reach layer 'model.layers.1.self_attn.q_proj'" in done.output
    (damaged / "model.safetensors").write_bytes(b"\x00" * 100)
    done = invoke("prune", damaged, *SETTINGS, "--output", tmp_path / "out")
    assert done.exit_code == 2
    assert f"the header of {str(damaged / 'model.safetensors')!r} is damaged" in done.output
    assert not (tmp_path / "out").exists()
