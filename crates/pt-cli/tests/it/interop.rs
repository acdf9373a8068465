//! What `pt` writes, read back: adapters of `pt sft` and exports of `pt merge`. With PT_INTEROP_FOLDER set they are left
//! there with our logits, and `cargo xtask golden interop` loads them in PEFT and transformers.

use crate::common::{Workshop, stderr};
use pt_model::{Bare, CausalLm, Pretrained, Sites};
use pt_peft::load_adapter;
use pt_peft::testing::logits;
use pt_tensor::io::save_safetensors;
use pt_tensor::{Device, Kind, Tensor};
use std::path::{Path, PathBuf};
use std::rc::Rc;

/// Name, base model under `fixtures/models`, and settings of the adapter: one of each way to name layers and to scale, and
/// LoRA's variants; and the other methods that go into weights. BitFit gives a Llama biases, which the export has to say. Virtual tokens and
/// bottlenecks stay beside the model: there is nothing to merge.
const CASES: [(&str, &str, &[&str]); 18] = [
    ("llama", "llama", &["lora.rank=4", "lora.lora_alpha=8"]),
    (
        "llama_untied",
        "llama_untied",
        &["lora.target_modules=[q_proj, gate_proj]", "lora.modules_to_save=[lm_head]", "lora.use_rslora=true"],
    ),
    ("mistral", "mistral", &[r"lora.target_modules='.*\.layers\.1\.(self_attn\.[ko]_proj|mlp\.down_proj)'"]),
    (
        "qwen2",
        "qwen2",
        &[
            "lora.target_modules=[q_proj, k_proj, up_proj]",
            "lora.rank_pattern={k_proj: 2}",
            "lora.alpha_pattern={up_proj: 16}",
        ],
    ),
    ("gpt2", "gpt2", &["lora.target_modules=[c_attn, c_proj]"]),
    ("dora", "gpt2", &["lora.target_modules=[c_attn, c_fc]", "lora.use_dora=true", "lora.bias=all"]),
    ("embedding", "llama_untied", &["lora.target_modules=[embed_tokens, lm_head, q_proj]"]),
    ("pissa", "llama", &["lora.init_lora_weights=pissa", "lora.loraplus_lr_ratio=4"]),
    ("tokens", "llama", &["lora.target_modules=[q_proj]", "lora.trainable_token_indices=[3, 1]"]),
    ("ia3", "llama", &["peft=ia3"]),
    ("ia3_conv1d", "gpt2", &["peft=ia3"]),
    ("bitfit_new", "llama", &["peft=bitfit", "bitfit.target_modules=[q_proj, down_proj]"]),
    ("bitfit", "qwen2", &["peft=bitfit"]),
    ("prompt_tuning", "llama", &["peft=prompt_tuning", "prompt_tuning.num_virtual_tokens=5"]),
    ("prefix_tuning", "qwen2", &["peft=prefix_tuning", "prefix_tuning.num_virtual_tokens=3"]),
    ("prefix_projection", "llama", &["peft=prefix_tuning", "prefix_tuning.prefix_projection=true"]),
    ("bottleneck", "llama", &["peft=bottleneck"]),
    ("bottleneck_double", "gpt2", &["peft=bottleneck", "bottleneck.preset=double_seq_bn"]),
];

/// Whether what `sets` ask for can go into the weights.
fn is_mergeable(sets: &[&str]) -> bool {
    !sets.iter().any(|set| ["peft=prompt_tuning", "peft=prefix_tuning", "peft=bottleneck"].contains(set))
}

/// Ragged sequences, below a vocabulary's size.
fn sequences(vocab_size: i64) -> Vec<Vec<i64>> {
    let ids = |length: i64, seed: i64| (0..length).map(|at| (at * at * 31 + at * 17 + seed * 7) % vocab_size).collect();
    vec![ids(5, 1), ids(17, 2), ids(1, 3), ids(11, 4)]
}

/// Trains an adapter on `model` (a path as `--model` takes it), merges it, and compares the logits of what was written;
/// leaves all of it in `out`.
fn check(workshop: &Workshop, model: &str, sets: &[&str], out: Option<&Path>) {
    let rate = ["--dtype", "f32", "--set", "learning_rate=0.02", "--set", "max_steps=3", "--set", "save_every=0"];
    let mut sft = vec!["sft", "--model", model, "--device", "cpu", "--data", "rows.jsonl", "--output", "run"];
    sft.extend(["--set", "batch.batch_size=4", "--set", "data.max_length=44"]);
    sft.extend(rate);
    sets.iter().for_each(|set| sft.extend(["--set", set]));
    workshop.stdout(&sft);
    workshop.stdout(&["merge", "--model", model, "--dtype", "f32", "--output", "base"]);
    let merge = ["merge", "--model", model, "--dtype", "f32", "--adapter", "run", "--output", "merged"];
    if is_mergeable(sets) {
        workshop.stdout(&merge);
    } else {
        assert!(stderr(&workshop.run(&merge)).contains("cannot be merged"));
    }
    let adapter_folder = workshop.path("run/checkpoints/step-00000003/adapter");

    let open = |path: &Path| CausalLm::load(&Pretrained::open(path).unwrap(), Device::Cpu, Kind::Float).unwrap();
    let base = open(&workshop.path(model));
    let sequences = sequences(base.config().vocab_size);
    let bare: Rc<dyn Sites> = Rc::new(Bare);
    let adapter: Rc<dyn Sites> = load_adapter(&adapter_folder, &base).unwrap();
    let base_logits = logits(&base, &bare, &sequences).unwrap();
    let adapted = logits(&base, &adapter, &sequences).unwrap();
    let exported = logits(&open(&workshop.path("base")), &bare, &sequences).unwrap();
    let apart = |one: &Tensor, other: &Tensor| (one - other).abs().max().double_value(&[]);
    assert!(apart(&adapted, &base_logits) > 1e-2, "{model}: the adapter does nothing");
    let merged_logits = is_mergeable(sets).then(|| logits(&open(&workshop.path("merged")), &bare, &sequences).unwrap());
    let off = merged_logits.as_ref().map_or(0.0, |merged| apart(&adapted, merged));
    assert!(off <= 1e-4, "{model}: merged is off by {off}");
    assert_eq!(apart(&exported, &base_logits), 0.0, "{model}: the base exported is another model");

    let Some(out) = out else { return };
    std::fs::create_dir_all(out).unwrap();
    let merged = merged_logits.is_some().then(|| (workshop.path("merged"), "merged"));
    for (from, name) in [(workshop.path("base"), "base"), (adapter_folder, "adapter")].into_iter().chain(merged) {
        move_folder(&from, &out.join(name));
    }
    let lengths: Vec<i64> = sequences.iter().map(|sequence| sequence.len() as i64).collect();
    let tensors = [
        ("input_ids", Tensor::from_slice(&sequences.concat())),
        ("lengths", Tensor::from_slice(&lengths)),
        ("base_logits", base_logits),
        ("logits", adapted),
    ];
    let tensors = tensors.into_iter().chain(merged_logits.map(|logits| ("merged_logits", logits)));
    let tensors: Vec<_> = tensors.map(|(name, tensor)| (name.to_string(), tensor)).collect();
    save_safetensors(&out.join("ours.safetensors"), &tensors, &[]).unwrap();
    // What our tokenizer makes of a text, with the chat template where there is one.
    let pretrained = Pretrained::open(workshop.path(model)).unwrap();
    let tokenizer = pretrained.tokenizer.as_ref().unwrap();
    let text = "t5 t6 Where is Oslo?\n\nIn Norway.";
    let message = pt_model::Message::new("user", text);
    let rendered = pretrained.chat_template.as_ref().map(|template| template.render(&[message], None, true).unwrap());
    let ours = serde_json::json!({"text": text, "token_ids": tokenizer.encode(text).unwrap(), "rendered": rendered});
    std::fs::write(out.join("tokenizer.json"), ours.to_string()).unwrap();
}

fn move_folder(from: &Path, to: &Path) {
    std::fs::create_dir(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
        // The real model's files are large, and no longer needed there.
        std::fs::remove_file(&path).unwrap();
    }
}

#[test]
fn golden_interop_adapters_and_exports_read_back_with_the_same_logits() {
    let folder = std::env::var_os("PT_INTEROP_FOLDER").map(PathBuf::from);
    for (name, base, sets) in CASES {
        let out = folder.as_ref().map(|folder| folder.join(name));
        check(&Workshop::of(base), "model", sets, out.as_deref());
    }
    // The real one takes minutes and gigabytes: only for Python.
    if let (Some(folder), Some(model)) = (folder, std::env::var_os("PT_TEST_MODEL")) {
        let sets = ["lora.rank=4", "learning_rate=0.001"];
        check(&Workshop::new(), model.to_str().unwrap(), &sets, Some(&folder.join("smollm2")));
    }
}
