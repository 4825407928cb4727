"""Model folders: the right ones open with the same bits; whatever is wrong is one line that names the file."""

import json
import os
import shutil
import struct
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3VLForConditionalGeneration

from dev import fuzz_models
from prism_fast.config import ModelConfig, UpcycleConfig, load_config
from prism_fast.data.chat import Chat
from prism_fast.models.load import load_discriminator, load_policy, open_discriminator, open_policy
from prism_fast.models.policy import Policy
from prism_fast.records import DataError
from prism_fast.stages.upcycle import upcycle_directory
from tests.tiny_run import run_stage, settings

Change = Callable[[Path], object]
POINTER = fuzz_models.POINTER
GATE = "model.language_model.layers.1.mlp.gate_proj.weight"


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    return fuzz_models.make_bases(tmp_path_factory.mktemp("models"))


@pytest.fixture
def copy(bases, tmp_path):
    """A folder of a kind with one change."""

    def make(change: Change, kind: str = "policy") -> Path:
        folder = tmp_path / "changed"
        shutil.copytree(bases[kind], folder)
        change(folder)
        return folder

    return make


def setting(file: str, **changes) -> Change:
    """Keys of a JSON file, ``a__b`` of its object ``a``; None takes a key away."""

    def change(folder: Path) -> None:
        tree = json.loads((folder / file).read_text())
        for name, value in changes.items():
            *above, key = name.split("__")
            held = tree
            for part in above:
                held = held[part]
            held[key] = value
            if value is None:
                del held[key]
        (folder / file).write_text(json.dumps(tree))

    return change


def config(**changes) -> Change:
    return setting("config.json", **changes)


def content(file: str, data: bytes | str | Callable[[bytes], bytes]) -> Change:
    def change(folder: Path) -> None:
        old = (folder / file).read_bytes() if (folder / file).exists() else b""
        new = data(old) if callable(data) else data
        (folder / file).write_bytes(new.encode() if isinstance(new, str) else new)

    return change


def tensors(edit: Callable[[dict], object], file: str = "model.safetensors") -> Change:
    def change(folder: Path) -> None:
        held = load_file(folder / file)
        edit(held)
        save_file(held, folder / file, metadata={"format": "pt"})

    return change


def poison(name: str, value: float) -> Change:
    return tensors(lambda held: held[name].view(-1)[3:4].fill_(value))


def instead(file: str, make: Change) -> Change:
    def change(folder: Path) -> None:
        (folder / file).unlink()
        make(folder)

    return change


def template(old: str, new: str) -> Change:
    return content("chat_template.jinja", lambda data: data.decode().replace(old, new).encode())


def more_tokens(folder: Path) -> None:
    tokenizer = Chat.load(folder).tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|new_{i}|>" for i in range(16)]})
    tokenizer.save_pretrained(folder)


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def twice(held: dict) -> None:
    held["lm_head.weight"] = held["model.language_model.embed_tokens.weight"] + 1


def header(folder: Path) -> None:
    """Offsets that point behind the end of the file."""
    text = json.dumps({"a": {"dtype": "F32", "shape": [10**6], "data_offsets": [0, 4 * 10**6]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)


WEIGHTS = {
    "truncated": (content("model.safetensors", half), r"model\.safetensors: not a readable safetensors file"),
    "empty": (content("model.safetensors", b""), r"model\.safetensors: not a readable"),
    "pointer": (content("model.safetensors", POINTER), r"model\.safetensors: a git-lfs pointer.*git lfs pull"),
    "other bytes": (content("model.safetensors", b"PK\3\4" * 99), r"model\.safetensors: not a readable"),
    "header": (header, r"model\.safetensors: not a readable"),
    "foreign": (
        tensors(lambda held: [held.clear(), held.update(a=torch.ones(2))]),
        r"config\.json: text_config\.num_hidden_layers is 4, the weights have 0",
    ),
    "missing": (tensors(lambda held: held.pop(GATE)), rf"no weights for {GATE} \(1 missing\)"),
    "unexpected": (tensors(lambda held: held.update(extra=torch.ones(2))), r"has not: extra \(1 unexpected\)"),
    "escapes": (tensors(lambda held: held.update({"a\n\x1b[31m": torch.ones(2)})), r"has not: a\\n\\x1b\[31m \(1"),
    "NaN": (poison(GATE, float("nan")), rf"model\.safetensors: {GATE} holds NaN or infinity"),
    "infinity": (poison("model.visual.pos_embed.weight", float("-inf")), r"pos_embed\.weight holds NaN or infinity"),
    "integers": (tensors(lambda held: held.update({GATE: held[GATE].to(torch.int8)})), rf"{GATE} is I8, expected"),
    "fp8": (tensors(lambda h: h.update({GATE: h[GATE].to(torch.float8_e4m3fn)})), rf"{GATE} is F8_E4M3, expected"),
    "turned": (
        tensors(lambda h: h.update({GATE: h[GATE].T.contiguous()})),
        rf"{GATE} has shape \(160, 480\), by config",
    ),
    "another head": (tensors(twice), r"ties lm_head to the embedding, the weights hold two that differ"),
    "none": (instead("model.safetensors", lambda d: None), r"no model\.safetensors"),
    "loop": (
        instead("model.safetensors", lambda d: (d / "model.safetensors").symlink_to("model.safetensors")),
        "no such",
    ),
    "folder": (instead("model.safetensors", lambda d: (d / "model.safetensors").mkdir()), r"not a readable"),
    "pickled": (instead("model.safetensors", content("pytorch_model.bin", b"x")), r"pickled weights .*safetensors"),
    "gguf": (instead("model.safetensors", content("q4.gguf", b"GGUF")), r"GGUF weights, which are quantised"),
    "adapter": (content("adapter_config.json", "{}"), r"LoRA adapter .*merge"),
    "adapter's weights": (
        lambda d: (d / "model.safetensors").rename(d / "adapter_model.safetensors"),
        r"LoRA adapter .*merge",
    ),
    "adapter alone": (
        lambda d: [(d / "config.json").unlink(), (d / "adapter_config.json").touch()],
        r"LoRA adapter .*merge",
    ),
    "gguf alone": (lambda d: [(d / "config.json").unlink(), (d / "q4.gguf").touch()], r"GGUF weights"),
    "stale index": (
        content("model.safetensors.index.json", '{"weight_map": {"a": "b.safetensors"}}'),
        r"remove the one",
    ),
}

CONFIGS = {
    "fewer layers": (
        config(text_config__num_hidden_layers=3),
        r"config\.json: text_config\.num_hidden_layers is 3, .* 4",
    ),
    "absurd layers": (config(text_config__num_hidden_layers=10**9), r"is 1000000000, the weights have 4"),
    "absurd depth": (config(vision_config__depth=10**9), r"vision_config\.depth is 1000000000, the weights have 2"),
    "absurd width": (
        config(text_config__intermediate_size=10**9),
        r"shape \(160, 480\), by config\.json \(160, 10{9}\)",
    ),
    "absurd words": (config(text_config__vocab_size=10**12), r"embed_tokens\.weight has shape \(312, 160\)"),
    "over 64 bits": (config(text_config__hidden_size=2**70), r"config\.json: "),
    "heads": (config(text_config__num_attention_heads=5), r"config\.json: .*num_key_value_heads is 2, no divisor of 5"),
    "more heads": (config(text_config__num_attention_heads=8), r"o_proj\.weight has shape .* by config\.json"),
    "no heads": (config(text_config__num_attention_heads=0), r"num_attention_heads is 0, expected a positive"),
    "patches": (config(vision_config__patch_size=0), r"vision_config\.patch_size is 0"),
    "vision heads": (config(vision_config__num_heads=7), r"vision_config\.num_heads is 7, expected a divisor"),
    "deepstack": (config(vision_config__deepstack_visual_indexes=[5]), r"deepstack_visual_indexes is \[5\]"),
    "rope": (config(text_config__rope_parameters__rope_type="rope9"), r"config\.json: .*rope9"),
    "sections": (config(text_config__rope_parameters__mrope_section=[6, 5, 6]), r"mrope_section is \[6, 5, 6\]"),
    "activation": (config(text_config__hidden_act="gelu"), r"text_config\.hidden_act is 'gelu', expected 'silu'"),
    "no theta": (config(text_config__rope_parameters__rope_theta=None), r"no rope_theta"),
    "no text": (config(text_config=None), r"config\.json: no text_config"),
    "empty text": (config(text_config={}), r"config\.json: no text_config"),
    "no vision": (config(vision_config=None), r"config\.json: no vision_config"),
    "a string": (config(text_config="x"), r"config\.json: no text_config"),
    "NaN": (
        config(text_config__rms_norm_eps=float("nan")),
        r"config\.json: cannot be read \(NaN is no number of JSON\)",
    ),
    "a list": (content("config.json", "[1]"), r"config\.json: holds a list, expected a JSON object"),
    "damaged": (content("config.json", half), r"config\.json: cannot be read"),
    "deep": (content("config.json", "[" * 10**5), r"config\.json: cannot be read"),
    "pointer": (content("config.json", POINTER), r"config\.json: a git-lfs pointer"),
    "loop": (instead("config.json", lambda d: (d / "config.json").symlink_to("config.json")), r"no config\.json"),
    "other model": (config(model_type="llama"), r"model_type is 'llama', expected 'qwen3_vl'"),
    "remote code": (config(model_type="evil", auto_map={"AutoConfig": "evil.Evil"}), r"model_type is 'evil'"),
    "elsewhere": (config(transformers_weights="x.safetensors"), r"transformers_weights names other files or code"),
    "image token": (config(image_token_id=5), r"image_token_id is 5, but <\|image_pad\|> of the tokenizer is \d+"),
    "no row": (config(vision_start_token_id=10**6), r"vision_start_token_id is 1000000, expected a row of the 312"),
    **{
        f"quantised by {how}": (config(quantization_config={"quant_method": how}), rf"quantised .*\({how}\).*bf16")
        for how in ("fp8", "bitsandbytes", "gptq", "awq", "compressed-tensors")
    },
}

CHATS = {
    "thinking": (
        template("assistant\\n' -}}{%- endif", "assistant\\n<think>\\n' -}}{%- endif"),
        r"opens <think>.*Instruct",
    ),
    **{
        f"begins with {begun}": (
            template("assistant\\n' -}}{%- endif", "assistant\\n" + begun + "' -}}{%- endif"),
            expected,
        )
        for begun, expected in (
            ("<caption>", r"begins the assistant's turn with '.*<caption>'"),
            ("Sure: ", r"begins the assistant's turn with '.*Sure: '"),
            ("<thinking>", r"begins the assistant's turn with '.*<thinking>'"),
        )
    },
    "no system": (
        template("for message in messages", "for message in messages if message.role != 'system'"),
        r"leaves out the system's text",
    ),
    "refuses system": (
        template("{%- for", "{{ raise_exception('none') if messages[0].role == 'system' }}{%- for"),
        r"cannot be used \(none\)",
    ),
    "other end": (template("<|im_end|>", "<|endoftext|>"), r"does not end the user's turn with <\|im_end\|>"),
    "no parse": (
        template(
            "{%- for",
            "{%- fro",
        ),
        r"chat template cannot be used",
    ),
    "raises": (content("chat_template.jinja", "{{ raise_exception('no') }}"), r"chat template cannot be used \(no\)"),
    "empty": (content("chat_template.jinja", ""), r"leaves out the user's text"),
    "deaf": (template("add_generation_prompt", "false"), r"does not begin the assistant's turn"),
    "blind": (template("<|image_pad|>", ""), r"writes 0 placeholders for 1 images"),
    "template pointer": (content("chat_template.jinja", POINTER), r"chat_template\.jinja: a git-lfs pointer"),
    "not text": (content("chat_template.jinja", b"\xff\xfe\xff"), r"chat_template\.jinja: cannot be read"),
    "no template": (lambda d: (d / "chat_template.jinja").unlink(), r"no chat template"),
    "no settings": (lambda d: (d / "tokenizer_config.json").unlink(), r"no tokenizer_config\.json, without which"),
    "settings a list": (content("tokenizer_config.json", "[]"), r"tokenizer_config\.json: holds a list"),
    "newer": (setting("tokenizer.json", model__type="FutureBPE"), r"tokenizer\.json: tokenizer does not load"),
    "tokenizer cut": (content("tokenizer.json", half), r"tokenizer\.json: cannot be read"),
    "tokenizer empty": (content("tokenizer.json", "{}"), r"tokenizer\.json: tokenizer does not load"),
    "tokenizer gone": (lambda d: (d / "tokenizer.json").unlink(), r"tokenizer does not load"),
    "lossy": (
        setting("tokenizer.json", decoder={"type": "Fuse"}, normalizer={"type": "Lowercase"}),
        r"does not come back",
    ),
    "more tokens": (more_tokens, r"the tokenizer has 323 tokens, the embedding 312 rows"),
    "no pad": (setting("tokenizer_config.json", pad_token=None), r"changed: tokenizer: no padding token"),
    "patch 0": (setting("preprocessor_config.json", patch_size=0), r"preprocessor_config\.json.*patch_size is 0"),
    "patch absurd": (setting("preprocessor_config.json", patch_size=10**6), r"patch_size is 1000000"),
    "other patch": (
        setting("preprocessor_config.json", patch_size=16),
        r"patch_size is 8, but patch_size of the image processor is 16",
    ),
    "other merge": (setting("preprocessor_config.json", merge_size=4), r"spatial_merge_size is 2, but merge_size"),
    "no frames": (setting("preprocessor_config.json", temporal_patch_size="2"), r"temporal_patch_size is '2'"),
    "bomb": (
        setting("preprocessor_config.json", size={"shortest_edge": 10**12, "longest_edge": 10**13}),
        r"size is 10{12}",
    ),
    "std 0": (setting("preprocessor_config.json", image_std=[0, 0, 0]), r"image_std"),
    "no mean": (setting("preprocessor_config.json", image_mean=None), r"no image_mean"),
    "no rescaling": (setting("preprocessor_config.json", do_rescale=False), r"do_rescale is False"),
    "newer processor": (
        content("processor_config.json", '{"image_processor": {"patch_size": 8}}'),
        r"processor_config\.json: no image_mean",
    ),
    "newer processor a list": (content("processor_config.json", "[]"), r"processor_config\.json: holds a list"),
    "one pixel": (
        setting("preprocessor_config.json", size={"shortest_edge": 1, "longest_edge": 1}),
        r"at most 1 pixels, less than one merged patch of 16 x 16",
    ),
    "resample": (setting("preprocessor_config.json", resample="x"), r"resample is 'x', expected one of Pillow's"),
    "settings of another class": (content("tokenizer_config.json", "{}"), r"other tokens than Qwen2Tokenizer"),
    "longest": (setting("tokenizer_config.json", model_max_length="x"), r"tokenizer\.json: "),
    "ids in another order": (
        content("tokenizer.json", lambda data: data.replace(b'"id": 300,', b'"id": 306,')),
        r"added token '<\|endoftext\|>' has id 306, but is loaded as \d+",
    ),
    "no merges": (setting("tokenizer.json", model__merges=[]), r"tokenizer\.json: 0 merges for \d+ tokens"),
    "an odd token": (
        content("tokenizer.json", lambda old: old.replace(b'"lstrip"', b'"lstrap"', 1)),
        r"tokenizer\.json: an added token has 'lstrap', which is no option",
    ),
    "an odd token of the settings": (
        content("tokenizer_config.json", b'{"added_tokens_decoder": {"0": {"content": "x", "Special": true}}}'),
        r"tokenizer_config\.json: an added token has 'Special', which is no option",
    ),
    "added tokens": (content("added_tokens.json", "{"), r"added_tokens\.json: cannot be read"),
    "processor a list": (content("preprocessor_config.json", "[]"), r"preprocessor_config\.json: holds a list"),
    "no processor": (lambda d: (d / "preprocessor_config.json").unlink(), r"image processor does not load"),
}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        pytest.param(*case, id=f"{group}: {name}")
        for group, cases in (("weights", WEIGHTS), ("config", CONFIGS), ("chat", CHATS))
        for name, case in cases.items()
    ],
)
def test_a_damaged_folder_is_one_line(copy, capfd, change, expected):
    folder = copy(change)
    with warnings.catch_warnings(), pytest.raises(DataError, match=expected) as caught:
        warnings.simplefilter("error")
        open_policy(ModelConfig(path=str(folder)))
    text = str(caught.value)
    assert text.startswith(str(folder)) and text.isprintable() and "; " in text
    assert capfd.readouterr() == ("", "")


INDEXES = {
    "outside": (lambda names: names.update(dict.fromkeys(names, "../policy/model.safetensors")), r"its own folder"),
    "absolute": (lambda names: names.update({GATE: "/etc/passwd"}), r"names '/etc/passwd', expected safetensors"),
    "pickled": (lambda names: names.update({GATE: "pytorch_model.bin"}), r"names 'pytorch_model\.bin'"),
    "no text": (lambda names: names.update({GATE: 7}), r"names '7'"),
    "missing shard": (
        lambda names: names.update({GATE: "model-00009.safetensors"}),
        r"00009\.safetensors: no such file",
    ),
    "other shard": (
        lambda names: names.update({name: "model-00001-of-00002.safetensors" for name in list(names)}),
        r"is not where it says",
    ),
    "a name less": (lambda names: names.pop(GATE), rf"index\.json: {GATE} is not where it says"),
    "empty": (lambda names: names.clear(), r"index\.json: no weight_map"),
    "no metadata": (lambda names: None, r'index\.json: no object under metadata.*add "metadata": \{\}'),
}


@pytest.mark.parametrize("name", INDEXES)
def test_a_damaged_index_is_one_line(copy, name):
    edit, expected = INDEXES[name]

    def change(folder: Path) -> None:
        file = folder / "model.safetensors.index.json"
        tree = json.loads(file.read_text())
        edit(tree["weight_map"])
        if name == "no metadata":
            del tree["metadata"]
        file.write_text(json.dumps(tree))

    with pytest.raises(DataError, match=expected):
        open_policy(ModelConfig(path=str(copy(change, "shards"))))


def test_a_tensor_in_two_shards_is_refused(copy):
    def change(folder: Path) -> None:
        first, second = (load_file(path) for path in sorted(folder.glob("*.safetensors")))
        save_file({**second, **dict([next(iter(first.items()))])}, folder / "model-00002-of-00002.safetensors")

    with pytest.raises(DataError, match=r"stands in model-00001-of-00002\.safetensors too"):
        open_policy(ModelConfig(path=str(copy(change, "shards"))))


@pytest.mark.parametrize("kind", ["policy", "shards"])
def test_sound_folders_open_with_the_same_bits_and_without_a_word(bases, kind, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policy, chat = open_policy(ModelConfig(path=str(bases[kind])))
    assert capfd.readouterr() == ("", "")
    stock = Qwen3VLForConditionalGeneration.from_pretrained(bases["policy"]).state_dict()
    assert {name.removeprefix("model.") for name in policy.model.state_dict()} == {
        n.removeprefix("model.") for n in stock
    }
    for name, value in policy.model.state_dict().items():
        assert torch.equal(value, stock[name]), name
    assert chat.vocab_size <= policy.head.shape[0]


def test_what_may_differ_opens(copy):
    """fp64 and bf16 weights, an equal copy of a tied head, a closed <think>, a head beside a renamed model's."""

    def change(folder: Path) -> None:
        held = load_file(folder / "model.safetensors")
        held[GATE] = held[GATE].double()
        held["lm_head.weight"] = held["model.language_model.embed_tokens.weight"].clone()
        save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
        template("assistant\\n' -}}{%- endif", "assistant\\n<think></think>' -}}{%- endif")(folder)
        config(auto_map={"AutoConfig": "evil.Evil"}, torch_dtype="bfloat16", attn_implementation="a/kernel")(folder)

    policy, _ = open_policy(ModelConfig(path=str(copy(change))))
    assert policy.head is policy.model.get_input_embeddings().weight


def test_the_settings_of_loggers_are_put_back(bases):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    open_policy(ModelConfig(path=str(bases["policy"])))
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_weights_that_overflow_the_dtype_are_named(copy):
    folder = copy(poison(GATE, 1e6))
    with pytest.raises(DataError, match=rf"{GATE} holds NaN or infinity \(as float16\)"):
        Policy.load(folder, dtype=torch.float16)


DISCRIMINATORS = {
    "no experts chosen": (config(text_config__num_experts_per_tok=0), r"num_experts_per_tok is 0, expected 1 to 4"),
    "other experts": (config(text_config__num_experts=8, text_config__num_local_experts=8), r"config\.json"),
    "no head": (lambda d: (d / "value_head.safetensors").unlink(), r"no value head"),
    "head cut": (content("value_head.safetensors", half), r"value_head\.safetensors: not a readable"),
    "head NaN": (
        tensors(lambda held: held["v_head.summary.weight"][0, :1].fill_(float("nan")), "value_head.safetensors"),
        r"value_head\.safetensors: v_head\.summary\.weight holds NaN",
    ),
    "two heads": (
        tensors(lambda held: held.update({"v_head.weight": torch.ones(1, 160)}), "value_head.safetensors"),
        r"two value heads, v_head\.summary\.weight and v_head\.weight",
    ),
    "head of another size": (
        tensors(lambda held: held.update({"v_head.summary.weight": torch.ones(1, 7)}), "value_head.safetensors"),
        r"value head of \(1, 7\) in F32, expected \(1, 160\)",
    ),
    "head with a bias": (
        tensors(lambda held: held.update({"v_head.summary.bias": torch.ones(1)}), "value_head.safetensors"),
        r"v_head\.summary\.bias is not 0",
    ),
    "weights": (content("model.safetensors", half), r"model\.safetensors: not a readable"),
    "thinking": CHATS["thinking"],
}


@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_a_damaged_discriminator_is_one_line(copy, name):
    change, expected = DISCRIMINATORS[name]
    folder = copy(change, "discriminator")
    with pytest.raises(DataError, match=expected) as caught:
        open_discriminator(ModelConfig(path=str(folder)))
    assert str(caught.value).startswith(str(folder)) and "\n" not in str(caught.value)


def test_models_that_read_anothers_chat_are_held_against_it(bases, copy, tmp_path):
    _, chat = open_policy(ModelConfig(path=str(bases["policy"])))
    wider = tmp_path / "wider"
    shutil.copytree(bases["policy"], wider)
    more_tokens(wider)
    with pytest.raises(DataError, match=r"323 tokens, the embedding 312 rows"):
        load_policy(ModelConfig(path=str(bases["policy"])), Chat.load(wider))
    with pytest.raises(DataError, match=r"323 tokens, the embedding 312 rows"):
        load_discriminator(ModelConfig(path=str(bases["discriminator"])), chat=Chat.load(wider))
    load_discriminator(ModelConfig(path=str(bases["discriminator"])), chat=chat)
    swapped = tmp_path / "swapped"
    shutil.copytree(bases["discriminator"], swapped)
    setting("tokenizer.json", model__vocab__a=66, model__vocab__b=65)(swapped)
    with pytest.raises(
        DataError, match=r"swapped/tokenizer\.json: token '[ab]' is 6[56], of the policy \d+; take models"
    ):
        load_discriminator(ModelConfig(path=str(swapped)), chat=chat)
    with pytest.raises(DataError, match=r"323 tokens, the embedding 312 rows"):
        Policy.load(bases["policy"], words=323)


def test_upcycling_opens_by_the_same_rules(copy, tmp_path):
    folder = copy(CHATS["thinking"][0])
    tree = {"model": {"path": str(folder)}, "out": str(tmp_path / "moe")}
    with pytest.raises(DataError, match="opens <think>"):
        upcycle_directory(load_config(UpcycleConfig, None, base=tree))
    assert not (tmp_path / "moe").exists()


@pytest.mark.usefixtures("torch_settings")
def test_a_damaged_model_in_a_checkpoint_is_one_line(tiny_folder, tmp_path):
    tree = settings(tiny_folder, "sft", tmp_path / "run", steps=1)
    run_stage("sft", tree)
    file = tmp_path / "run/checkpoints/step-000001/policy/model.safetensors"
    file.write_bytes(half(file.read_bytes()))
    with pytest.raises(DataError, match=r"step-000001: not as it was written \(policy/model\.safetensors has .* bytes"):
        run_stage("sft", {**tree, "steps": 2}, resume=True)


def test_the_folder_of_a_run_names_the_model_in_it(bases, tmp_path):
    shutil.copytree(bases["policy"], tmp_path / "run/final/policy")
    with pytest.raises(DataError, match=r"run: no config\.json; .* such as .*run/final/policy"):
        open_policy(ModelConfig(path=str(tmp_path / "run")))


def test_places_that_are_no_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to("loop")
    for name, expected in (
        ("file", "a file, or a link that leads nowhere"),
        ("loop", "a file, or a link|cannot be opened"),
        ("nowhere", "no such model directory"),
        ("x" * 5000, "cannot be opened|no such model"),
    ):
        with pytest.raises(DataError, match=expected) as caught:
            open_policy(ModelConfig(path=str(tmp_path / name)))
        assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", ["", "config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"])
def test_what_may_not_be_read_is_one_line(copy, name):
    folder = copy(lambda d: (d / name).chmod(0))
    try:
        with pytest.raises(DataError, match="changed"):
            open_policy(ModelConfig(path=str(folder)))
    finally:
        folder.chmod(0o755)


def test_mutated_folders_are_sound_or_one_line(bases, tmp_path):
    with fuzz_models.limits():
        counts, faults = fuzz_models.fuzz(tmp_path, bases, 40, seed=7)
    assert faults == []
    assert min(counts["opens"], counts["refused"]) >= 5
