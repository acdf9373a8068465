//! Cases of methods other than LoRA: logits with the adapter, without it and merged, its values after one step of AdamW,
//! and the file that is written back, as the reference packages'.

use crate::golden::setting;
use crate::{fixtures, sequences, tiny};
use pt_model::{Bare, CausalLm, Completion, PackedBatch, PromptGroup, RunOptions, Sites};
use pt_peft::testing::logits;
use pt_peft::{Adapter, load_adapter};
use pt_tensor::io::SafetensorsReader;
use pt_tensor::{AdamW, AdamWConfig, Device, Kind, LabelLogprobs, Tensor};
use std::path::{Path, PathBuf};
use std::rc::Rc;

/// The cases of an area.
fn cases(area: &str) -> Vec<PathBuf> {
    let mut cases: Vec<_> =
        std::fs::read_dir(fixtures().join(area)).unwrap().map(|entry| entry.unwrap().path()).collect();
    cases.sort();
    assert!(cases.len() >= 3, "{cases:?}");
    cases
}

/// What a case says, and a comparison with its tensors.
struct Case<'a> {
    folder: &'a Path,
    expected: SafetensorsReader,
    atol: f64,
}

impl<'a> Case<'a> {
    fn open(folder: &'a Path) -> Self {
        let expected = SafetensorsReader::open(folder.join("expected.safetensors")).unwrap();
        Self { folder, expected, atol: setting(folder, "atol").parse().unwrap() }
    }

    fn close(&self, what: &str, value: &Tensor) {
        let want = self.expected.tensor(what, Device::Cpu).unwrap();
        let name = self.folder.display();
        assert_eq!(value.size(), want.size(), "{name}: {what}");
        let off = (value - want).abs().max().double_value(&[]);
        // Sums of some hundred products of size one: what 1e-5 allows grows with the numbers themselves.
        let allowed = self.atol * value.abs().max().double_value(&[]).max(1.0);
        println!("{name}: {what} within {off:.1e}");
        assert!(off <= allowed, "{name}: {what} is off by {off:e}, tolerance {allowed:e}");
    }
}

/// One step as `common.one_step` of the generators takes it.
fn step(model: &CausalLm, adapter: &Rc<dyn Adapter>, sequences: &[Vec<i64>]) -> f64 {
    let sites: Rc<dyn Sites> = adapter.clone();
    let group = |ids: &Vec<i64>| PromptGroup::single(vec![], Completion::new(ids.clone()));
    let batch = PackedBatch::new(&sequences.iter().map(group).collect::<Vec<_>>(), Device::Cpu).unwrap();
    let out = model.label_logprobs(&batch, &sites, RunOptions::default(), &LabelLogprobs::default()).unwrap();
    let loss = -out.logprobs.sum(Kind::Float);
    loss.backward();
    let config = AdamWConfig { weight_decay: 0.0, ..Default::default() };
    AdamW::new(adapter.parameters(), config).unwrap().step(1e-2).unwrap();
    loss.double_value(&[])
}

/// `prefix` stands before the names of parameters in the adapter's file, `tensor_file`.
fn check(folder: &Path, prefix: &str, tensor_file: &str) {
    let case = Case::open(folder);
    let mut model = tiny(&setting(folder, "base"));
    let sequences = sequences(folder);
    let adapter = load_adapter(&folder.join("adapter"), &model).unwrap();
    let sites: Rc<dyn Sites> = adapter.clone();
    let bare: Rc<dyn Sites> = Rc::new(Bare);
    case.close("logits", &logits(&model, &sites, &sequences).unwrap());
    case.close("base_logits", &logits(&model, &bare, &sequences).unwrap());

    let copies = tempfile::tempdir().unwrap();
    adapter.save(&copies.path().join("copy")).unwrap();
    let [ours, theirs] = [&copies.path().join("copy"), &folder.join("adapter")]
        .map(|folder| SafetensorsReader::open(folder.join(tensor_file)).unwrap());
    assert_eq!(ours.names().collect::<Vec<_>>(), theirs.names().collect::<Vec<_>>(), "{}", folder.display());
    for name in ours.names() {
        let [a, b] = [&ours, &theirs].map(|reader| reader.tensor(name, Device::Cpu).unwrap());
        assert!(a.kind() == b.kind() && a.equal(&b), "{name}");
    }

    if case.expected.names().any(|name| name == "merged_logits") {
        adapter.merge_into(&mut model).unwrap();
        case.close("merged_logits", &logits(&model, &bare, &sequences).unwrap());
        for tensor in case.expected.names().filter(|name| name.starts_with("merged.")) {
            case.close(tensor, &model.parameter(tensor.trim_start_matches("merged.")).unwrap());
        }
        adapter.unmerge_from(&mut model).unwrap();
    }

    let loss = step(&model, &adapter, &sequences);
    let want: f64 = setting(folder, "loss").parse().unwrap();
    assert!((loss - want).abs() <= 1e-5 * want, "{}: a loss of {loss}, expected {want}", folder.display());
    let stepped: Vec<&str> = case.expected.names().filter(|name| name.starts_with("stepped.")).collect();
    let values = adapter.parameters();
    assert!(stepped.len() >= values.len() && !values.is_empty(), "{stepped:?}");
    for (name, value) in values {
        case.close(&format!("stepped.{prefix}{name}"), &value.detach());
    }
}

#[test]
fn golden_bottleneck_adapters_of_adapter_hub_give_its_logits_and_its_step() {
    for case in cases("bottleneck") {
        check(&case, "", "adapter.safetensors");
    }
}

#[test]
fn golden_ia3_adapters_of_peft_give_its_logits_its_step_and_its_merged_weights() {
    for case in cases("ia3") {
        check(&case, "base_model.model.", pt_peft::TENSOR_FILE);
    }
}
