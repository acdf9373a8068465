use pt_tensor::io::SafetensorsReader;
use pt_tensor::{Device, Kind, LabelLogprobs, Tensor, label_logprobs};
use std::path::{Path, PathBuf};

/// Tiles that cut everywhere, that cut unevenly, that cut one axis only, and one that holds all.
const TILES: [(i64, i64); 6] = [(1, 1), (2, 5), (4, 32), (13, 10), (5, 97), (512, 8192)];

struct Case {
    name: String,
    settings: String,
    inputs: SafetensorsReader,
    expected: SafetensorsReader,
}

impl Case {
    fn open(folder: &Path) -> Self {
        Self {
            name: folder.file_name().unwrap().to_string_lossy().into_owned(),
            settings: std::fs::read_to_string(folder.join("case.toml")).unwrap(),
            inputs: SafetensorsReader::open(folder.join("inputs.safetensors")).unwrap(),
            expected: SafetensorsReader::open(folder.join("expected.safetensors")).unwrap(),
        }
    }

    /// A number of case.toml.
    fn number(&self, key: &str) -> Option<f64> {
        let line = self.settings.lines().find_map(|line| line.strip_prefix(key)?.trim_start().strip_prefix('='));
        line.map(|value| value.trim().parse().unwrap())
    }

    fn input(&self, name: &str) -> Tensor {
        self.inputs.tensor(name, Device::Cpu).unwrap()
    }

    fn check(&self, name: &str, found: &Tensor, options: &LabelLogprobs) {
        let expected = self.expected.tensor(name, Device::Cpu).unwrap().to_kind(Kind::Double);
        assert_eq!(found.size(), expected.size(), "{}: {name}", self.name);
        let (rtol, atol) = (self.number("rtol").unwrap(), self.number("atol").unwrap());
        let error = (found.to_kind(Kind::Double) - &expected).abs();
        // As a part of what is allowed there; a NaN fails the comparison too.
        let worst = (error / (expected.abs() * rtol + atol)).max().double_value(&[]);
        println!("{}: {name} {worst:.3} of what is allowed", self.name);
        assert!(worst <= 1.0, "{}: {name} is off by {worst:.2} of what is allowed, {options:?}", self.name);
    }
}

fn cases() -> Vec<Case> {
    let area = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/label_logprobs");
    let mut folders: Vec<PathBuf> = std::fs::read_dir(area).unwrap().map(|entry| entry.unwrap().path()).collect();
    folders.sort();
    assert!(!folders.is_empty());
    folders.iter().map(|folder| Case::open(folder)).collect()
}

fn each_case_and_tile(check: impl Fn(&Case, LabelLogprobs)) {
    for case in cases() {
        for (token_tile, vocab_tile) in TILES {
            let options = LabelLogprobs {
                temperature: case.number("temperature").unwrap(),
                soft_cap: case.number("softcap"),
                token_tile,
                vocab_tile,
                ..Default::default()
            };
            check(&case, options);
        }
    }
}

#[test]
fn values_entropies_and_top1_equal_those_in_f64_at_every_tile_size() {
    each_case_and_tile(|case, options| {
        for with_entropy in [false, true] {
            let options = LabelLogprobs { with_entropy, ..options };
            let out =
                label_logprobs(&case.input("hidden"), &case.input("weight"), &case.input("labels"), &options).unwrap();
            case.check("logprobs", &out.logprobs, &options);
            assert_eq!(out.entropy.is_some(), with_entropy);
            if let Some(entropy) = &out.entropy {
                case.check("entropy", entropy, &options);
            }
            case.check("is_top1", &out.is_top1, &options);
        }
    });
}

#[test]
fn gradients_of_log_probs_equal_those_in_f64_with_the_weight_frozen_or_trained() {
    each_case_and_tile(|case, options| {
        for (is_weight_trained, with_entropy) in [(false, false), (true, false), (false, true)] {
            let options = LabelLogprobs { with_entropy, ..options };
            let hidden = case.input("hidden").set_requires_grad(true);
            let weight = case.input("weight").set_requires_grad(is_weight_trained);
            let out = label_logprobs(&hidden, &weight, &case.input("labels"), &options).unwrap();
            (out.logprobs * case.input("grad_logprobs")).sum(Kind::Float).backward();
            case.check("grad_hidden", &hidden.grad(), &options);
            if is_weight_trained {
                case.check("grad_weight", &weight.grad(), &options);
            }
        }
    });
}

#[test]
fn gradients_of_entropies_equal_those_in_f64() {
    each_case_and_tile(|case, options| {
        let options = LabelLogprobs { with_entropy: true, ..options };
        let hidden = case.input("hidden").set_requires_grad(true);
        let weight = case.input("weight").set_requires_grad(true);
        let out = label_logprobs(&hidden, &weight, &case.input("labels"), &options).unwrap();
        (out.entropy.unwrap() * case.input("grad_entropy")).sum(Kind::Float).backward();
        case.check("entropy_grad_hidden", &hidden.grad(), &options);
        case.check("entropy_grad_weight", &weight.grad(), &options);
    });
}
