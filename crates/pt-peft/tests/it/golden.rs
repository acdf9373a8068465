//! Every case of `fixtures/lora/`: logits with the adapter, merged and without it, merged tensors, and what a step trains,
//! as PEFT's.

use crate::{fixtures, sequences, tiny};
use pt_model::{Bare, CausalLm, Completion, PackedBatch, PromptGroup, Sites};
use pt_peft::testing::logits;
use pt_peft::{Adapter, CONFIG_FILE, LoraAdapter, LoraConfig, LoraInit, TENSOR_FILE};
use pt_tensor::io::SafetensorsReader;
use pt_tensor::{AdamW, AdamWConfig, Device, Kind, Tensor};
use std::path::{Path, PathBuf};
use std::rc::Rc;

/// A value of `case.toml`, by a search for `key = `: numbers and strings only.
pub(crate) fn setting(case: &Path, key: &str) -> String {
    optional(case, key).unwrap_or_else(|| panic!("{}: no `{key}`", case.display()))
}

fn optional(case: &Path, key: &str) -> Option<String> {
    let text = std::fs::read_to_string(case.join("case.toml")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(&format!("{key} = ")));
    line.map(|line| line.trim_matches('"').to_string())
}

fn list(case: &Path, key: &str) -> Vec<String> {
    let text = setting(case, key);
    let items = text.trim_matches(['[', ']']).split(", ");
    items.map(|item| item.trim_matches('"').to_string()).collect()
}

/// The generator's step of AdamW: the mean over every token that has one before it.
fn step(adapter: &Rc<LoraAdapter>, model: &CausalLm, sequences: &[Vec<i64>]) {
    let sites: Rc<dyn Sites> = adapter.clone();
    let groups: Vec<PromptGroup> =
        sequences.iter().map(|ids| PromptGroup::single(vec![], Completion::new(ids.clone()))).collect();
    let batch = PackedBatch::new(&groups, Device::Cpu).unwrap();
    let out = model.label_logprobs(&batch, &sites, Default::default(), &Default::default()).unwrap();
    (-out.logprobs.mean(Kind::Float)).backward();
    let config = AdamWConfig { eps: 1e-5, ..Default::default() };
    AdamW::new(adapter.parameters(), config).unwrap().step(1e-3).unwrap();
}

fn reader(folder: &Path, file: &str) -> SafetensorsReader {
    SafetensorsReader::open(folder.join(file)).unwrap()
}

/// A case in which PEFT trained on from the adapter: the file that ours then writes has its tensors.
fn check_step(case: &Path) {
    let name = case.file_name().unwrap().to_string_lossy().into_owned();
    let model = tiny(&setting(case, "base"));
    let adapter = Rc::new(LoraAdapter::load(&case.join("adapter"), &model).unwrap());
    step(&adapter, &model, &sequences(case));
    let folder = tempfile::tempdir().unwrap();
    adapter.save(&folder.path().join("a")).unwrap();
    let (ours, theirs) = (reader(&folder.path().join("a"), TENSOR_FILE), reader(case, "trained.safetensors"));
    assert_eq!(ours.names().collect::<Vec<_>>(), theirs.names().collect::<Vec<_>>(), "{name}");
    let before = reader(&case.join("adapter"), TENSOR_FILE);
    for tensor in theirs.names() {
        let [own, want, start] = [&ours, &theirs, &before].map(|r| r.tensor(tensor, Device::Cpu).unwrap());
        assert!(!own.equal(&start), "{name}: `{tensor}` did not move");
        let off = (own - want).abs().max().double_value(&[]);
        println!("{name}: `{tensor}` after a step within {off:.1e}");
        assert!(off <= 1e-5, "{name}: `{tensor}` after a step is off by {off:e}");
    }
}

/// A case that PEFT trained from the weight's own parts: so does ours, from its own start.
fn check_start(case: &Path, start: String) {
    let name = case.file_name().unwrap().to_string_lossy().into_owned();
    let model = tiny(&setting(case, "base"));
    let converted = LoraConfig::from_peft_file(&case.join("adapter").join(CONFIG_FILE)).unwrap();
    let config = LoraConfig {
        rank: converted.rank / 2,
        lora_alpha: 8.0,
        init_lora_weights: LoraInit::Named(start),
        ..converted.clone()
    };
    let adapter = Rc::new(LoraAdapter::new(config, &model, 0).unwrap());
    step(&adapter, &model, &sequences(case));
    let sites: Rc<dyn Sites> = adapter.clone();
    let want = reader(case, "expected.safetensors").tensor("logits", Device::Cpu).unwrap();
    let off = (logits(&model, &sites, &sequences(case)).unwrap() - want).abs().max().double_value(&[]);
    println!("{name}: trained from the start within {off:.1e}");
    let atol: f64 = setting(case, "atol").parse().unwrap();
    assert!(off <= atol, "{name}: trained from the start, logits are off by {off:e}");
    // Converted, it has the names, shapes and settings of PEFT's.
    let folder = tempfile::tempdir().unwrap();
    let saved = folder.path().join("a");
    adapter.save(&saved).unwrap();
    let (ours, theirs) = (reader(&saved, TENSOR_FILE), reader(&case.join("adapter"), TENSOR_FILE));
    assert_eq!(ours.names().collect::<Vec<_>>(), theirs.names().collect::<Vec<_>>(), "{name}");
    assert!(theirs.names().all(|tensor| ours.shape(tensor) == theirs.shape(tensor)), "{name}");
    let read = LoraConfig::from_peft_file(&saved.join(CONFIG_FILE)).unwrap();
    assert_eq!(read.to_peft_text(false), converted.to_peft_text(false), "{name}");
}

fn check(case: &Path) {
    let name = case.file_name().unwrap().to_string_lossy().into_owned();
    let atol: f64 = setting(case, "atol").parse().unwrap();
    let mut model = tiny(&setting(case, "base"));
    let sequences = sequences(case);
    let expected = SafetensorsReader::open(case.join("expected.safetensors")).unwrap();
    let close = |what: &str, value: &Tensor, tensor: &str| {
        let want = expected.tensor(tensor, Device::Cpu).unwrap();
        assert_eq!(value.size(), want.size(), "{name}: {what}");
        let off = (value - want).abs().max().double_value(&[]);
        println!("{name}: {what} within {off:.1e}");
        assert!(off <= atol, "{name}: {what} is off by {off:e}, tolerance {atol:e}");
    };
    let adapter = Rc::new(LoraAdapter::load(&case.join("adapter"), &model).unwrap());
    let mut targets: Vec<(String, f64)> = adapter.targets().map(|(path, scaling)| (path.into(), scaling)).collect();
    let scalings = list(case, "scaling").into_iter().map(|s| s.parse::<f64>().unwrap());
    let mut want: Vec<(String, f64)> = list(case, "modules").into_iter().zip(scalings).collect();
    targets.sort_by(|a, b| a.0.cmp(&b.0));
    want.sort_by(|a, b| a.0.cmp(&b.0));
    assert_eq!(targets.len(), want.len(), "{name}: targets");
    for ((path, scaling), (want_path, want_scaling)) in targets.iter().zip(&want) {
        // An alpha that is no whole number loses its last bit in JSON.
        assert!(path == want_path && (scaling - want_scaling).abs() < 1e-12, "{name}: {path} {scaling}, {want_path}");
    }

    let sites: Rc<dyn Sites> = adapter.clone();
    let bare: Rc<dyn Sites> = Rc::new(Bare);
    close("logits", &logits(&model, &sites, &sequences).unwrap(), "logits");
    close("logits without", &logits(&model, &bare, &sequences).unwrap(), "base_logits");
    if expected.shape("merged_logits").is_none() {
        return;
    }
    adapter.merge_into(&mut model).unwrap();
    close("merged logits", &logits(&model, &bare, &sequences).unwrap(), "merged_logits");
    let mut num_merged = 0;
    for tensor in expected.names().filter(|name| name.starts_with("merged.")) {
        let value = model.parameter(tensor.trim_start_matches("merged.")).unwrap();
        close(tensor, &value, tensor);
        num_merged += 1;
    }
    assert!(num_merged > 0, "{name}: no merged tensor was compared");
}

fn cases() -> Vec<PathBuf> {
    let folders = std::fs::read_dir(fixtures().join("lora")).unwrap();
    let mut cases: Vec<_> = folders.map(|entry| entry.unwrap().path()).collect();
    cases.sort();
    assert!(cases.len() >= 19, "{cases:?}");
    cases
}

#[test]
fn golden_lora_adapters_of_peft_give_its_logits_and_merged_weights() {
    cases().iter().for_each(|case| check(case));
}

#[test]
fn golden_a_step_moves_lora_adapters_to_where_peft_moves_them() {
    let trained: Vec<_> = cases().into_iter().filter(|case| case.join("trained.safetensors").exists()).collect();
    assert!(trained.len() >= 11, "{trained:?}");
    trained.iter().for_each(|case| check_step(case));
}

#[test]
fn golden_starts_from_the_weight_train_as_in_peft_and_are_converted_as_there() {
    let started = cases().into_iter().filter_map(|case| Some((optional(&case, "start")?, case)));
    let count = started.map(|(start, case)| check_start(&case, start)).count();
    assert_eq!(count, 2);
}
