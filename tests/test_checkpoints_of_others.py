"""Checkpoints and adapters as other tools and other versions write them: the right result, or an error that says why."""
import json
import shutil
import time
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from deepvideo_r1 import cli
from deepvideo_r1.config import ObjectiveConfig, RolloutConfig, TrainConfig
import deepvideo_r1.model.decoding as decoding_module
from deepvideo_r1.core import Clip, Sample, make_generator
from deepvideo_r1.model.policy import group_logps, load_policy, rollout_batch, save_policy
from deepvideo_r1.model.prompt import QuestionError, build_prompt, load_processor
from deepvideo_r1.model.rollout import rollout_groups
from deepvideo_r1.reward import total_reward
from deepvideo_r1.trainer import Trainer, fit
from deepvideo_r1.training.reference import Reference

QUESTION = Sample(id="q", question="what is red ?", kind="choice", options=("a dog", "a cat"), answer="A")
ATTENTION = ["q_proj", "v_proj"]
LANGUAGE, VISUAL = "base_model.model.model.language_model.", "base_model.model.model.visual."


@pytest.fixture(scope="module")
def rollout(tiny_model):
    "Sampled responses to a question about a video."
    pixels = torch.randint(0, 256, (4, 3, 28, 56), generator=make_generator(0), dtype=torch.uint8)
    processor = load_processor(tiny_model)
    prompt = build_prompt(QUESTION, [("video", Clip(pixels, torch.arange(4) / 2.0))], processor)
    sampled, = rollout_groups(load_policy(tiny_model), processor, [QUESTION], [prompt], [(0,)], group_size=3, max_tokens=8)
    return sampled


@torch.no_grad()
def logps(path, rollout, **settings):
    policy = path if isinstance(path, nn.Module) else load_policy(path, **settings)
    return group_logps(policy, rollout)


def make_adapter(base, directory, std=0.3, **settings):
    "An adapter of peft alone, with weights that change the model."
    settings = {"r": 4, "target_modules": ATTENTION} | settings
    model = get_peft_model(Qwen2_5_VLForConditionalGeneration.from_pretrained(base), LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, std, generator=make_generator(name))
            elif "magnitude" in name:
                parameter.mul_(1.2)
    model.save_pretrained(directory)
    return directory


def edit(path, **changes):
    "Changes fields of a JSON file; None removes one."
    settings = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in settings.items() if value is not None}))


def rename(adapter, change):
    "Gives the weights of an adapter other keys; a key that becomes None is dropped."
    file = adapter / "adapter_model.safetensors"
    save_file({new: w for key, w in load_file(file).items() if (new := change(key)) is not None}, file)


@pytest.fixture(scope="module")
def sft(tiny_model, tmp_path_factory):
    return make_adapter(tiny_model, tmp_path_factory.mktemp("adapter") / "sft")


@pytest.fixture
def adapter(sft, tmp_path):
    "A copy of an adapter, to be changed."
    return shutil.copytree(sft, tmp_path / "adapter")


@pytest.fixture
def model(tiny_model, tmp_path):
    "A copy of a checkpoint, to be changed."
    return shutil.copytree(tiny_model, tmp_path / "model")


def refuse(path, message, **settings):
    "The checkpoint is refused in one line that names it."
    with pytest.raises(ValueError, match=message) as caught:
        load_policy(path, **settings)
    text = str(caught.value)
    assert str(path) in text and len(text.splitlines()) == 1
    return text


# --- adapters that load -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [
    {}, {"use_rslora": True, "lora_alpha": 16}, {"use_dora": True}, {"init_lora_weights": "gaussian"},
    {"target_modules": "all-linear"}, {"target_modules": r".*\.(q_proj|up_proj)"},
    {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {r"layers\.0\.self_attn\.q_proj": 64}},
    {"target_modules": ["qkv", "proj", "mlp.0", "o_proj"]}, {"layers_to_transform": [1]}, {"exclude_modules": ["v_proj"]},
    {"task_type": "CAUSAL_LM"}], ids=str)
def test_an_adapter_is_what_peft_makes_of_it(tiny_model, tmp_path, rollout, settings):
    path = make_adapter(tiny_model, tmp_path / "adapter", **settings)
    ours = load_policy(path)
    theirs = load_policy(tiny_model)
    theirs.hf = PeftModel.from_pretrained(theirs.hf, path)
    expected = logps(theirs, rollout)
    assert (expected - logps(tiny_model, rollout)).abs().max() > 0.1
    torch.testing.assert_close(logps(ours, rollout), expected, atol=1e-6, rtol=0)
    save_policy(ours, load_processor(path), tmp_path / "again")
    assert torch.equal(logps(tmp_path / "again", rollout), logps(ours, rollout))
    theirs = load_policy(tiny_model)
    theirs.hf = PeftModel.from_pretrained(theirs.hf, tmp_path / "again")
    torch.testing.assert_close(logps(theirs, rollout), expected, atol=1e-6, rtol=0)


FRONTS = ["model.layers.", "model.model.layers.", "language_model.layers.", "language_model.model.layers.", "layers.",
          "model.language_model.model.layers.", "base_model.model.model.layers.", "module.model.layers."]
TARGETS = [ATTENTION, r"^(?!.*visual).*(?:q_proj|v_proj)$", r"model\.layers\.\d+\.self_attn\.(q|v)_proj",
           [f"model.layers.{i}.self_attn.{name}_proj" for i in range(2) for name in "qv"]]


@pytest.mark.parametrize("front", FRONTS)
def test_layers_under_the_names_of_other_versions(sft, adapter, rollout, front):
    rename(adapter, lambda key: key.replace(LANGUAGE + "layers.", f"base_model.model.{front}"))
    assert torch.equal(logps(adapter, rollout), logps(sft, rollout))


@pytest.mark.parametrize("targets", TARGETS, ids=str)
def test_settings_with_the_names_of_other_versions(sft, adapter, rollout, tmp_path, targets):
    rename(adapter, lambda key: key.replace("language_model.", ""))
    edit(adapter / "adapter_config.json", target_modules=targets)
    assert torch.equal(logps(adapter, rollout), logps(sft, rollout))
    save_policy(load_policy(adapter), load_processor(adapter), tmp_path / "again")
    assert torch.equal(logps(tmp_path / "again", rollout), logps(sft, rollout))


@pytest.mark.parametrize("change", [
    lambda key: key.replace(".weight", ".default.weight"), lambda key: key.removeprefix("base_model.model."),
    lambda key: f"module.{key}", lambda key: key.replace(".layers.1.", ".layers.1._fsdp_wrapped_module."),
    lambda key: key.replace("base_model.model.", "base_model.model._orig_mod.")])
def test_keys_with_the_words_of_wrappers(sft, adapter, rollout, change):
    rename(adapter, change)
    assert torch.equal(logps(adapter, rollout), logps(sft, rollout))


def test_an_adapter_of_the_encoder_too(tiny_model, tmp_path, rollout):
    path = make_adapter(tiny_model, tmp_path / "new", target_modules=["q_proj", "qkv", "mlp.gate_proj"])
    old = shutil.copytree(path, tmp_path / "old")
    rename(old, lambda key: key.replace(LANGUAGE, "base_model.model.model.").replace(VISUAL, "base_model.model.visual."))
    assert any(key.startswith("base_model.model.visual.") for key in load_file(old / "adapter_model.safetensors"))
    assert torch.equal(logps(old, rollout), logps(path, rollout))
    policy = load_policy(path)
    assert not any("visual" in name for name, p in policy.named_parameters() if p.requires_grad)  # the encoder is frozen


def test_an_adapter_in_a_bin_file_and_in_bfloat16(sft, adapter, rollout):
    file = adapter / "adapter_model.safetensors"
    torch.save(load_file(file), adapter / "adapter_model.bin")
    file.unlink()
    assert torch.equal(logps(adapter, rollout), logps(sft, rollout))
    torch.save({key: w.bfloat16() for key, w in torch.load(adapter / "adapter_model.bin").items()}, adapter / "adapter_model.bin")
    policy = load_policy(adapter)
    torch.testing.assert_close(logps(policy, rollout), logps(sft, rollout), atol=0.2, rtol=0)
    assert {p.dtype for p in policy.parameters()} == {torch.float32}


def test_a_bare_adapter_has_the_processor_of_its_base(sft, tiny_model, tmp_path):
    assert not list(sft.glob("tokenizer*"))
    ours, base = load_processor(sft), load_processor(tiny_model)
    assert ours.tokenizer.get_vocab() == base.tokenizer.get_vocab() and ours.tokenizer.chat_template == base.tokenizer.chat_template
    assert (ours.max_pixels, ours.pad_ids) == (base.max_pixels, base.pad_ids)
    partly = shutil.copytree(sft, tmp_path / "partly")
    base.tokenizer.save_pretrained(partly)  # a tokenizer and no image settings, as trainers leave it
    assert load_processor(partly).max_pixels == base.max_pixels


def test_the_commands_take_a_bare_adapter(sft, tiny_world, tmp_path, capsys):
    assert cli.main(["ask", "what is red ?", "--model", str(sft), "--max-tokens", "4"]) == 0
    questions = tmp_path / "q.jsonl"
    rows = [{"question": f"what is red {i} ?", "kind": "number", "answer": 1} for i in range(2)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main(["evaluate", "--model", str(sft), "--data", str(questions), "--out", str(tmp_path / "e"),
                     "--max-tokens", "4"]) == 0
    assert cli.main(["train", "--model", str(sft), "--data", str(questions), "--out", str(tmp_path / "t"), "--train.steps", "1",
                     "--train.prompts-per-step", "2", "--rollout.group-size", "2", "--rollout.max-tokens", "4",
                     "--objective.name", "grpo"]) == 0
    row = json.loads((tmp_path / "t" / "metrics.jsonl").read_text())
    assert row["kl"] == 0.0
    assert json.loads((tmp_path / "t" / "model" / "adapter_config.json").read_text())["r"] == 4


# --- adapters that are refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings, message", [
    ({"modules_to_save": ["lm_head"]}, r"sets modules_to_save to \['lm_head'\].* merge it into its base"),
    ({"modules_to_save": ["embed_tokens"]}, "sets modules_to_save"), ({"target_modules": ["q_proj", "lm_head"]}, "lm_head.* merge it"),
    ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens.* merge it"), ({"bias": "lora_only"}, "sets bias to 'lora_only'"),
    ({"trainable_token_indices": [1, 2]}, "sets trainable_token_indices"), ({"init_lora_weights": "pissa"}, "base was changed when it was made"),
    ({"lora_bias": True}, "sets lora_bias"), ({"lora_dropout": 0.1}, "lora_dropout is 0.1")], ids=str)
def test_an_adapter_that_is_more_than_lora_is_refused(tiny_model, tmp_path, settings, message):
    refuse(make_adapter(tiny_model, tmp_path / "adapter", **settings), message)


@pytest.mark.parametrize("change, message", [
    (dict(peft_type="LOHA"), "is of type LOHA, supported is LORA"), (dict(r=8), "the settings say rank 8"),
    (dict(r="4"), "r is '4', it must be a positive number"), (dict(use_dora=True), "the settings ask for lora_A, lora_B, lora_magnitude"),
    (dict(target_modules=["q_proj", "k_proj", "v_proj"]), "2 layers that adapter_config.json names have no weights"),
    (dict(target_modules="(", ), "the layers in adapter_config.json cannot be read"), (dict(rank_pattern=[1]), "cannot be read"),
    (dict(an_unknown_setting={"x": 1}), "sets an_unknown_setting to {'x': 1}"), (dict(base_model_name_or_path=None), "names no base"),
    (dict(base_model_name_or_path="../models/Qwen2.5-VL-3B"), r"the adapter's base '../models/Qwen2.5-VL-3B' is not to be found .*set base_model_name_or_path in"),
    (dict(base_model_name_or_path="/gone/with/the/disk"), "the adapter's base '/gone/with/the/disk' is not to be found"),
    (dict(base_model_name_or_path="Qwen/nothing-of-this-name"), "the adapter's base 'Qwen/nothing-of-this-name' is not to be found")], ids=str)
def test_settings_that_do_not_fit_are_refused(adapter, change, message):
    edit(adapter / "adapter_config.json", **change)
    refuse(adapter, message)


@pytest.mark.parametrize("change, message", [
    (lambda key: key.replace("self_attn", "attention"), "8 of 8 keys fit no layer"),
    (lambda key: key.replace(".layers.1.", ".layers.7."), "4 of 8 keys fit no layer of .*layers.7"),
    (lambda key: None if "layers.1.self_attn.q_proj.lora_A" in key else key, "q_proj has lora_B, the settings ask for lora_A, lora_B"),
    (lambda key: None if "layers.1.self_attn.q_proj" in key else key, "1 layers that adapter_config.json names have no weights"),
    (lambda key: key.replace("lora_B", "lora_C"), "4 of 8 keys fit no layer")])
def test_keys_that_do_not_fit_are_listed(adapter, change, message):
    rename(adapter, change)
    refuse(adapter, message)


def spoil(file, key_part, change):
    weights = load_file(file)
    key = next(key for key in sorted(weights) if key_part in key)
    save_file(weights | {key: change(weights[key]).contiguous()}, file)
    return key


@pytest.mark.parametrize("change, message", [
    (lambda w: w * torch.nan, "holds numbers that are not finite"), (lambda w: w / 0, "holds numbers that are not finite"),
    (lambda w: w[:, :-1], "has matrices of"), (lambda w: w[:0], "has matrices of")])
def test_weights_of_an_adapter_that_cannot_be_used_are_refused(adapter, change, message):
    key = spoil(adapter / "adapter_model.safetensors", "lora_A", change)
    assert key.removeprefix("base_model.model.").partition(".lora")[0] in refuse(adapter, message)


def test_twice_the_same_layer_is_refused(adapter):
    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    save_file(weights | {key.replace("language_model.", ""): w.clone() for key, w in weights.items()}, file)
    refuse(adapter, "8 keys name a layer that another key names too")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe\x00", b"version https://git-lfs.github.com/spec/v1\n", None])
def test_broken_files_of_an_adapter_are_named(adapter, name, content):
    (adapter / name).unlink() if content is None else (adapter / name).write_bytes(content)
    refuse(adapter, "" if (name, content) == ("adapter_config.json", None) else name)


def test_an_adapter_and_a_whole_model_in_one_place(adapter, tiny_model):
    shutil.copy(tiny_model / "model.safetensors", adapter)
    refuse(adapter, "holds an adapter .* and a whole model")
    with pytest.raises(ValueError, match="holds an adapter .* and a whole model"):
        load_processor(adapter)


def test_a_base_that_cannot_be_used_is_named_as_the_base(adapter, model):
    edit(adapter / "adapter_config.json", base_model_name_or_path=str(model))
    load_policy(adapter)
    edit(model / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    refuse(adapter, "the adapter's base cannot be used: .*the weights are quantised.* named by base_model_name_or_path")
    shutil.rmtree(model)
    refuse(adapter, "the adapter's base .* is not to be found .there is no such directory")


def test_an_adapter_on_an_adapter(adapter, sft):
    edit(adapter / "adapter_config.json", base_model_name_or_path=str(sft))
    refuse(adapter, "is an adapter itself; merge it")


# --- whole checkpoints --------------------------------------------------------------------------------------------


def weights_of(model):
    return load_file(model / "model.safetensors")


def test_weights_under_the_names_of_other_versions(tiny_model, model, rollout):
    weights = weights_of(model)
    new = {key.replace("visual.", "model.visual.", 1) if key.startswith("visual.") else
           key.replace("model.", "model.language_model.", 1): w for key, w in weights.items()}
    assert new.keys() != weights.keys()
    save_file(new, model / "model.safetensors")
    assert torch.equal(logps(model, rollout), logps(tiny_model, rollout))
    (model / "model.safetensors").unlink()
    torch.save(weights | {"model.rotary_emb.inv_freq": torch.ones(6), "lm_head.weight": weights["model.embed_tokens.weight"]},
               model / "pytorch_model.bin")  # buffers and a tied head, as in 2024
    assert torch.equal(logps(model, rollout), logps(tiny_model, rollout))


def test_weights_in_shards_and_an_untied_head(tiny_model, model, rollout):
    hf = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_model)
    hf.save_pretrained(model, max_shard_size="100KB")
    (model / "model.safetensors").unlink()
    assert torch.equal(logps(model, rollout), logps(tiny_model, rollout))
    index = json.loads((model / "model.safetensors.index.json").read_text())
    shard = sorted(set(index["weight_map"].values()))[1]
    (model / shard).rename(model / "elsewhere")
    refuse(model, "the weights cannot be read")
    save_file({"model.norm.weight": torch.ones(48)}, model / shard)
    refuse(model, "weights are missing")

    untied = model.with_name("untied")
    shutil.copytree(tiny_model, untied)
    weights = weights_of(untied)
    edit(untied / "config.json", tie_word_embeddings=False, text_config=json.loads((untied / "config.json").read_text())[
        "text_config"] | {"tie_word_embeddings": False})
    refuse(untied, r"1 weights are missing \(lm_head.weight\)")
    save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"] * 2}, untied / "model.safetensors")
    assert not torch.equal(logps(untied, rollout), logps(tiny_model, rollout))


@pytest.mark.parametrize("change, message", [
    (lambda w: {k: v for k, v in w.items() if "layers.1.mlp" not in k}, r"3 weights are missing \(model.language_model.layers.1.mlp"),
    (lambda w: {k: v for k, v in w.items() if "visual.merger" not in k}, "weights are missing .*visual.merger"),
    (lambda w: {k: v for k, v in w.items() if "embed_tokens" not in k}, "weights are missing .*embed_tokens"),
    (lambda w: w | {"model.layers.2.mlp.up_proj.weight": torch.ones(3)}, r"1 weights have no place .*layers.2.mlp.up_proj"),
    (lambda w: w | {"v_head.summary.weight": torch.ones(1, 48)}, r"1 weights have no place .*v_head.summary"),
    (lambda w: w | {"model.norm.weight": torch.ones(47)}, r"norm.weight is \(47,\) instead of \(48,\)"),
    (lambda w: w | {"model.norm.weight": torch.full((48,), torch.nan)}, "language_model.norm.weight holds numbers that are not finite"),
    (lambda w: w | {"visual.merger.ln_q.weight": torch.full((48,), torch.inf)}, "visual.merger.ln_q.weight holds numbers"),
    (lambda w: w | {"lm_head.weight": w["model.embed_tokens.weight"] + 1}, "ties the head to the embeddings")])
def test_a_weight_too_few_too_many_or_not_a_number_is_named(model, change, message):
    save_file({k: v.contiguous() for k, v in change(weights_of(model)).items()}, model / "model.safetensors")
    refuse(model, message)


@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", None])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_weights_that_cannot_be_read_are_refused(model, name, content):
    (model / "model.safetensors").unlink()
    if content is not None:
        (model / name).write_bytes(content)
    refuse(model, "the weights cannot be read")


@pytest.mark.parametrize("content", ["", "[]", "5", '{"model_type": "qwen2_5_vl", "text_config": 3}', '{"model_type": 7}',
                                     '{"model_type": "qwen2_5_vl", "text_config": {"hidden_size": "wide"}}', "{}"])
def test_a_config_that_cannot_be_read_is_refused(model, content):
    (model / "config.json").write_text(content)
    refuse(model, "not a model directory or hub id")


def test_quantised_weights_and_another_processor_are_refused(model):
    kept = (model / "config.json").read_text()
    edit(model / "config.json", quantization_config={"quant_method": "awq", "bits": 4})
    refuse(model, "the weights are quantised")
    (model / "config.json").write_text(kept)
    edit(model / "preprocessor_config.json", patch_size=16)
    refuse(model, "patch_size is 16 in the processor's files and 14 in config.json")
    edit(model / "preprocessor_config.json", patch_size=14)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["a-new-word"])
    tokenizer.save_pretrained(model)
    refuse(model, "the tokenizer has [0-9]+ tokens and the model's embeddings")


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "a_type_of_its_own"])
def test_code_in_a_checkpoint_is_never_run_and_no_one_is_asked(model, model_type, monkeypatch):
    "Not even where a yes would be typed."
    asked, ran = [], model / "ran"
    monkeypatch.setattr("builtins.input", lambda *args: asked.append(args) or "y")
    (model / "mine.py").write_text(f"open({str(ran)!r}, 'w')\nfrom transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig\n"
                                   "class Mine(Qwen2_5_VLConfig): pass\nclass Tok(PreTrainedTokenizerFast): pass\n")
    (model / "custom_generate").mkdir()
    shutil.copy(model / "mine.py", model / "custom_generate" / "generate.py")
    names = {name: "mine.Mine" for name in ("AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoProcessor")}
    edit(model / "config.json", model_type=model_type, auto_map=names)
    edit(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["mine.Tok", "mine.Tok"]})
    if model_type == "qwen2_5_vl":
        load_policy(model), load_processor(model)
    else:
        refuse(model, "not a model directory or hub id .*trust_remote_code|not a model directory or hub id .*custom code")
    assert asked == [] and not ran.exists()
    if model_type != "qwen2_5_vl":  # what the library does by itself
        AutoConfig.from_pretrained(model)
        assert asked and ran.exists()


# --- names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["./modle", "/no/such/place", "~/models/x", "runs/first/modle", "modle", "../x", "a/b/c", "",
                                  "C:\\models\\x", "owner/", "/owner", "http://huggingface.co/a/b", "owner/na me"])
def test_a_misspelt_path_is_refused_without_a_question_to_the_hub(monkeypatch, name):
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *args, **kwargs: pytest.fail("the hub was asked"))
    for load in (load_policy, load_processor):
        with pytest.raises(ValueError, match="not a model directory or hub id"):
            load(name)


class Strange(Exception):
    "An error of a class that no one expects."


def test_an_unknown_name_is_asked_for_once(monkeypatch):
    asked = []

    def model_info(self, name, **settings):
        asked.append((name, settings["timeout"]))
        raise Strange("no network here")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
    started = time.perf_counter()
    with pytest.raises(ValueError, match="the hub cannot be asked .no network here.; correct the name"):
        load_policy("runs/modle")
    assert asked == [("runs/modle", 10)] and time.perf_counter() - started < 9


def test_a_close_name_is_proposed(tmp_path, tiny_model):
    shutil.copytree(tiny_model, tmp_path / "qwen-small")
    with pytest.raises(ValueError, match="did you mean .*qwen-small"):
        load_policy(tmp_path / "qwen-smal")
    with pytest.raises(ValueError, match="it is a file; name the directory"):
        load_policy(tmp_path / "qwen-small" / "config.json")


# --- processors ---------------------------------------------------------------------------------------------------

VISION = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
          "{% for p in m.content %}{% if p.type == 'image' or 'image' in p %}<|vision_start|><|image_pad|><|vision_end|>"
          "{% elif p.type == 'video' or 'video' in p %}<|vision_start|><|video_pad|><|vision_end|>{% elif 'text' in p %}"
          "{{ p.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}"
          "<|im_start|>assistant\n{% endif %}")
TEXT_ONLY = {
    "adds strings": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}",
    "prints what it gets": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
    "reads text parts": "{% for m in messages %}{% for p in m.content if p.type == 'text' %}{{ p.text }}{% endfor %}{% endfor %}",
    "raises": "{{ raise_exception('only text is supported') }}", "is broken": "{% for m in messages %}",
    "has images alone": VISION.replace("<|video_pad|>", ""), "drops the words": VISION.replace("{{ p.text }}", ""),
    "calls strip": "{% for m in messages %}{{ m.content.strip() }}{% endfor %}",
}


def write_templates(model, **texts):
    "The checkpoint with these chat templates and no others; by name of the file."
    for name in ("chat_template.jinja", "chat_template.json"):
        (model / name).unlink(missing_ok=True)
    for name, text in texts.items():
        if name == "jinja":
            (model / "chat_template.jinja").write_text(text)
        elif name == "json":
            (model / "chat_template.json").write_text(json.dumps({"chat_template": text}))
        else:
            edit(model / f"{name}.json", chat_template=text)


@pytest.mark.parametrize("texts", [
    {"jinja": VISION}, {"json": VISION}, {"tokenizer_config": VISION}, {"json": VISION, "tokenizer_config": TEXT_ONLY["adds strings"]},
    {"jinja": TEXT_ONLY["prints what it gets"], "json": VISION}, {"json": [{"name": "default", "template": VISION}]},
    {"tokenizer_config": [{"name": "tool_use", "template": TEXT_ONLY["raises"]}, {"name": "default", "template": VISION}]}], ids=lambda t: "+".join(t))
def test_chat_templates_in_every_file(tiny_model, model, tmp_path, texts):
    write_templates(model, **texts)
    processor, expected = load_processor(model), load_processor(tiny_model)
    pixels = torch.zeros(2, 3, 28, 28, dtype=torch.uint8)
    visuals = [("video", Clip(pixels, torch.arange(2.0))), ("image", Clip(pixels[:1], torch.zeros(1)))]
    ours, theirs = (build_prompt(QUESTION, visuals, p, prefix="<think>") for p in (processor, expected))
    assert torch.equal(ours.prompt_ids, theirs.prompt_ids) and processor.end_id == expected.end_id
    save_policy(load_policy(model), processor, tmp_path / "saved")
    assert torch.equal(build_prompt(QUESTION, visuals, load_processor(tmp_path / "saved"), prefix="<think>").prompt_ids, ours.prompt_ids)


@pytest.mark.parametrize("text", TEXT_ONLY.values(), ids=TEXT_ONLY)
@pytest.mark.parametrize("file", ["jinja", "json", "tokenizer_config"])
def test_a_template_that_shows_no_videos_is_refused_when_it_is_loaded(model, file, text):
    write_templates(model, **{file: text})
    with pytest.raises(ValueError, match="the chat template in .* cannot be used: it .*; copy chat_template.jinja") as caught:
        load_processor(model)
    assert len(str(caught.value).splitlines()) == 1


IMAGE = {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
         "image_mean": [0.4, 0.5, 0.6], "image_std": [0.1, 0.2, 0.3], "size": {"shortest_edge": 784, "longest_edge": 3136}}


@pytest.mark.parametrize("files, most", [
    ({"processor_config": {"image_processor": IMAGE, "video_processor": {"patch_size": 99}}}, 3136),
    ({"processor_config": {"image_processor": IMAGE | {"image_processor_type": "Qwen2VLImageProcessorFast", "max_pixels": 6272}}}, 6272),
    ({"processor_config": {"processor_class": "Qwen2_5_VLProcessor"}, "preprocessor_config": IMAGE}, 3136),
    ({"preprocessor_config": IMAGE | {"size": {}, "min_pixels": 784, "max_pixels": 1568}}, 1568),
    ({"processor_config": {"image_processor": IMAGE}, "preprocessor_config": IMAGE | {"max_pixels": 1568}}, 3136),
    ({"preprocessor_config": {k: v for k, v in IMAGE.items() if k != "image_processor_type"} | {"max_pixels": None}}, 3136)])
def test_image_settings_in_every_layout(model, files, most):
    (model / "preprocessor_config.json").unlink()
    for name, settings in files.items():
        (model / f"{name}.json").write_text(json.dumps(settings))
    processor = load_processor(model)
    assert (processor.max_pixels, processor.min_pixels, processor.image_std) == (most, 784, (0.1, 0.2, 0.3))
    load_policy(model)


@pytest.mark.parametrize("change, message", [
    (dict(patch_size="14"), "patch_size is '14'"), (dict(image_mean=[0.5]), "image_mean is .* three numbers of 0 or more"),
    (dict(image_std=[0.1, 0.0, 0.1]), "image_std is"), (dict(merge_size=-2), "merge_size is -2"), (dict(max_pixels=True), "max_pixels is True"),
    (dict(image_processor_type="SiglipImageProcessor"), "prepared by SiglipImageProcessor")])
def test_image_settings_that_cannot_be_used_are_refused(model, change, message):
    edit(model / "preprocessor_config.json", **change)
    with pytest.raises(ValueError, match=message):
        load_processor(model)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "chat_template.json", "processor_config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b"\xff\xfe", b"null", b'"x"'])
def test_broken_files_of_a_processor_are_refused_in_one_line(model, name, content):
    (model / name).write_bytes(content)
    with pytest.raises(ValueError) as caught:
        load_processor(model)
    assert len(str(caught.value).splitlines()) == 1 and str(model) in str(caught.value)


# --- ends and tags ------------------------------------------------------------------------------------------------


def write_response(monkeypatch, policy, processor, text, then=0):
    "What `rollout_groups` makes of a policy that writes this text, and after it one token again and again."
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    steps, draw = iter([*ids, *[then] * 99]), decoding_module.sample_tokens

    def forced(logits, uniforms, *settings, **rest):
        drawn, logps = draw(logits, uniforms, *settings, **rest)
        drawn[:] = next(steps)
        return drawn, logps

    monkeypatch.setattr(decoding_module, "sample_tokens", forced)
    prompt = build_prompt(QUESTION, [], processor)
    rollout, = rollout_groups(policy, processor, [QUESTION], [prompt], [(0,)], group_size=2, max_tokens=60)
    return rollout, len(ids)


RIGHT = "<think>because</think>\n<answer>A</answer>"


@pytest.mark.parametrize("listed, eos", [*((ids, "<|im_end|>") for ids in ([0], 0, None, [], [0, 5], "absent")),
                                         ([0], "<|endoftext|>"), (None, "<|endoftext|>"), ([0], None), ("absent", None)])
def test_a_response_ends_where_the_template_ends_it(monkeypatch, model, listed, eos):
    if listed == "absent":
        (model / "generation_config.json").unlink()
    else:
        (model / "generation_config.json").write_text(json.dumps({"eos_token_id": listed, "pad_token_id": 0}))
    edit(model / "tokenizer_config.json", eos_token=eos)
    policy, processor = load_policy(model), load_processor(model)
    rollout, length = write_response(monkeypatch, policy, processor, f"{RIGHT}<|im_end|>", then=300)
    assert rollout.completion_mask.sum(-1).tolist() == [length] * 2
    assert rollout.texts[0] == RIGHT and total_reward(rollout.texts[0], QUESTION)[0] == 2.0
    assert processor.tokenizer.eos_token_id is not None
    if listed == [0]:
        rollout, length = write_response(monkeypatch, policy, processor, f"{RIGHT}<|endoftext|>", then=300)
        assert rollout.completion_mask.sum(-1).tolist() == [length] * 2 and rollout.texts[0] == RIGHT


def test_a_template_with_another_end(monkeypatch, model):
    tokenizer = AutoTokenizer.from_pretrained(model)
    write_templates(model, jinja=VISION.replace("<|im_end|>", "<|end|>"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    tokenizer.chat_template = None
    tokenizer.save_pretrained(model)
    hf = Qwen2_5_VLForConditionalGeneration.from_pretrained(model)
    hf.resize_token_embeddings(len(tokenizer))
    hf.save_pretrained(model)
    policy, processor = load_policy(model), load_processor(model)
    rollout, length = write_response(monkeypatch, policy, processor, f"{RIGHT}<|end|>", then=300)
    assert rollout.completion_mask.sum(-1).tolist() == [length] * 2 and rollout.texts[0] == RIGHT
    with pytest.raises(QuestionError, match="special token <|end|>"):
        build_prompt(Sample(id="h", question="an <|end|> ?", answer="x"), [], processor)


TAGS = ["<think>", "</think>", "<answer>", "</answer>", "<glue>", "</glue>"]


@pytest.mark.parametrize("added", [TAGS, TAGS[:4], ["</think>", "<answer>"], [tag + "\n" for tag in TAGS[:1]] + TAGS[1:]], ids=str)
@pytest.mark.parametrize("special", [True, False])
def test_tags_that_are_tokens_earn_their_reward(monkeypatch, model, added, special):
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(added, special_tokens=True) if special else tokenizer.add_tokens(added)
    tokenizer.save_pretrained(model)
    hf = Qwen2_5_VLForConditionalGeneration.from_pretrained(model)
    hf.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    hf.save_pretrained(model)
    policy, processor = load_policy(model), load_processor(model)
    text = "<think>\nbecause</think>\n<answer>A</answer>\n<glue>[(1, 2)]</glue>"
    rollout, _ = write_response(monkeypatch, policy, processor, f"{text}<|im_end|>")
    assert rollout.texts == (text,) * 2


# --- the reference of a run that begins with an adapter -----------------------------------------------------------

STARTS = {"all weights": (False, 0), "new adapters": (False, 4), "a saved adapter": (True, 0), "stacked": (True, 3)}


def make_trainer(path, samples, directory, steps=2, checkpointing=False, lora_rank=0, objective="grpo"):
    policy = load_policy(path, lora_rank=lora_rank, gradient_checkpointing=checkpointing)
    train = TrainConfig(steps=steps, prompts_per_step=2, learning_rate=1e-2, warmup_steps=1, save_every=1, inner_updates=1)
    return Trainer(policy, load_processor(path), samples, directory, train=train, rollout=RolloutConfig(3, max_tokens=6),
                   objective=ObjectiveConfig(objective, kl_coef=0.1), accelerator=Accelerator(cpu=True), score=by_length)


def by_length(rollout):
    "Rewards that differ within a group, so that there is something to learn."
    rewards = torch.tensor([float(len(text) % 7) for text in rollout.texts]) + torch.arange(len(rollout.texts))
    return replace(rollout, rewards=rewards, reward_parts={"format": rewards * 0, "accuracy": rewards * 0})


SAMPLES = [Sample(id=f"s{i}", question=f"what is red {i} ?", kind="number", answer="1") for i in range(4)]


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_kl_of_the_first_step_is_zero(tiny_model, sft, tmp_path, start, checkpointing):
    saved, lora_rank = STARTS[start]
    trainer = make_trainer(sft if saved else tiny_model, SAMPLES, tmp_path, checkpointing=checkpointing, lora_rank=lora_rank)
    base = [p.clone() for n, p in trainer.policy.named_parameters() if not p.requires_grad]
    first, second = trainer.step(), trainer.step()
    assert first["kl"] == 0.0 and first["grad_norm"] > 0 and second["kl"] > 0
    frozen = [p for n, p in trainer.policy.named_parameters() if not p.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(base, frozen, strict=True))


@pytest.mark.parametrize("lora_rank", [0, 3])
def test_in_bfloat16_the_reference_is_the_start_too(sft, rollout, lora_rank):
    policy = load_policy(sft, lora_rank=lora_rank, dtype="bfloat16", gradient_checkpointing=True).train()
    reference, batch = Reference(policy, Accelerator(cpu=True)), rollout_batch(policy, [rollout])
    began = policy(batch)
    assert torch.equal(reference.logps(batch, policy, policy), began)
    began.sum().backward()
    assert {name.split(".")[-2] for name, p in policy.named_parameters() if p.grad is not None} == {"default"}
    assert {p.dtype for p in policy.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize("start", ["a saved adapter", "stacked"])
def test_the_reference_is_the_policy_that_the_run_began_with(tiny_model, sft, tmp_path, rollout, start):
    lora_rank = STARTS[start][1]
    began = logps(sft, rollout)
    trainer = make_trainer(sft, SAMPLES, tmp_path / "whole", steps=3, lora_rank=lora_rank)
    rows = fit(trainer)
    reference = trainer.learner.reference

    def kept(trainer):
        return trainer.learner.reference.logps(rollout_batch(trainer.policy, [rollout]), trainer.learner.model, trainer.policy)[0]

    assert torch.equal(kept(trainer), began) and not torch.equal(logps(trainer.policy, rollout), began)
    with reference.policy(trainer.policy) as policy:  # sampling from it
        assert torch.equal(logps(policy, rollout), began)
    assert not torch.equal(logps(trainer.policy, rollout), began)

    # stopped and continued, it is still that one, and so is the run
    parts = make_trainer(sft, SAMPLES, tmp_path / "parts", steps=2, lora_rank=lora_rank)
    fit(parts)
    parts = make_trainer(sft, SAMPLES, tmp_path / "parts", steps=3, lora_rank=lora_rank)
    continued = fit(parts)
    assert torch.equal(kept(parts), began)
    assert [row["kl"] for row in continued] == [row["kl"] for row in rows]
    assert torch.equal(logps(parts.policy, rollout), logps(trainer.policy, rollout))

    # what is saved is the policy, and a next run begins there
    save_policy(trainer.policy, trainer.processor, tmp_path / "model")
    assert not [path for path in (tmp_path / "model").iterdir() if path.is_dir()]
    torch.testing.assert_close(logps(tmp_path / "model", rollout), logps(trainer.policy, rollout), atol=1e-4, rtol=0)
    theirs = load_policy(tiny_model)
    theirs.hf = PeftModel.from_pretrained(theirs.hf, tmp_path / "model")
    torch.testing.assert_close(logps(theirs, rollout), logps(trainer.policy, rollout), atol=1e-4, rtol=0)
    following = make_trainer(tmp_path / "model", SAMPLES, tmp_path / "next", lora_rank=2)
    assert following.step()["kl"] == 0.0 and following.step()["kl"] > 0


@pytest.mark.parametrize("settings", [{"use_rslora": True}, {"rank_pattern": {"v_proj": 2}, "lora_alpha": 7}, {"target_modules": ["qkv", "o_proj"]}], ids=str)
def test_a_stack_of_unlike_adapters_is_saved_as_one(tiny_model, tmp_path, rollout, settings):
    path = make_adapter(tiny_model, tmp_path / "below", **settings)
    policy = load_policy(path, lora_rank=3, lora_alpha=5)
    assert torch.equal(logps(policy, rollout), logps(path, rollout))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B.default" in name:
                parameter.normal_(0, 0.3, generator=make_generator(name))
    save_policy(policy, load_processor(path), tmp_path / "both", state_dict=policy.state_dict())
    assert (logps(policy, rollout) - logps(path, rollout)).abs().max() > 0.1
    torch.testing.assert_close(logps(tmp_path / "both", rollout), logps(policy, rollout), atol=1e-4, rtol=0)


def test_what_cannot_be_stacked_is_refused(tiny_model, sft, tmp_path):
    refuse(make_adapter(tiny_model, tmp_path / "dora", use_dora=True), "a new adapter cannot be stacked on one of DoRA", lora_rank=2)
    with pytest.raises(ValueError, match="train_vision is on together with LoRA"):
        load_policy(sft, train_vision=True)


def test_an_adapter_of_dora_is_its_own_reference(tiny_model, tmp_path):
    path = make_adapter(tiny_model, tmp_path / "dora", use_dora=True, std=0.0)  # only its magnitudes have an effect
    trainer = make_trainer(path, SAMPLES, tmp_path / "run")
    assert trainer.step()["kl"] == 0.0 and trainer.step()["kl"] > 0


def test_a_reference_that_is_not_needed_costs_nothing(sft):
    policy = load_policy(sft)
    before = set(policy.state_dict())
    assert Reference(policy, Accelerator(cpu=True), needed=False).adapters is None and set(policy.state_dict()) == before


# --- questions that cannot be asked -------------------------------------------------------------------------------


@pytest.mark.parametrize("question, visuals, message", [
    ("<|im_end|> ?", [], "special token"), ("a lone \ud800", [], "cannot be shown"), ("thin ?", [(1, 500)], "aspect ratio"),
    ("tall ?", [(4080, 16)], "aspect ratio")])
def test_a_question_that_cannot_be_asked_is_a_named_error(tiny_model, question, visuals, message):
    processor = load_processor(tiny_model)
    shown = [("image", Clip(torch.zeros(1, 3, *size, dtype=torch.uint8), torch.zeros(1))) for size in visuals]
    with pytest.raises(QuestionError, match=f"sample x: .*{message}"):
        build_prompt(Sample(id="x", question=question, answer="a"), shown, processor)


def test_a_prompt_that_is_too_long_is_a_named_error(tiny_model):
    policy, processor = load_policy(tiny_model), load_processor(tiny_model)
    prompts = [build_prompt(Sample(id="x", question="red ? " * n, answer="a"), [], processor) for n in (1, 5000)]
    with pytest.raises(QuestionError, match="prompt 1 and its responses have [0-9]+ tokens, the model's context is 4096"):
        rollout_groups(policy, processor, [QUESTION] * 2, prompts, [(0,), (1,)], group_size=2, max_tokens=4)
    policy.context_length = len(prompts[0].prompt_ids) + 3
    with pytest.raises(QuestionError, match="exceed the model's context"):
        rollout_groups(policy, processor, [QUESTION], prompts[:1], [(0,)], group_size=2, max_tokens=4)
