//! Thirty steps of the trainer, against those of TRL's DPOTrainer.

use crate::common::{Setup, examples, fixtures, new_run, take_turns, tiny_llama};
use pt_dpo::{DpoConfig, LOGPS_ACCURACY, LossConfig, Reference};
use pt_model::{Bare, CausalLm, Completion, Pretrained, PromptGroup};
use pt_peft::{LoraAdapter, LoraConfig};
use pt_tensor::io::SafetensorsReader;
use pt_tensor::{AdamWConfig, Device, Kind, Tensor, no_grad};
use pt_train::data::BatchConfig;
use pt_train::schedule::{ScheduleConfig, ScheduleKind};
use pt_train::settings::TrainConfig;
use std::collections::BTreeMap;
use std::rc::Rc;

struct Case {
    name: String,
    expected: SafetensorsReader,
    case_toml: String,
    rows: Vec<PromptGroup>,
}

impl Case {
    fn open(name: &str) -> Self {
        let folder = fixtures("dpo_train").join(name);
        let text = std::fs::read_to_string(folder.join("rows.jsonl")).unwrap();
        let rows = text.lines().map(|line| {
            let mut row: BTreeMap<String, Vec<i64>> = serde_json::from_str(line).unwrap();
            let mut take = |key: &str| row.remove(key).unwrap();
            let completions = ["chosen_ids", "rejected_ids"].map(|side| Completion::new(take(side)));
            PromptGroup { prompt: take("prompt_ids"), completions: completions.into() }
        });
        Self {
            name: name.to_owned(),
            expected: SafetensorsReader::open(folder.join("expected.safetensors")).unwrap(),
            case_toml: std::fs::read_to_string(folder.join("case.toml")).unwrap(),
            rows: rows.collect(),
        }
    }

    fn number(&self, key: &str) -> f64 {
        let line = self.case_toml.lines().find_map(|line| line.strip_prefix(key)?.trim_start().strip_prefix('='));
        line.unwrap().trim().parse().unwrap()
    }
}

/// Trains on the rows in their order and returns the numbers of each step by name.
fn train(case: &Case, setup: &Setup, reference: Reference) -> BTreeMap<&'static str, Vec<f64>> {
    let config = TrainConfig::<DpoConfig> {
        objective: DpoConfig {
            loss: LossConfig { beta: case.number("beta"), ..Default::default() },
            ..Default::default()
        },
        max_steps: Some(case.number("steps") as u64),
        learning_rate: case.number("learning_rate"),
        schedule: ScheduleConfig {
            kind: ScheduleKind::Linear,
            warmup_steps: Some(case.number("warmup_steps") as usize),
            ..Default::default()
        },
        adamw: AdamWConfig { weight_decay: case.number("weight_decay"), ..Default::default() },
        max_grad_norm: Some(case.number("max_grad_norm")),
        batch: BatchConfig {
            batch_size: case.number("batch_size") as usize,
            accumulation: case.number("gradient_accumulation") as usize,
            shuffle: false,
            ..Default::default()
        },
        save_every: 0,
        peft: None,
        ..Default::default()
    };
    let (_folder, run) = new_run();
    let records = setup.train(examples(&case.rows, &config.objective.loss), &[], &config, &run, reference, None).1;
    assert_eq!(records.len(), case.number("steps") as usize);
    let mut columns: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    for record in records {
        let own = [("loss", record.loss), ("grad_norm", record.grad_norm), ("learning_rate", record.learning_rate)];
        for (name, value) in record.values.into_iter().filter(|(name, _)| *name != LOGPS_ACCURACY).chain(own) {
            columns.entry(name).or_default().push(value);
        }
    }
    columns
}

fn check(case: &Case, columns: &BTreeMap<&'static str, Vec<f64>>) {
    let (rtol, atol) = (case.number("rtol"), case.number("atol"));
    for (name, found) in columns {
        let want = Vec::<f64>::try_from(case.expected.tensor(name, Device::Cpu).unwrap()).unwrap();
        assert_eq!(found.len(), want.len());
        // A reward is β times the difference of two log-probs, each of which is good to so many parts of itself.
        let floor = if name.starts_with("rewards/") {
            let logps = case.expected.tensor("logps/chosen", Device::Cpu).unwrap();
            case.number("beta") * logps.abs().max().double_value(&[]) * 0.1
        } else {
            atol / rtol
        };
        let errors = found.iter().zip(&want).map(|(f, w)| (f - w).abs() / w.abs().max(floor));
        let worst = errors.fold(0.0, f64::max);
        println!("{}: {name} relative error {worst:.2e}", case.name);
        assert!(worst <= rtol, "{}: {name} is off by {worst:.2e}: {found:?}, TRL has {want:?}", case.name);
    }
}

/// Adam moves an entry by up to the learning rate a step whatever its gradient's size, so one whose gradient is rounding
/// noise may part by a part of a step; the mean is held closer.
fn check_weights(case: &Case, setup: &Setup, file_name: impl Fn(&str) -> String) {
    let step = case.number("learning_rate");
    for (name, value) in &setup.parameters {
        let want = case.expected.tensor(&file_name(name), Device::Cpu).unwrap();
        let error = (value.detach().to_kind(Kind::Double) - want).abs();
        let (max, mean) = (error.max().double_value(&[]), error.mean(Kind::Double).double_value(&[]));
        assert!(
            max <= 0.1 * step && mean <= 1e-3 * step,
            "{}: {name} is off by {max:.2e}, {mean:.2e} in the mean",
            case.name
        );
    }
}

#[test]
fn thirty_lora_steps_equal_those_of_trl() {
    let _turn = take_turns();
    let case = Case::open("lora");
    let adapter = |model: &CausalLm| LoraAdapter::load(&fixtures("dpo_train/lora/initial_adapter"), model).unwrap();
    let setup = Setup::lora(tiny_llama(), adapter);
    check(&case, &train(&case, &setup, Reference::Sites(Rc::new(Bare))));
    check_weights(&case, &setup, |name| format!("final.base_model.model.{name}"));
}

#[test]
fn thirty_steps_of_all_weights_equal_those_of_trl() {
    let _turn = take_turns();
    let case = Case::open("full");
    let setup = Setup::full(tiny_llama());
    check(&case, &train(&case, &setup, Reference::Model(Box::new(tiny_llama()), Rc::new(Bare))));
    check_weights(&case, &setup, |name| format!("final.{name}"));
}

#[test]
fn thirty_steps_of_smollm2_equal_those_of_trl() {
    let Some(path) = std::env::var_os("PT_TEST_MODEL") else {
        println!("PT_TEST_MODEL is not set: `cargo xtask test` sets it");
        return;
    };
    let _turn = take_turns();
    pt_tensor::set_num_threads(2);
    let case = Case::open("smollm2");
    let model = CausalLm::load(&Pretrained::open(path).unwrap(), Device::Cpu, Kind::Float).unwrap();
    let config = LoraConfig {
        rank: case.number("rank") as i64,
        lora_alpha: case.number("lora_alpha"),
        target_modules: pt_peft::Modules::Names(vec!["q_proj".into(), "v_proj".into()]),
        ..Default::default()
    };
    let setup = Setup::lora(model, |model| LoraAdapter::new(config, model, 0).unwrap());
    for (name, parameter) in setup.parameters.iter().filter(|(name, _)| name.contains("lora_A")) {
        let (rank, in_features) = parameter.size2().unwrap_or_else(|_| panic!("{name} is no matrix"));
        let at = |i: i64, j: i64| ((31 * i + 17 * j) % 97 - 48) as f64 / 48.0 / (in_features as f64).sqrt();
        let values: Vec<f64> = (0..rank * in_features).map(|k| at(k / in_features, k % in_features)).collect();
        no_grad(|| parameter.shallow_clone().copy_(&Tensor::from_slice(&values).view([rank, in_features])));
    }
    check(&case, &train(&case, &setup, Reference::Sites(Rc::new(Bare))));
}
