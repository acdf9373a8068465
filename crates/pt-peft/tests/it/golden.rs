//! Every case of `fixtures/lora/`: logits with the adapter, merged and without it, and merged tensors, as PEFT's.

use crate::{fixtures, sequences, tiny};
use pt_model::{Bare, Sites};
use pt_peft::testing::logits;
use pt_peft::{Adapter, LoraAdapter};
use pt_tensor::io::SafetensorsReader;
use pt_tensor::{Device, Tensor};
use std::path::Path;
use std::rc::Rc;

/// A value of `case.toml`, by a search for `key = `: numbers and strings only.
pub(crate) fn setting(case: &Path, key: &str) -> String {
    let text = std::fs::read_to_string(case.join("case.toml")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(&format!("{key} = ")));
    line.unwrap_or_else(|| panic!("{}: no `{key}`", case.display())).trim_matches('"').to_string()
}

fn list(case: &Path, key: &str) -> Vec<String> {
    let text = setting(case, key);
    let items = text.trim_matches(['[', ']']).split(", ");
    items.map(|item| item.trim_matches('"').to_string()).collect()
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
    assert_eq!(targets, want, "{name}: targets and their scaling");

    let sites: Rc<dyn Sites> = adapter.clone();
    let bare: Rc<dyn Sites> = Rc::new(Bare);
    close("logits", &logits(&model, &sites, &sequences).unwrap(), "logits");
    close("logits without", &logits(&model, &bare, &sequences).unwrap(), "base_logits");
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

#[test]
fn golden_lora_adapters_of_peft_give_its_logits_and_merged_weights() {
    let mut cases: Vec<_> =
        std::fs::read_dir(fixtures().join("lora")).unwrap().map(|entry| entry.unwrap().path()).collect();
    cases.sort();
    assert!(cases.len() >= 6, "{cases:?}");
    for case in cases {
        check(&case);
    }
}
